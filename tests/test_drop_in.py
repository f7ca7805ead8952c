"""Each layer against torch's: outputs, gradients, buffers and state."""

import copy
import inspect
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_fx

import normkit
from cases import CASES
from normkit import functional as F
from normkit.layers import _Norm

# float32: a few roundings of values around 1; half types: one rounding of the result, since both
# compute in float32.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def randomize(layer):
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name else 0.0))
    return layer


def pair(case, **kwargs):
    ours, theirs = case.pair(**kwargs)
    ours.load_state_dict(randomize(theirs).state_dict())
    return ours, theirs


def input_of(case, layout, dtype):
    x = torch.randn(case.shape, dtype=torch.float64).to(dtype) * 2 + 0.5
    if layout == "strided":
        return torch.stack([x, -x], -1)[..., 0]
    if layout == "channels_last":
        return x.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    return x


LAID_OUT = [
    (case, layout)
    for case in CASES
    for layout in ("contiguous", "strided", "channels_last")
    if layout != "channels_last" or len(case.shape) in CHANNELS_LAST
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("case", "layout"), LAID_OUT, ids=str)
def test_outputs_gradients_and_buffers_are_torchs(case, dtype, layout, training, each_backend):
    ours, theirs = pair(case, dtype=dtype)
    ours.train(training)
    theirs.train(training)
    for _ in range(2):
        x = input_of(case, layout, dtype)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = ours(a), theirs(b)
        assert ya.dtype == yb.dtype
        assert ya.shape == yb.shape
        tolerance = {"atol": 4 * TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(ya, yb, **tolerance)
        dy = torch.randn_like(ya)
        for layer, y in ((ours, ya), (theirs, yb)):
            layer.zero_grad()
            y.backward(dy)
        tolerance = {"atol": 16 * TOLERANCE[dtype], "rtol": 4 * TOLERANCE[dtype]}
        torch.testing.assert_close(a.grad, b.grad, **tolerance)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, **tolerance)
        for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(p, q, **tolerance)
        if layout == "channels_last":
            assert ya.is_contiguous(memory_format=CHANNELS_LAST[x.dim()])
            assert a.grad.is_contiguous(memory_format=CHANNELS_LAST[x.dim()])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_repr_and_copies_are_torchs(case):
    ours, theirs = pair(case)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    x = torch.randn(case.shape)
    ours.eval()
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours)
        assert torch.equal(copied(x), ours(x))


PUBLIC = {name: getattr(normkit, name) for name in normkit.__all__}
LAYERS = {n: t for n, t in PUBLIC.items() if isinstance(t, type) and issubclass(t, _Norm)}


@pytest.mark.parametrize("name", [name for name in LAYERS if hasattr(nn, name)])
def test_constructors_are_torchs_with_named_arguments_behind(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (normkit, nn))
    for argument, parameter in theirs.items():
        assert ours[argument].replace(annotation=parameter.annotation) == parameter
    own = [parameter for argument, parameter in ours.items() if argument not in theirs]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in own)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_constructors_say_all_that_they_take(layer):
    for parameter in inspect.signature(layer).parameters.values():
        assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


@pytest.mark.parametrize("name", ["BatchNorm", "InstanceNorm2d", "RMSNorm", "DyT", "SyncBatchNorm"])
def test_skip_init_makes_a_layer_without_filling_it(name):
    layer = nn.utils.skip_init(LAYERS[name], 3, dtype=torch.float64)
    assert isinstance(layer, LAYERS[name])
    assert all(p.dtype == torch.float64 and p.shape[-1:] in ((3,), ()) for p in layer.parameters())
    assert repr(pickle.loads(pickle.dumps(partial(LAYERS[name], 3)))()) == repr(layer)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (lambda n: normkit.BatchNorm2d(n(4)), "BatchNorm2d(4, "),
        (lambda n: normkit.SyncBatchNorm(n(4)), "SyncBatchNorm(4, "),
        (lambda n: normkit.InstanceNorm1d(n(4)), "InstanceNorm1d(4, "),
        (lambda n: normkit.GroupNorm(n(2), n(4)), "GroupNorm(2, 4, "),
        (lambda n: normkit.LayerNorm(n(4)), "LayerNorm((4,), "),
        (lambda n: normkit.RMSNorm((n(3), n(4))), "RMSNorm((3, 4), "),
        (lambda n: normkit.GhostBatchNorm(n(4), n(2)), "ghost_size=2)"),
        (lambda n: normkit.BatchNorm(n(4)).accumulate(n(2)), "micro_batches=2)"),
        (lambda n: normkit.FilterResponseNorm(n(4)), "FilterResponseNorm(4, "),
        (lambda n: normkit.DyT(n(4)), "DyT(4, "),
        (lambda n: normkit.Standardize((n(3), n(4))), "Standardize((3, 4), "),
        (lambda n: normkit.create("group:2", n(4)), "GroupNorm(2, 4, "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array, torch.tensor])
