"""cast_before_affine: the normalized value is rounded before weight and again before bias."""

import pytest
import torch

import normkit
from normkit import functional

HALVES = [torch.bfloat16, torch.float16]


def tensors(dtype, shape=(3, 4, 32)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 1
    weight, bias = (torch.randn(32, generator=generator) for _ in range(2))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def standardized(x, axis=-1, mean=True):
    """In float32, then rounded to x's dtype."""
    wide = x.float()
    wide = wide - wide.mean(axis, keepdim=True) if mean else wide
    return (wide * (wide.square().mean(axis, keepdim=True) + 1e-5).rsqrt()).to(x.dtype)


def assert_the_same_bits(y, expected):
    """But for sums of another order, which flip a last bit now and then."""
    assert y.dtype == expected.dtype
    assert (y != expected).float().mean() < 0.01
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_each_step_is_rounded(dtype):
    x, weight, bias = tensors(dtype)
    y = functional.layer_norm(x, 32, weight, bias, cast_before_affine=True)
    assert_the_same_bits(y, standardized(x) * weight + bias)
    rounded_once = functional.layer_norm(x, 32, weight, bias)
    assert (y != rounded_once).float().mean() > 0.1
    y = functional.rms_norm(x, 32, weight, 1e-5, cast_before_affine=True)
    assert_the_same_bits(y, standardized(x, mean=False) * weight)


def test_one_plus_weight_is_added_in_the_weights_dtype():
    x, weight, _ = tensors(torch.bfloat16)
    y = functional.rms_norm(x, 32, weight, 1e-5, zero_centered_weight=True, cast_before_affine=True)
    assert_the_same_bits(y, standardized(x, mean=False) * (1 + weight))


def test_parameters_of_a_wider_dtype_promote_the_output():
    x, weight, bias = tensors(torch.bfloat16)
    y = functional.layer_norm(x, 32, weight.float(), bias.float(), cast_before_affine=True)
    assert_the_same_bits(y, standardized(x) * weight.float() + bias.float())


def test_channels_first_weights_a_sample_a_mask_and_a_sum():
    x, weight, bias = tensors(torch.bfloat16, (2, 32, 5))
    y = functional.layer_norm(x, 32, weight, bias, channels_first=True, cast_before_affine=True)
    expected = standardized(x, 1) * weight[:, None] + bias[:, None]
    assert_the_same_bits(y, expected)
    each = torch.stack([weight, -weight])
    y = functional.layer_norm(x, 32, each, channels_first=True, cast_before_affine=True)
    assert_the_same_bits(y, standardized(x, 1) * each[..., None])
    mask = torch.tensor([True, True, False, True, False]).expand(2, 1, 5)
    y = functional.layer_norm(
        x, 32, weight, bias, channels_first=True, cast_before_affine=True, mask=mask
    )
    assert_the_same_bits(y, expected.masked_fill(~mask, 0))
    y, total = functional.layer_norm(
        x, 32, weight, bias, channels_first=True, cast_before_affine=True, add=x
    )
    assert torch.equal(total, x + x)
    assert_the_same_bits(y, standardized(x + x, 1) * weight[:, None] + bias[:, None])


def test_in_float32_nothing_changes():
    x, weight, bias = tensors(torch.float32)
    plain = functional.layer_norm(x, 32, weight, bias)
    assert torch.equal(functional.layer_norm(x, 32, weight, bias, cast_before_affine=True), plain)


def test_the_layers_take_it_and_gradients_pass():
    x, weight, bias = tensors(torch.bfloat16)
    layer = normkit.LayerNorm(32, cast_before_affine=True).bfloat16()
    assert "cast_before_affine=True" in repr(layer)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    own = x.clone().requires_grad_()
    layer(own).sum().backward()
    theirs = x.clone().requires_grad_()
    (standardized(theirs) * weight + bias).sum().backward()
    torch.testing.assert_close(own.grad, theirs.grad, rtol=0.05, atol=0.05)
    torch.testing.assert_close(layer.bias.grad, torch.full((32,), 12.0).bfloat16())
    layer = normkit.RMSNorm(32, eps=1e-5, cast_before_affine=True).bfloat16()
    assert_the_same_bits(layer(x), standardized(x, mean=False))


def test_an_activation_is_refused():
    x, weight, bias = tensors(torch.bfloat16)
    with pytest.raises(ValueError, match="leave one of them out"):
        functional.layer_norm(x, 32, weight, bias, act="relu", cast_before_affine=True)
