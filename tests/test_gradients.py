"""First and second derivatives by finite differences, forward and reverse."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, jvp, vmap

import normkit
from normkit import backend
from normkit import functional as F
from normkit.parametrizations import weight_standardization

NORMS = {
    "batch": lambda x, w, b, r, **k: F.batch_norm(x, None, None, w, b, True, residual=r, **k),
    "batch-eval": lambda x, w, b, r, **k: F.batch_norm(
        x, x.new_full((4,), 0.3), x.new_full((4,), 2.0), w, b, residual=r, **k
    ),
    "instance": lambda x, w, b, r, **k: F.instance_norm(x, None, None, w, b, residual=r, **k),
    "group": lambda x, w, b, r, **k: F.group_norm(x, 2, w, b, residual=r, **k),
    "layer": lambda x, w, b, r, **k: F.layer_norm(x, (4,), w, b, channels_first=True, add=r, **k),
    "rms": lambda x, w, b, r, **k: F.rms_norm(x, (4,), w, channels_first=True, add=r, **k),
    "layer-last": lambda x, w, b, r, **k: F.layer_norm(x.mT, (4,), w, b, add=r.mT, **k),
}


@pytest.mark.parametrize("act", [None, "relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", NORMS)
def test_derivatives(name, masked, act, each_backend):
    x, residual = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    weight, bias = torch.randn(2, 4, dtype=torch.float64)
    mask = torch.rand(3, 1, 3) < 0.7 if masked else None
    if name == "layer-last" and masked:
        mask = mask.mT

    def call(*inputs):
        return NORMS[name](*inputs, mask=mask, act=act)

    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]
    # Interpreted kernels are slow: there along random directions instead of every element.
    fast = backend.triton.interpreting()
    assert gradcheck(call, inputs, check_forward_ad=True, fast_mode=fast)
    if act in (None, "silu"):
        assert gradgradcheck(call, inputs, check_fwd_over_rev=True, fast_mode=fast)


def test_the_second_derivative_of_a_dead_channel_is_finite(each_backend):
    x = torch.zeros(4, 2, requires_grad=True)
    y = F.batch_norm(x, training=True).pow(3).sum() + x.sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.isfinite().all()


LAYERS = {
    "batch": lambda: normkit.BatchNorm(4, act="silu"),
    "batch, evaluated": lambda: normkit.BatchNorm(4).eval(),
    "ghost": lambda: normkit.GhostBatchNorm(4, 2),
    "renorm": lambda: normkit.BatchRenorm(4),
    "instance": lambda: normkit.InstanceNorm1d(4, affine=True),
    "group": lambda: normkit.GroupNorm(2, 4, act="silu"),
    "layer": lambda: normkit.LayerNorm(3),
    "rms": lambda: normkit.RMSNorm(3),
    "filter response": lambda: normkit.FilterResponseNorm(4),
    "transposed convolution, standardized": lambda: weight_standardization(
        nn.ConvTranspose1d(4, 2, 2, groups=2)
    ),
}


@pytest.fixture(params=LAYERS)
def linear_in_gradient(request, each_backend):
    """A layer, its input, and two gradients of its output with what they become, one by one."""
    layer = LAYERS[request.param]().double()
    x = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dys = torch.randn(2, *y.shape, dtype=torch.float64)
    wrt = (x, *layer.parameters())
    back = partial(torch.autograd.grad, y, wrt, retain_graph=True)
    one_by_one = [torch.stack(g) for g in zip(*map(back, dys), strict=True)]
    return back, dys, one_by_one


def test_many_gradients_at_once(linear_in_gradient):
    back, dys, one_by_one = linear_in_gradient
    torch.testing.assert_close(vmap(back)(dys), tuple(one_by_one))
    torch.testing.assert_close(back(dys, is_grads_batched=True), tuple(one_by_one))
    again = back(dys, is_grads_batched=True, create_graph=True)
    torch.testing.assert_close(again, tuple(one_by_one))


def test_a_tangent_goes_through_a_backward(linear_in_gradient):
    back, dys, one_by_one = linear_in_gradient
    of_second = tuple(g[1] for g in one_by_one)
    torch.testing.assert_close(jvp(back, (dys[0],), (dys[1],))[1], of_second)
    with forward_ad.dual_level():
        gradients = back(forward_ad.make_dual(*dys))
        torch.testing.assert_close(
            tuple(forward_ad.unpack_dual(g).tangent for g in gradients), of_second
        )


def test_the_gradient_of_a_sum_with_the_input_alone_is_batched():
    x, add = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    y, total = F.layer_norm(x, 3, add=add)
    dys = torch.randn(2, 4, 3, dtype=torch.float64)

    def back(dtotal):
        return torch.autograd.grad((y, total), x, (y.detach(), dtotal), retain_graph=True)[0]

    torch.testing.assert_close(vmap(back)(dys), torch.stack([back(dy) for dy in dys]))


@pytest.mark.parametrize("name", ["ghost", "group", "transposed convolution, standardized"])
def test_vectorized_jacobians(name):
    layer = LAYERS[name]().double()
    x = torch.randn(4, 4, 3, dtype=torch.float64)
    want = jacobian(layer, x)
    for strategy in ("reverse-mode", "forward-mode"):
        got = jacobian(layer, x, vectorize=True, strategy=strategy)
        torch.testing.assert_close(got, want)
    assert gradcheck(
        layer, (x.requires_grad_(),), check_batched_grad=True, fast_mode=False, atol=1e-4
    )


OF_ONE = {
    "layer": lambda: normkit.LayerNorm(5),
    "rms": lambda: normkit.RMSNorm(5),
    "zero-centred, acts": lambda: normkit.RMSNorm(5, zero_centered_weight=True, act="silu"),
    "all of two axes": lambda: normkit.LayerNorm((2, 3)),
}


@pytest.mark.parametrize("name", OF_ONE)
def test_an_input_of_the_normalized_shape_alone(name, each_backend):
    layer = OF_ONE[name]().double()
    xs = torch.randn(3, *layer.normalized_shape, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).pow(3).sum()

    def gradients(x, **options):
        found = torch.autograd.grad(loss(parameters, x), tuple(parameters.values()), **options)
        return dict(zip(parameters, found, strict=True))

    of_matrices = [gradients(x[None]) for x in xs]
    for x, want in zip(xs, of_matrices, strict=True):
        torch.testing.assert_close(gradients(x), want)
        torch.testing.assert_close(gradients(x, create_graph=True), want)
        torch.testing.assert_close(grad(loss)(parameters, x), want)
    per_sample = vmap(grad(loss), (None, 0))(parameters, xs)
    for name, got in per_sample.items():
        torch.testing.assert_close(got, torch.stack([want[name] for want in of_matrices]))


def test_the_parameter_gradients_of_no_rows_are_zero(each_backend):
    layer = normkit.LayerNorm((2, 3))
    y = layer(torch.randn(0, 2, 3)).sum()
    for gradient in torch.autograd.grad(y, tuple(layer.parameters()), create_graph=True):
        assert torch.equal(gradient, torch.zeros(2, 3))
