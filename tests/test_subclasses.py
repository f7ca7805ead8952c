"""Tensors that aren't plain: subclasses with a rule for functions, nested tensors."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.overrides import TorchFunctionMode

import normkit
from normkit import functional as F
from normkit.functional import layer_norm
from normkit.parametrizations import spectral_norm, weight_norm, weight_standardization


class Tagged(torch.Tensor):
    """Carries an attribute from what a function is given to what it returns."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        given = (*args, *(kwargs or {}).values())
        tags = [t.tag for t in given if isinstance(t, Tagged) and hasattr(t, "tag")]
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tagged) and tags:
                tensor.tag = tags[0]
        return result


def tagged(tensor):
    tensor = tensor.as_subclass(Tagged)
    tensor.tag = "here"
    return tensor


LAYERS = {
    "batch": lambda: normkit.BatchNorm(4),
    "batch, evaluated": lambda: normkit.BatchNorm(4).eval(),
    "ghost": lambda: normkit.GhostBatchNorm(4, 2),
    "renorm": lambda: normkit.BatchRenorm(4),
    "frozen": lambda: normkit.FrozenBatchNorm(4),
    "instance": lambda: normkit.InstanceNorm1d(4, affine=True),
    "group": lambda: normkit.GroupNorm(2, 4),
    "layer": lambda: normkit.LayerNorm(3),
    "layer over channels": lambda: normkit.LayerNorm(4, channels_first=True),
    "rms": lambda: normkit.RMSNorm(3),
    "dyt": lambda: normkit.DyT(3),
    "filter response": lambda: normkit.FilterResponseNorm(4),
    "global response": lambda: normkit.GlobalResponseNorm(4),
    "standardize": lambda: normkit.Standardize(4).fit(torch.randn(9, 4)),
    "weight norm": lambda: weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: spectral_norm(nn.Linear(3, 2)),
    "weight standardization": lambda: weight_standardization(nn.Linear(3, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_attribute_passes_through(name):
    layer, x = LAYERS[name]().eval(), torch.randn(4, 4, 3)
    y = layer(tagged(x).requires_grad_())
    assert y.tag == "here"
    torch.testing.assert_close(y.as_subclass(torch.Tensor), layer(x))
    with torch.no_grad():
        assert layer(tagged(x)).tag == "here"


@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm, weight_standardization])
def test_an_attribute_of_a_weight_passes_through_its_parametrization(wrap):
    linear = nn.Linear(3, 2)
    linear.weight = nn.Parameter(tagged(linear.weight.detach()))
    for parameter in wrap(linear).parametrizations.weight.parameters():
        parameter.tag = "here"
    assert linear.weight.tag == "here"


def test_an_attribute_of_any_tensor_argument_passes_through():
    x, w = torch.randn(4, 4, 3), torch.rand(4)
    assert F.batch_norm(x, None, None, tagged(w), training=True).tag == "here"
    assert F.batch_norm(x, tagged(w), w).tag == "here"
    assert F.group_norm(x, 2, residual=tagged(x)).tag == "here"
    y, total = F.layer_norm(x, 3, add=tagged(x))
    assert y.tag == total.tag == "here"
    assert F.rms_norm(x, 3, mask=tagged(x > 0)).tag == "here"


def test_a_subclass_may_have_rules_of_its_own():
    calls = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            calls.append((func, args[0], kwargs["eps"]))
            return "mine"

    x = torch.randn(4, 4, 3).as_subclass(Logged)
    assert normkit.LayerNorm(3, eps=0.5)(x) == "mine"
    ((function, of, eps),) = calls
    assert function is F.layer_norm
    assert of is x
    assert eps == 0.5


def test_a_function_of_its_own_name_is_one_node_for_fx():
    class Model(nn.Module):
        def forward(self, x):
            return layer_norm(x, 3, eps=0.5)

    traced = torch.fx.symbolic_trace(Model())
    (call,) = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert call.target is layer_norm
    x = torch.randn(2, 3)
    torch.testing.assert_close(traced(x), layer_norm(x, 3, eps=0.5))


def test_a_mode_sees_a_norm_as_one_call():
    calls = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    x, layer = torch.randn(4, 4, 3), normkit.BatchNorm(4)
    with Mode():
        y = layer(x)
    assert F.batch_norm in calls
    assert not {torch.Tensor.mul, torch.mean} & set(calls)
    torch.testing.assert_close(y, normkit.BatchNorm(4)(x))
    assert layer.num_batches_tracked == 1


def test_a_gradient_comes_back_through_a_subclass():
    x, layer = torch.randn(4, 4, 3), normkit.GroupNorm(2, 4)
    plain, own = x.clone().requires_grad_(), tagged(x).requires_grad_()
    layer(plain).pow(3).sum().backward()
    layer(own).pow(3).sum().backward()
    torch.testing.assert_close(own.grad.as_subclass(torch.Tensor), plain.grad)


LAYOUTS = pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)


def nested(samples, layout, **options):
    with warnings.catch_warnings(action="ignore"):  # torch calls them a prototype
        return torch.nested.nested_tensor(samples, layout=layout, **options)


def check_each_sample(layer, samples, x, *, of=lambda layer, t: layer(t)):
    """The layer on nested x and on each sample by itself: values and gradients."""
    dense = [s.clone().requires_grad_() for s in samples]
    ys = [of(layer, s) for s in dense]
    y = of(layer, x)
    assert y.layout == x.layout
    (x + y).unbind()  # the structures agree
    for got, want in zip(y.unbind(), ys, strict=True):
        torch.testing.assert_close(got, want)
    parameters = list(layer.parameters())
    want = torch.autograd.grad(sum(t.pow(3).sum() for t in ys), [*dense, *parameters])
    of_x, *got = torch.autograd.grad(
        sum(t.pow(3).sum() for t in y.unbind()), [x, *parameters], retain_graph=True
    )
    torch.testing.assert_close((*of_x.unbind(), *got), want)