def test_sizes_are_integers_of_any_library(ours, expected, integer):
    assert expected in repr(ours(integer))


def test_functions_take_integers_of_any_library():
    x = torch.randn(4, 6, 5)
    assert torch.equal(F.group_norm(x, np.int64(2)), F.group_norm(x, 2))
    assert torch.equal(F.layer_norm(x, np.int64(5)), F.layer_norm(x, 5))
    assert torch.equal(F.rms_norm(x, np.array([6, 5])), F.rms_norm(x, (6, 5)))
    ghosts = [F.batch_norm(x, training=True, ghost_size=n) for n in (np.int32(2), 2)]
    assert torch.equal(*ghosts)


@pytest.mark.parametrize("base", [normkit.BatchNorm2d, normkit.BatchNorm], ids=lambda t: t.__name__)
def test_a_subclass_may_call_an_activation_of_its_own_act(base):
    class NormAct(base):
        def __init__(self, channels):
            super().__init__(channels)
            self.act = nn.Hardtanh()

        def forward(self, x):
            return self.act(super().forward(x))

    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(NormAct(3)(x), nn.Hardtanh()(nn.BatchNorm2d(3)(x)))
    assert isinstance(copy.deepcopy(NormAct(3)).act, nn.Hardtanh)


def test_a_subclass_keeps_the_activation_that_it_hands_on_beside_its_own():
    class Groups(normkit.GroupNorm):
        def __init__(self):
            super().__init__(2, 4, act="relu")
            self.act = "tanh"

    class Rows(normkit.LayerNorm):
        def act(self, x):
            return x.tanh()

        def forward(self, x):
            return self.act(super().forward(x))

    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(Groups()(x.mT), nn.GroupNorm(2, 4)(x.mT).relu())
    torch.testing.assert_close(Rows(4)(x), nn.LayerNorm(4)(x).tanh())


def test_an_activation_set_later_is_applied():
    layer, x = normkit.BatchNorm(3), torch.randn(4, 3)
    layer.act = "relu"
    torch.testing.assert_close(layer(x), nn.BatchNorm1d(3)(x).relu())


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        (CASES[2], (0, 6, 4, 5)),
        (CASES[2], (2, 6, 0, 5)),
        (CASES[6], (0, 4, 7)),
        (CASES[11], (0, 6, 4)),
        (CASES[14], (0, 3, 8)),
        (CASES[17], (0, 8)),
    ],
    ids=str,
)
def test_empty_inputs_move_nothing_and_have_zero_gradients(case, shape, each_backend):
    ours, theirs = pair(case)
    x = torch.zeros(shape, requires_grad=True)
    y = ours(x)
    assert y.shape == theirs(torch.zeros(shape)).shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    for p in ours.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))
    for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert torch.equal(p, q)


def test_the_meta_device_and_to_empty():
    layer = normkit.BatchNorm2d(3, device="meta")
    assert layer(torch.empty(2, 3, 4, 4, device="meta")).shape == (2, 3, 4, 4)
    layer.to_empty(device="cpu").reset_parameters()
    torch.testing.assert_close(layer(torch.ones(2, 3, 4, 4)), torch.zeros(2, 3, 4, 4))


def test_torchs_converters_and_tools_take_the_layers():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), normkit.BatchNorm2d(4))
    net(torch.randn(8, 3, 5, 5))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    assert isinstance(converted[1], nn.SyncBatchNorm)
    torch.testing.assert_close(converted[1].running_var, net[1].running_var)
    x = torch.randn(2, 3, 5, 5)
    expected = net.eval()(x)
    torch.testing.assert_close(nn.utils.fuse_conv_bn_eval(*net)(x), expected)
    data = [torch.randn(8, 3, 5, 5) for _ in range(3)]
    torch.optim.swa_utils.update_bn(data, net)
    activations = torch.stack([net[0](d) for d in data])
    torch.testing.assert_close(net[1].running_mean, activations.mean((0, 1, 3, 4)))


