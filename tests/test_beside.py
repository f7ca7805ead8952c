"""DyT, filter response norm, global response norm: hand-computed cases, oracles, bad input."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import normkit

LAYERS = {
    "DyT": lambda c, **k: normkit.DyT(c, channels_first=True, **k),
    "FRN": normkit.FilterResponseNorm,
    "FRN-learned": lambda c, **k: normkit.FilterResponseNorm(c, eps=1e-4, learn_eps=True, **k),
    "GRN": normkit.GlobalResponseNorm,
}


def randomize(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.rand_like(p) + 0.3)
    return layer


def oracle(name, x, p):
    """Channel by channel, sample by sample, in float64 NumPy."""
    y = np.zeros_like(x)
    for n, sample in enumerate(x):
        lengths = [np.sqrt((channel**2).sum()) for channel in sample]
        for c, channel in enumerate(sample):
            if name == "DyT":
                y[n, c] = np.tanh(p["alpha"] * channel) * p["weight"][c] + p["bias"][c]
            elif name == "GRN":
                response = lengths[c] / (np.mean(lengths) + 1e-6)
                y[n, c] = channel * response * p["weight"][c] + p["bias"][c] + channel
            else:
                eps = abs(p.get("eps", 1e-6))
                z = channel / np.sqrt((channel**2).mean() + eps) * p["weight"][c] + p["bias"][c]
                y[n, c] = np.maximum(z, p["tau"][c])
    return y


def test_dyt_by_hand():
    layer = normkit.DyT(2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 1.0]))
        layer.bias.copy_(torch.tensor([0.0, 1.0]))
    # tanh(0.5 * 2) = 0.76159416, tanh(0.5 * -1) = -0.46211716
    y = layer(torch.tensor([[2.0, -1.0]]))
    torch.testing.assert_close(y, torch.tensor([[1.52318831, 0.53788284]]))


def test_filter_response_norm_by_hand():
    layer = normkit.FilterResponseNorm(1, eps=0.5)
    with torch.no_grad():
        layer.weight.fill_(2.0)
        layer.bias.fill_(1.0)
        layer.tau.fill_(-0.5)
    # nu2 = (1 + 4 + 4 + 5) / 4 = 3.5, so x is divided by sqrt(3.5 + 0.5) = 2; then max(x + 1, tau)
    x = torch.tensor([[[1.0, 2.0, -2.0, -(5.0**0.5)]]])
    torch.testing.assert_close(layer(x), torch.tensor([[[2.0, 3.0, -0.5, -0.5]]]))
    linear = normkit.FilterResponseNorm(1, eps=0.5, tlu=False)
    torch.testing.assert_close(linear(x), x / 2)
    assert [n for n, _ in linear.named_parameters()] == ["weight", "bias"]


def test_global_response_norm_by_hand():
    # G = (3, 4), <G> = 3.5 + eps 0.5 = 4: the channels are scaled by 3/4 and 1.
    x = torch.tensor([[[3.0, 0.0], [0.0, -4.0]]])
    layer = normkit.GlobalResponseNorm(2, eps=0.5)
    torch.testing.assert_close(layer(x), x)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0]))
        layer.bias.copy_(torch.tensor([0.0, 10.0]))
    torch.testing.assert_close(layer(x), torch.tensor([[[5.25, 0.0], [10.0, -2.0]]]))


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 4, 3, 5), (2, 4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_the_formulas(name, shape):
    layer = randomize(LAYERS[name](4, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = {k: p.detach().numpy() for k, p in layer.named_parameters()}
    expected = oracle(name.split("-")[0], x.detach().numpy(), parameters)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-14)
    names = [k for k, _ in layer.named_parameters()]

    def call(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    assert gradcheck(
        call, (x[:2, :, :3], *(p.detach().requires_grad_() for p in layer.parameters()))
    )


@pytest.mark.parametrize("name", ["DyT", "GlobalResponseNorm"])
def test_channels_last_is_the_same_transposed(name):
    make = getattr(normkit, name)
    first, last = (randomize(make(4, channels_first=c)) for c in (True, False))
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), first(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_half_types_are_computed_in_float32(name, dtype):
    layer = randomize(LAYERS[name](4)).to(dtype)
    x = (torch.randn(2, 4, 50, 50) * 8).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, copy.deepcopy(layer).float()(x.float()).to(dtype))


@pytest.mark.parametrize("name", LAYERS)
def test_layout_copies_fx_and_evaluation(name):
    layer = randomize(LAYERS[name](4))
    x = torch.randn(2, 4, 3, 5)
    y = layer(x)
    last = layer(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)
    traced = torch.fx.symbolic_trace(layer)
    assert [n.op for n in traced.graph.nodes].count("call_function") == 1
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), traced, layer.eval()):
        assert torch.equal(other(x), y)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), y)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    assert "torch's operators" in normkit.explain(layer, x)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.01, 100), n=st.integers(1, 3), s=st.integers(2, 6))
def test_what_the_norms_remove(scale, n, s):
    x = torch.randn(n, 4, s, dtype=torch.float64)
    norm = normkit.FilterResponseNorm(4, eps=0.0, dtype=torch.float64)
    torch.testing.assert_close(norm(scale * x), norm(x))
    grn = randomize(normkit.GlobalResponseNorm(4, eps=0.0, dtype=torch.float64))
    with torch.no_grad():
        grn.bias.zero_()
    torch.testing.assert_close(grn(scale * x), scale * grn(x))


def test_zeros_and_empty_inputs_stay_finite():
    for make in LAYERS.values():
        layer = make(4)
        x = torch.zeros(2, 4, 3, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.isfinite().all()
        assert layer(torch.zeros(0, 4, 3)).shape == (0, 4, 3)


def test_a_single_position_needs_a_learned_eps():
    x = torch.randn(3, 4)
    layer = normkit.FilterResponseNorm(4, eps=0.01, learn_eps=True, tlu=False)
    torch.testing.assert_close(layer(x), x / (x * x + 0.01).sqrt())
    with torch.no_grad():
        layer.eps.neg_()
    torch.testing.assert_close(layer(x), x / (x * x + 0.01).sqrt())
    with pytest.raises(ValueError, match=r"1 position.*\(3, 4\).*learn_eps=True"):
        normkit.FilterResponseNorm(4)(x)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: normkit.DyT(5)(torch.randn(2, 4)), ValueError, r"DyT\(5.*5 channels.*\(2, 4\)"),
        (lambda: normkit.DyT(5)(torch.ones(2, 5).long()), TypeError, r"DyT\(5.*int64"),
        (lambda: normkit.DyT(5, alpha=float("nan")), ValueError, "alpha must be finite, got nan"),
        (
            lambda: normkit.GlobalResponseNorm(4)(torch.randn(2, 3, 3, 4)),
            ValueError,
            r"GlobalResponseNorm\(4.*channels on axis 1.*\(2, 3, 3, 4\)",
        ),
        (lambda: normkit.GlobalResponseNorm(4)(torch.randn(2, 4)), ValueError, r"\(N, C, \*\)"),
        (lambda: normkit.FilterResponseNorm(4, eps=-1.0), ValueError, "eps.*-1.0"),
        (lambda: normkit.FilterResponseNorm(4)(torch.randn(2, 5, 3)), ValueError, "4 channels"),
    ],
)
def test_bad_input_is_named(make, error, says):
    with pytest.raises(error, match=says):
        make()