@LAYOUTS
@pytest.mark.parametrize(
    "layer",
    [
        normkit.LayerNorm(5),
        normkit.RMSNorm(5, zero_centered_weight=True),
        normkit.LayerNorm((2, 5), bias=False, act="silu"),
    ],
    ids=["layer", "rms", "over two axes"],
)
def test_a_nested_tensor_is_normalized_row_by_row(layer, layout):
    inner = layer.normalized_shape[:-1]
    samples = [torch.randn(length, *inner, 5) for length in (3, 1, 2)]
    check_each_sample(layer, samples, nested(samples, layout, requires_grad=True))


def test_values_between_the_samples_of_a_jagged_tensor_take_no_part():
    padded = torch.full((2, 6, 5), torch.nan)
    starts, lengths = torch.tensor([0, 1]), torch.tensor([3, 2])
    samples = [torch.randn(3, 5), torch.randn(2, 5)]
    padded[0, :3], padded[1, 1:3] = samples
    padded.requires_grad_()
    x = torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged)
    layer = normkit.LayerNorm(5)
    y = layer(x)
    assert y.shape == x.shape
    for got, sample in zip(y.unbind(), samples, strict=True):
        torch.testing.assert_close(got, layer(sample))
    sum(t.sum() for t in y.unbind()).backward()
    assert not padded.grad.isnan().any()
    assert not layer.weight.grad.isnan().any()


@LAYOUTS
def test_a_residual_stream_of_nested_tensors(layout):
    samples, layer = [torch.randn(3, 5), torch.randn(1, 5)], normkit.RMSNorm(5)
    x = nested(samples, layout)
    y, total = layer(x, add=x * 2)
    for of_y, of_total, sample in zip(y.unbind(), total.unbind(), samples, strict=True):
        torch.testing.assert_close(of_total, 3 * sample)
        torch.testing.assert_close(of_y, layer(3 * sample))


@LAYOUTS
@pytest.mark.parametrize(
    "layer",
    [
        normkit.BatchNorm(5),
        normkit.InstanceNorm(5),
        normkit.GroupNorm(1, 5),
        normkit.LayerNorm(5, channels_first=True),
        normkit.DyT(5),
        normkit.GlobalResponseNorm(5),
        normkit.Standardize(5, channels_first=False).fit(torch.arange(10.0).reshape(2, 5)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_others_refuse_a_nested_tensor(layer, layout):
    x = nested([torch.randn(3, 5), torch.randn(2, 5)], layout)
    with pytest.raises(TypeError, match=r"expected a dense tensor, got a nested one, .* pad it"):
        layer(x)


@LAYOUTS
def test_what_a_nested_tensor_cannot_be_given(layout):
    x, layer = nested([torch.randn(3, 5), torch.randn(2, 5)], layout), normkit.LayerNorm(5)
    with pytest.raises(ValueError, match=r"one weight for all samples, of shape \(5,\)"):
        layer(x, weight=torch.ones(2, 5))
    with pytest.raises(ValueError, match="takes no mask"):
        layer(x, mask=torch.ones(2, 1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"expected a nested input with last sizes \(3, 5\)"):
        normkit.LayerNorm((3, 5))(x)
    for norm in (layer, normkit.RMSNorm(5)):
        with pytest.raises(TypeError, match="add must be a dense tensor as the input is"):
            norm(torch.randn(2, 3, 5), add=x)
    with pytest.raises(TypeError, match="residual must be a dense tensor as the input is"):
        F.group_norm(torch.randn(2, 3, 5), 1, residual=x)


def test_a_nested_tensor_without_samples_stays_one():
    x = nested([], torch.strided)
    assert normkit.LayerNorm(5)(x) is x


@pytest.mark.parametrize(
    ("layer", "theirs"),
    [
        (normkit.LayerNorm(3), nn.LayerNorm(3)),
        (normkit.GroupNorm(2, 4, act="relu"), nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())),
        (normkit.InstanceNorm1d(4, affine=True), nn.InstanceNorm1d(4, affine=True)),
    ],
    ids=["layer", "group", "instance"],
)
def test_per_sample_gradients_by_expanded_weights(layer, theirs):
    x = torch.randn(5, 4, 3)
    for module in (layer, theirs):
        call_for_per_sample_grads(module, loss_reduction="mean")(x).pow(2).sum(1).mean().backward()
    for p, q in zip(layer.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad_sample, q.grad_sample)


def test_per_sample_gradients_of_rms_norm():
    x, layer = torch.randn(5, 4, 3), normkit.RMSNorm(3, zero_centered_weight=True)
    call_for_per_sample_grads(layer)(x).pow(3).sum().backward()
    each = [torch.autograd.grad(layer(one).pow(3).sum(), layer.weight)[0] for one in x]
    torch.testing.assert_close(layer.weight.grad_sample, torch.stack(each))


def test_per_sample_gradients_need_samples():
    with pytest.raises(ValueError, match="expected an input of several samples"):
        call_for_per_sample_grads(normkit.LayerNorm(3))(torch.randn(3))
    with pytest.raises(RuntimeError, match="cannot handle function batch_norm"):
        call_for_per_sample_grads(normkit.BatchNorm(3))(torch.randn(4, 3))