def test_two_forwards_before_a_backward_and_buffers_written_between():
    layer, other = normkit.BatchNorm1d(3), nn.BatchNorm1d(3)
    for evaluating in (False, True):
        layer.train(not evaluating)
        other.train(not evaluating)
        x, z = torch.randn(2, 8, 3)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        first = layer(a)
        layer(z)
        layer.running_mean.mul_(2)
        layer.running_var.mul_(2)
        first.square().sum().backward()
        other.load_state_dict(layer.state_dict())
        if evaluating:
            other.running_mean.div_(2)
            other.running_var.div_(2)
        other(b).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own
@pytest.mark.parametrize("case", [CASES[2], CASES[11], CASES[14], CASES[17]], ids=str)
def test_autocast_gives_torchs_dtype(case):
    ours, theirs = pair(case)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(case.shape).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(ours(x), theirs(x), atol=2e-2, rtol=1e-2)
            assert ours(x).dtype == theirs(x).dtype


@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[9], CASES[11]], ids=str)
def test_input_gradients_are_channels_last_whatever_the_output_gradients_layout(case, each_backend):
    layer, _ = pair(case)
    memory_format = CHANNELS_LAST[len(case.shape)]
    x = torch.randn(case.shape).contiguous(memory_format=memory_format).requires_grad_()
    for dy in (torch.randn(case.shape), torch.ones(()).expand(case.shape)):
        (dx,) = torch.autograd.grad(layer(x), x, dy)
        assert dx.is_contiguous(memory_format=memory_format)


def test_without_running_statistics_batches_are_counted_as_in_torch():
    ours, theirs = normkit.BatchNorm1d(3), nn.BatchNorm1d(3)
    for layer in (ours, theirs):
        layer.running_mean = layer.running_var = None
        layer(torch.randn(4, 3))
        layer.eval()
        layer(torch.randn(4, 3))
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 1


@pytest.mark.parametrize("shape", [(3, 4, 7), (3, 4, 5, 3), (2, 4, 2, 3, 4)], ids=str)
def test_the_dimension_free_instance_norm_is_torchs_of_each_dimension(shape):
    theirs = getattr(nn, f"InstanceNorm{len(shape) - 2}d")(4, affine=True, track_running_stats=True)
    ours = normkit.InstanceNorm(4, affine=True, track_running_stats=True)
    ours.load_state_dict(randomize(theirs).state_dict())
    for training in (True, False):
        x = torch.randn(shape)
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    with pytest.raises(ValueError, match=r"InstanceNorm\(4.*\(N, C, \*\) with at least one"):
        ours(torch.randn(3, 4))


@pytest.mark.parametrize("place", ["norm1", "norm2"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: normkit.LayerNorm(4),
        lambda: normkit.LayerNorm(4, act="relu"),
        lambda: normkit.LayerNorm(4, channels_first=True),
        lambda: normkit.FilterResponseNorm(4, eps=1e-5),
        lambda: normkit.GlobalResponseNorm(4, eps=1e-5, channels_first=False),
    ],
    ids=["plain", "act", "channels_first", "filter response", "global response"],
)
def test_torchs_fast_path_takes_plain_layer_norms_only(make, place, monkeypatch):
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    norm = make()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    setattr(layer, place, norm)
    layer = copy.deepcopy(layer).eval()
    fast = torch._transformer_encoder_layer_fwd
    taken = []
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a: taken.append(1) or fast(*a)
    )
    x = torch.randn(2, 4, 4)
    slow = layer(x)  # gradients are on
    with torch.no_grad():
        torch.testing.assert_close(layer(x), slow, atol=1e-5, rtol=1e-5)
    assert bool(taken) == (type(norm) is normkit.LayerNorm and repr(norm) == repr(nn.LayerNorm(4)))


def test_an_activation_set_later_keeps_torchs_fast_path_away_too():
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    layer.norm2 = normkit.LayerNorm(4)
    layer.norm2.act = "silu"
    x = torch.randn(2, 3, 4)
    slow = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fuse", [nn.utils.fuse_conv_bn_eval, nn.utils.fusion.fuse_conv_bn_eval])
