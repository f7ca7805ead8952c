"""Affine given at the call: AdaIN, FiLM and class-conditional scale and shift, on any norm."""

import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import normkit
import oracle
from normkit import functional as F

EPS = 1e-5
SHAPE = (3, 4, 2, 5)

# name -> (how to call it, the oracle's kind and extras, where the channels lie)
NORMS = {
    "batch": (lambda x, w, b, **k: F.batch_norm(x, None, None, w, b, True, **k), "batch", {}),
    "ghost": (
        lambda x, w, b, **k: F.batch_norm(x, None, None, w, b, True, ghost_size=2, **k),
        "ghost",
        {"groups": 2},
    ),
    "instance": (lambda x, w, b, **k: F.instance_norm(x, None, None, w, b, **k), "instance", {}),
    "group": (lambda x, w, b, **k: F.group_norm(x, 2, w, b, **k), "group", {"groups": 2}),
    "channels": (
        lambda x, w, b, **k: F.layer_norm(x, (4,), w, b, channels_first=True, **k),
        "channels",
        {},
    ),
    "last": (lambda x, w, b, **k: F.layer_norm(x, (5,), w, b, **k), "last", {}),
    "rms": (
        lambda x, w, b, **k: F.rms_norm(x, (5,), w, EPS, bias=b, **k),
        "last",
        {"center": False},
    ),
}
FORMS = ["plain", "per sample", "one for all samples", "everywhere", "same in all channels"]


def affine(kind, form):
    """A parameter as the call takes it, and as the oracle does: with all axes."""
    channels = SHAPE[-1] if kind == "last" else SHAPE[1]

    def full(p):
        return p[:, None, None, :] if kind == "last" else p[:, :, None, None]

    match form:
        case "plain":
            p = torch.randn(channels, dtype=torch.float64)
            return p, full(p[None])
        case "per sample":
            p = torch.randn(SHAPE[0], channels, dtype=torch.float64)
            return p, full(p)
        case "one for all samples":
            p = torch.randn(1, channels, dtype=torch.float64)
            return p, full(p)
        case "everywhere":
            p = torch.randn(SHAPE, dtype=torch.float64)
            return p, p
        case _:
            p = torch.randn(SHAPE[0], 1, 1, 1, dtype=torch.float64)
            return p, p


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NORMS)
def test_the_formula(name, form, masked, each_backend):
    call, kind, extra = NORMS[name]
    x = torch.randn(SHAPE, dtype=torch.float64) + 1
    mask = torch.rand(SHAPE) < 0.8 if masked else None
    weight, full_weight = affine(kind, form)
    bias, full_bias = affine(kind, "plain")
    expected, _, _ = oracle.normalize(
        x.numpy(),
        kind,
        EPS,
        weight=full_weight.numpy(),
        bias=full_bias.numpy(),
        mask=None if mask is None else mask.numpy(),
        name="silu",
        **extra,
    )
    y = call(x, weight, bias, mask=mask, act="silu")
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", NORMS)
def test_derivatives(name, each_backend):
    call, kind, _ = NORMS[name]
    x = torch.randn(SHAPE, dtype=torch.float64)
    weight, bias = affine(kind, "per sample")[0], affine(kind, "same in all channels")[0]
    mask = torch.rand(SHAPE) < 0.8

    def f(*inputs):
        return call(*inputs, mask=mask, act="silu")

    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert gradcheck(f, inputs, check_forward_ad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True)


def test_evaluation_takes_it_too(each_backend):
    layer = normkit.BatchNorm(4, affine=False).eval()
    layer.running_mean.fill_(0.5)
    layer.running_var.fill_(4.0)
    x, scale, shift = torch.randn(3, 4, 5), torch.randn(3, 4), torch.randn(3, 4)
    expected = (x - 0.5) / 2 * scale[:, :, None] + shift[:, :, None]
    got = layer(x, weight=scale, bias=shift)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


LAYERS = [
    (lambda: normkit.BatchNorm(4), (4,)),
    (lambda: normkit.GhostBatchNorm(4, 2), (4,)),
    (lambda: normkit.BatchRenorm(4, r_steps=(0, 0), d_steps=(0, 0)), (4,)),
    (lambda: normkit.FrozenBatchNorm(4), (4,)),
    (lambda: normkit.InstanceNorm2d(4, affine=True), (4,)),
    (lambda: normkit.GroupNorm(2, 4), (4,)),
    (lambda: normkit.LayerNorm(4, channels_first=True), (4,)),
    (lambda: normkit.LayerNorm(5), (5,)),
    (lambda: normkit.RMSNorm(5), (5,)),
    (lambda: normkit.RMSNorm(5, zero_centered_weight=True), (5,)),
]


@pytest.mark.parametrize(("make", "plain"), LAYERS)
def test_a_layers_own_is_replaced_sample_by_sample(make, plain):
    layer = make()
    with torch.no_grad():
        layer.weight.fill_(7.0)
        if getattr(layer, "bias", None) is not None:
            layer.bias.fill_(5.0)
    x = torch.randn(SHAPE)
    weight, bias = torch.randn(2, SHAPE[0], *plain)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    y = layer(x, weight=weight, bias=bias)
    for n in range(SHAPE[0]):
        layer.load_state_dict(state)
        torch.testing.assert_close(
            y[n], layer(x, weight=weight[n], bias=bias[n])[n], atol=1e-5, rtol=1e-5
        )
    layer.load_state_dict(state)
    only_weight = layer(x, weight=weight)
    layer.load_state_dict(state)
    shift = 0.0 if getattr(layer, "bias", None) is None else 5.0
    torch.testing.assert_close(
        only_weight, layer(x, weight=weight, bias=torch.full(plain, shift)), atol=1e-5, rtol=1e-5
    )