def test_torchs_fusion_refuses_to_lose_an_activation(fuse):
    conv, norm = nn.Conv2d(3, 4, 1).eval(), normkit.BatchNorm(4, act="relu").eval()
    with pytest.raises(RuntimeError, match=r"BatchNorm\(4.*fuse_conv_bn_eval.*act='relu'.*fold"):
        fuse(conv, norm)
    with pytest.raises(RuntimeError, match=r"fuse_linear_bn_eval would lose act='gelu'"):
        nn.utils.fuse_linear_bn_eval(
            linear=nn.Linear(3, 4).eval(), bn=normkit.SyncBatchNorm(4, act="gelu").eval()
        )


@pytest.mark.parametrize(
    ("norm", "lost"),
    [
        (normkit.BatchNorm(4, act="relu"), "act='relu'"),
        (normkit.BatchNorm2d(4).freeze(), r"freeze\(\)"),
        (normkit.FrozenBatchNorm(4), "FrozenBatchNorm"),
        (normkit.GhostBatchNorm(4, 2), "GhostBatchNorm"),
        (normkit.BatchRenorm(4), "BatchRenorm"),
        (normkit.BatchNorm(4).accumulate(2), r"accumulate\(2\)"),
        (normkit.BatchNorm(4).synchronize(), r"synchronize\(\)"),
    ],
    ids=["act", "frozen", "FrozenBatchNorm", "ghosts", "renorm", "accumulating", "synchronized"],
)
def test_torchs_conversion_to_sync_refuses_to_lose_what_it_does_not_know(norm, lost):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(norm))
    with pytest.raises(RuntimeError, match=f"convert_sync_batchnorm would lose .*{lost}"):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)


@pytest.mark.parametrize("norm", [normkit.BatchNorm2d(3).freeze(), normkit.FrozenBatchNorm(3)])
def test_a_frozen_layer_whose_statistics_were_taken_away_says_so(norm):
    torch.func.replace_all_batch_norm_modules_(nn.Sequential(norm))
    with pytest.raises(ValueError, match="freeze needs running statistics"):
        norm(torch.randn(2, 3, 4, 4))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.parametrize("prepare", ["prepare_fx", "prepare_qat_fx"])
@pytest.mark.parametrize(
    "norm",
    [normkit.BatchNorm2d(4), normkit.BatchNorm(4, act="relu"), normkit.GroupNorm(2, 4)],
    ids=lambda norm: type(norm).__name__,
)
def test_quantization_by_tracing_names_the_remedy(norm, prepare):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), norm).train(prepare == "prepare_qat_fx")
    mapping = torch.ao.quantization.get_default_qconfig_mapping()
    with pytest.raises(RuntimeError, match=r'exact types.*swap\(model, to="torch"\)'):
        getattr(quantize_fx, prepare)(net, mapping, (torch.randn(2, 3, 4, 4),))


@pytest.mark.parametrize("names", [["0", "1"], ["0", "1", "2"], ["1", "2"]], ids="-".join)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_quantizations_fusion_names_the_remedy(names, training):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), normkit.BatchNorm2d(4), nn.ReLU()).train(training)
    fuse = (
        torch.ao.quantization.fuse_modules_qat if training else torch.ao.quantization.fuse_modules
    )
    with pytest.raises(RuntimeError, match=r'BatchNorm2d\(4.*swap\(model, to="torch"\)'):
        fuse(net, names)


@pytest.mark.filterwarnings("ignore:.*is exported in training mode")
@pytest.mark.parametrize(
    "norm",
    [
        normkit.BatchNorm2d(3),
        normkit.BatchNorm(3, act="relu"),
        normkit.BatchNorm2d(3, affine=False),
    ],
    ids=["BatchNorm2d", "act", "no affine"],
)
def test_a_graph_exported_for_training_holds_torchs_batch_norm(norm):
    theirs, x = nn.BatchNorm2d(3, affine=norm.affine), torch.randn(4, 3, 5, 5)
    graph = torch.export.export(norm, (x,)).module()
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.batch_norm.default in targets
    y = graph(x)
    expected = theirs(x) if norm._act is None else theirs(x).relu()
    torch.testing.assert_close(y, expected)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(graph.get_buffer(name), buffer)


def test_registries_by_exact_type_are_given_our_layers():
    batch, group, own = object(), object(), object()
    registry = {nn.BatchNorm1d: batch, nn.BatchNorm2d: batch, nn.GroupNorm: group}
    registry[normkit.BatchRenorm] = own
    normkit.register(registry)
    assert registry[normkit.BatchNorm1d] is registry[normkit.BatchNorm2d] is batch
    assert registry[normkit.BatchNorm] is registry[normkit.GhostBatchNorm] is batch
    assert registry[normkit.GroupNorm] is group
    assert registry[normkit.BatchRenorm] is own
    assert normkit.LayerNorm not in registry
    by_base = {nn.modules.batchnorm._BatchNorm: batch, nn.InstanceNorm2d: group}
    normkit.register(by_base)
    assert by_base[normkit.SyncBatchNorm] is by_base[normkit.BatchNorm3d] is batch
    assert by_base[normkit.InstanceNorm] is group


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda nn: nn.InstanceNorm3d(3), (3, 4, 5, 6)),
        (lambda nn: nn.InstanceNorm(4, act="relu"), (2, 4, 5, 6)),
        (lambda nn: nn.LayerNorm(6), (2, 3, 4, 6)),
        (lambda nn: nn.LayerNorm((4, 6), act="relu"), (2, 3, 4, 6)),
        (lambda nn: nn.LayerNorm((3, 4, 6)), (2, 3, 4, 6)),
        (lambda nn: nn.LayerNorm(5), (2, 3, 4, 6, 5)),
        (lambda nn: nn.RMSNorm(6), (2, 3, 4, 6)),
    ],
    ids=["unbatched", "batched", "last axis", "two axes", "a sample", "five axes", "rms"],
)
def test_channels_last_is_kept(make, shape, each_backend):
    layer, memory_format = make(normkit), CHANNELS_LAST[len(shape)]
    x = torch.randn(shape)
    y = layer(x.contiguous(memory_format=memory_format))
    torch.testing.assert_close(y, layer(x))
    assert y.is_contiguous(memory_format=memory_format)


def test_the_sum_beside_the_norm_keeps_channels_last_too():
    x = torch.randn(2, 3, 4, 6).contiguous(memory_format=torch.channels_last)
    y, total = normkit.RMSNorm(6)(x, add=x)
    torch.testing.assert_close(total, 2 * x)
    assert y.stride() == total.stride() == x.stride()


HALF = {
    "BatchNorm1d, momentum=None": (lambda nn: nn.BatchNorm1d(10, 1e-3, None), (4, 10)),
    "BatchNorm1d of rows, momentum=None": (lambda nn: nn.BatchNorm1d(5, 1e-3, None), (4, 5, 3)),
    "BatchNorm3d": (lambda nn: nn.BatchNorm3d(3, 1e-3, 0.7), (2, 3, 4, 4, 4)),
    "LayerNorm of a large batch": (lambda nn: nn.LayerNorm(5, 1e-3), (128, 5, 5)),
    "RMSNorm of a large batch": (lambda nn: nn.RMSNorm(5, 1e-3), (128, 5, 5)),
    "GroupNorm": (lambda nn: nn.GroupNorm(3, 6, 1e-3), (4, 6, 5)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HALF)
def test_in_half_precision_ours_is_no_farther_from_float64_than_torchs(name, dtype, training):
    """PyTorch's own cases, with randomized buffers and two forwards.

    The rounding of a result to its dtype is common to both; the mean error leaves chance out.
    """
    make, shape = HALF[name]
    errors = {"ours": [], "theirs": []}
    for _ in range(8):
        theirs = randomize(make(nn).train(training)).to(dtype)
        ours, exact = make(normkit).to(dtype), make(nn).double()
        ours.load_state_dict(theirs.state_dict())
        exact.load_state_dict(theirs.state_dict())
        batches = [(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)) for _ in "ab"]
        found = {}
        for who, layer in (("ours", ours), ("theirs", theirs), ("exact", exact)):
            layer.train(training)
            tensors = []
            for x, dy in batches:
                wide = torch.float64 if who == "exact" else dtype
                x = x.to(wide, copy=True).requires_grad_()
                y = layer(x)
                y.backward(dy.to(wide))
                tensors += [y.detach(), x.grad]
            tensors += [p.grad for p in layer.parameters()] + list(layer.buffers())
            found[who] = torch.cat([t.double().flatten() for t in tensors])
        for who, each in errors.items():
            each.append((found[who] - found["exact"]).abs().mean())
    assert torch.stack(errors["ours"]).mean() <= torch.stack(errors["theirs"]).mean() * 1.01