def test_class_conditional_gradients_reach_the_embedding_and_adain_the_style():
    table = torch.nn.Embedding(3, 4)
    labels = torch.tensor([2, 0, 2])
    x = torch.randn(SHAPE)
    y = normkit.BatchNorm(4, affine=False)(x, weight=table(labels))
    y.square().sum().backward()
    assert (table.weight.grad.abs().sum(1) > 0).tolist() == [True, False, True]

    style = torch.randn(3, 4, 7) * 3 + 2
    adain = normkit.InstanceNorm2d(4)(x, weight=style.std(2, correction=0), bias=style.mean(2))
    torch.testing.assert_close(adain.mean((2, 3)), style.mean(2))
    torch.testing.assert_close(
        adain.std((2, 3), correction=0), style.std(2, correction=0), atol=1e-3, rtol=1e-3
    )


def test_an_unbatched_instance_norm_takes_one_of_its_rank():
    x, weight = torch.randn(4, 6), torch.randn(4, 1)
    layer = normkit.InstanceNorm1d(4)
    torch.testing.assert_close(layer(x, weight=weight), layer(x) * weight)


def test_rms_norm_by_one_plus_weight_is_gemmas():
    x = torch.randn(2, 3, 8).bfloat16()
    layer = normkit.RMSNorm(8, eps=1e-6, zero_centered_weight=True)
    assert torch.equal(layer.weight, torch.zeros(8))
    assert "zero_centered_weight=True" in repr(layer)
    torch.nn.init.normal_(layer.weight, std=1e-4)
    wide = x.float()
    gemma = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(layer(x), (gemma * (1 + layer.weight)).bfloat16())
    # in bfloat16, 1 + weight would round to 1
    small = layer.bfloat16()
    reference = (gemma * (1 + small.weight.float())).bfloat16()
    assert torch.equal(small(x), reference)
    plain = normkit.RMSNorm(8)
    assert torch.equal(plain.weight, torch.ones(8))
    y = F.rms_norm(wide, (8,), layer.weight.float(), 1e-6, zero_centered_weight=True)
    torch.testing.assert_close(y, gemma * (1 + layer.weight.float()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("make", "plain"), LAYERS)
def test_exports_to_onnx(make, plain, tmp_path):
    class Conditioned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = make()

        def forward(self, x, weight, bias):
            return self.norm(x, weight=weight, bias=bias)

    net = Conditioned().eval()
    inputs = (torch.randn(SHAPE), *torch.randn(2, SHAPE[0], *plain))
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.onnx.export(net, inputs, path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    names = [i.name for i in session.get_inputs()]
    (y,) = session.run(None, dict(zip(names, (i.numpy() for i in inputs), strict=True)))
    torch.testing.assert_close(torch.from_numpy(y), net(*inputs).detach(), atol=1e-5, rtol=1e-5)


def test_compiles_vmaps_and_traces():
    layer = normkit.GroupNorm(2, 4)
    x, weight = torch.randn(2, *SHAPE), torch.randn(2, SHAPE[0], 4)
    call = torch.compile(
        lambda x, w: layer(x, weight=w, bias=w), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(call(x[0], weight[0]), layer(x[0], weight=weight[0], bias=weight[0]))
    both = torch.vmap(lambda x, w: layer(x, weight=w))(x, weight)
    torch.testing.assert_close(both[1], layer(x[1], weight=weight[1]))
    traced = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(traced(x[0], weight=weight[0]), layer(x[0], weight=weight[0]))
    torch.nn.init.normal_(layer.weight)
    traced = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(traced(x[0]), layer(x[0]))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda x: normkit.BatchNorm(4)(x, weight=torch.ones(2, 4)),
            ValueError,
            r"BatchNorm\(4.*weight of shape \(4,\), \(3, 4\) for one a sample.*\(2, 4\)",
        ),
        (
            lambda x: normkit.GroupNorm(2, 4)(x, bias=torch.ones(3, 4, 1)),
            ValueError,
            r"GroupNorm\(2, 4.*bias of shape.*4 axes.*\(3, 4, 2, 5\), got \(3, 4, 1\)",
        ),
        (
            lambda x: normkit.LayerNorm(5)(x, weight=torch.ones(3, 4)),
            ValueError,
            r"LayerNorm\(\(5,\).*weight of shape \(5,\), \(3, 5\) for one a sample.*got \(3, 4\)",
        ),
        (
            lambda x: normkit.LayerNorm(5)(x[0, 0, 0], weight=torch.ones(3, 5)),
            ValueError,
            r"weight of shape \(5,\).*got \(3, 5\)",
        ),
        (
            lambda x: normkit.BatchNorm(4)(x, weight=torch.ones(3, 4).long()),
            TypeError,
            "weight must be a floating-point tensor, got torch.int64",
        ),
        (lambda x: normkit.BatchNorm(4)(x, bias=1.0), TypeError, "bias must be.*got float"),
        (
            lambda x: normkit.BatchNorm(4)(x, bias=torch.ones(3, 4, device="meta")),
            ValueError,
            "bias is on meta, the input on cpu",
        ),
    ],
)
def test_bad_shapes_are_errors(call, error, says):
    with pytest.raises(error, match=says):
        call(torch.randn(SHAPE))
