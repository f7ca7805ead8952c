"""The extension takes ordinary calls, and gives the bits of Python's path, which takes the rest.

`NORMKIT_NO_EAGER=1 pytest` runs all other tests without it.
"""

import copy
import itertools
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normkit
from normkit import backend
from normkit import functional as F
from normkit.runtime import eager

pytestmark = pytest.mark.skipif(eager.missing is not None, reason=str(eager.missing))

ACTS = (None, "relu", "leaky_relu", "silu", "gelu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IMAGE = (3, 6, 4, 5)


def _frozen(*args):
    return normkit.BatchNorm(*args).freeze()


FAMILIES = {
    "batch norm of rows": (lambda: normkit.BatchNorm1d(6), (5, 6)),
    "batch norm of signals": (lambda: normkit.BatchNorm1d(6), (3, 6, 7)),
    "batch norm of images": (lambda: normkit.BatchNorm2d(6), IMAGE),
    "batch norm of volumes": (lambda: normkit.BatchNorm3d(6), (2, 6, 2, 3, 2)),
    "batch norm without affine": (lambda: normkit.BatchNorm(6, affine=False), IMAGE),
    "batch norm without running": (
        lambda: normkit.BatchNorm(6, track_running_stats=False),
        IMAGE,
    ),
    "batch norm, frozen": (lambda: _frozen(6), IMAGE),
    "frozen batch norm": (lambda: normkit.FrozenBatchNorm(6), IMAGE),
    "instance norm": (lambda: normkit.InstanceNorm2d(6, affine=True), IMAGE),
    "instance norm without affine": (lambda: normkit.InstanceNorm(6), (3, 6, 7)),
    "group norm": (lambda: normkit.GroupNorm(3, 6), IMAGE),
    "group norm of rows": (lambda: normkit.GroupNorm(2, 6), (3, 6)),
    "layer norm": (lambda: normkit.LayerNorm(8), (4, 3, 8)),
    "layer norm over two axes": (lambda: normkit.LayerNorm((3, 8), bias=False), (4, 3, 8)),
    "layer norm of channels": (lambda: normkit.LayerNorm(6, channels_first=True), IMAGE),
    "layer norm without affine": (
        lambda: normkit.LayerNorm(8, elementwise_affine=False),
        (4, 8),
    ),
    "RMS norm": (lambda: normkit.RMSNorm(8), (4, 3, 8)),
    "RMS norm, zero-centred": (
        lambda: normkit.RMSNorm(8, zero_centered_weight=True, eps=1e-6),
        (4, 8),
    ),
    "RMS norm of channels": (lambda: normkit.RMSNorm(6, channels_first=True), IMAGE),
}


def _made(family, dtype=torch.float32):
    make, shape = FAMILIES[family]
    layer = make()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    return layer.to(dtype), torch.randn(shape).to(dtype)


def _second(layer):
    """The name of what the layer takes beside its input."""
    return "add" if isinstance(layer, (normkit.LayerNorm, normkit.RMSNorm)) else "residual"


def _bits(tensor):
    if tensor is None:
        return None
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.stride(), tensor.detach().view(integers[tensor.element_size()]).tolist()


def _results(y):
    return y if isinstance(y, tuple) else (y,)


def _outcome(layer, inputs, wanted, second=False):
    """Everything that a call leaves behind, as bits."""
    ys = _results(layer(**inputs))
    found = [*ys]
    if wanted:
        dys = [torch.linspace(-1, 2, y.numel()).to(y.dtype).view(y.shape) for y in ys]
        leaves = [t for t in (*inputs.values(), *layer.parameters()) if t.requires_grad]
        gradients = torch.autograd.grad(ys, leaves, dys, create_graph=second)
        found += gradients
        curved = [g.square().sum() for g in gradients if g.requires_grad]
        if curved:
            found += torch.autograd.grad(sum(curved), leaves, allow_unused=True)
    return [_bits(t) for t in (*found, *layer.buffers())]


def _taken(call):
    """What the call gives, and how many calls the extension took."""
    before = eager.calls.taken()
    result = call()
    return result, eager.calls.taken() - before


def _same(layer, inputs, wanted=True, second=False, taken=1):
    """The layer on both paths, as bits."""
    other = copy.deepcopy(layer)
    found, count = _taken(lambda: _outcome(layer, inputs, wanted, second))
    assert count == taken
    with backend.watch():
        expected, count = _taken(lambda: _outcome(other, inputs, wanted, second))
    assert count == 0
    assert found == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_as_python(family, dtype):
    layer, x = _made(family, dtype)
    for act, training, wanted, beside in itertools.product(ACTS, *[(True, False)] * 3):
        layer.act = act
        inputs = {"input": x.clone().requires_grad_(wanted)}
        if beside:
            inputs[_second(layer)] = torch.randn_like(x).requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            _same(layer.train(training), inputs, wanted)


@pytest.mark.parametrize("family", [f for f, (_, shape) in FAMILIES.items() if shape == IMAGE])
def test_channels_last_has_the_same_bits(family):
    layer, x = _made(family)
    x = x.contiguous(memory_format=torch.channels_last)
    for act, training in itertools.product((None, "relu", "gelu"), (True, False)):
        layer.act = act
        inputs = {"input": x.requires_grad_(), _second(layer): torch.randn_like(x).requires_grad_()}
        _same(layer.train(training), inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_layouts_are_copied_alike(family):
    layer, x = _made(family)
    strided = torch.empty((*x.shape[:-1], 2 * x.shape[-1]))[..., ::2].copy_(x)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (strided, turned):
        for wanted, beside in itertools.product((True, False), (x, turned)):
            inputs = {"input": other.detach().requires_grad_(wanted)}
            inputs[_second(layer)] = beside.detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                _same(layer, inputs, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivatives_have_the_same_bits(family):
    layer, x = _made(family, torch.float64)
    for act, training in itertools.product((None, "relu", "silu"), (True, False)):
        layer.act = act
        beside = torch.randn_like(x).requires_grad_()
        _same(layer.train(training), {"input": x.requires_grad_()}, second=True)
        inputs = {"input": x, _second(layer): beside}
        _same(layer, inputs, second=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_of_another_dtype(dtype):
    for family in ("batch norm of images", "group norm", "layer norm", "RMS norm, zero-centred"):
        layer, x = _made(family, torch.float32)
        _same(layer.to(torch.float64), {"input": x.to(dtype).requires_grad_()})


def _calls(x, rows):
    w, b = torch.rand(6).requires_grad_(), torch.rand(6).requires_grad_()
    v, c = torch.rand(8).requires_grad_(), torch.rand(8)
    mean, var, batches = torch.randn(6), torch.rand(6), torch.tensor(0)
    return {
        "batch norm by the batch": lambda: F.batch_norm(
            x, mean, var, w, b, True, num_batches_tracked=batches, act="relu"
        ),
        "batch norm by running statistics": lambda: F.batch_norm(x, mean, var, w, b),
        "batch norm of no state": lambda: F.batch_norm(x, training=True, residual=x),
        "instance norm": lambda: F.instance_norm(x, None, None, w, b),
        "instance norm by running statistics": lambda: F.instance_norm(
            x, mean, var, use_input_stats=False
        ),
        "group norm": lambda: F.group_norm(x, 3, w, b, act="gelu"),
        "layer norm": lambda: F.layer_norm(rows, (8,), v, c, act="silu"),
        "layer norm by an integer": lambda: F.layer_norm(rows, 8),
        "layer norm by a list": lambda: F.layer_norm(rows, [3, 8]),
        "layer norm of channels": lambda: F.layer_norm(x, 6, w, b, channels_first=True),
        "layer norm of a sum": lambda: F.layer_norm(rows, 8, v, add=2 * rows)[1],
        "RMS norm": lambda: F.rms_norm(rows, 8, v, bias=c),
        "RMS norm, zero-centred": lambda: F.rms_norm(rows, 8, v, zero_centered_weight=True),
    }


@pytest.mark.parametrize("name", _calls(torch.empty(0), torch.empty(0)))
def test_functions_are_taken_too(name):
    x, rows = torch.randn(IMAGE).requires_grad_(), torch.randn(4, 3, 8).requires_grad_()
    torch.manual_seed(1)
    found, count = _taken(_calls(x, rows)[name])
    assert count == 1
    torch.manual_seed(1)
    with backend.watch():
        expected, count = _taken(_calls(x, rows)[name])
    assert count == 0
    assert _bits(found) == _bits(expected)
    leaf = rows if found.shape == rows.shape else x
    ours, theirs = (torch.autograd.grad(y.square().sum(), leaf)[0] for y in (found, expected))
    assert _bits(ours) == _bits(theirs)


class _Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class _FunctionMode(torch.overrides.TorchFunctionMode):
    def __init__(self):
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class _DispatchMode(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    pass


def _inside(context):
    def run(layer, x):
        with context():
            return layer(x)

    return run


def _forward_mode(layer, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent


def _functional_call(layer, x):
    state = dict(layer.named_parameters()) | {k: b.clone() for k, b in layer.named_buffers()}
    return normkit.functional_call(layer, state, (x,))


def _checkpointed(reentrant):
    def run(layer, x):
        x = x.clone().requires_grad_()
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        return x.grad

    return run


def _fake(layer, x):
    with torch._subclasses.FakeTensorMode():
        return normkit.GroupNorm(2, 6)(torch.randn(IMAGE))


REFUSED = {
    "vmap": lambda layer, x: torch.vmap(layer)(x[None]),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    "forward mode": _forward_mode,
    "a dispatch mode": _inside(_DispatchMode),
    "a subclass": lambda layer, x: layer(x.as_subclass(_Subclass)),
    "hooks on saved tensors": _inside(
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    ),
    "a reentrant checkpoint": _checkpointed(True),
    "another checkpoint": _checkpointed(False),
    "functional_call": _functional_call,
    "the meta device": lambda layer, x: layer.to("meta")(x.to("meta")),
    "a mask": lambda layer, x: layer(x, mask=x.amax(1, keepdim=True) < 9),
    "a weight a sample": lambda layer, x: layer(x, weight=torch.rand(len(x), 6)),
    "no samples": lambda layer, x: layer(x[:0]),
    "explain": lambda layer, x: normkit.explain(layer, x),
    "compilation": lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True)(x),
    "export": lambda layer, x: torch.export.export(layer, (x,)),
    "fx": lambda layer, x: torch.fx.symbolic_trace(layer),
    "fake tensors": _fake,
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_layer_that_gives_channels_last_is_taken(memory_format):
    layer = normkit.LayerNorm(6, channels_first=True, memory_format=torch.channels_last)
    x = torch.randn(IMAGE).contiguous(memory_format=memory_format).requires_grad_()
    y, count = _taken(lambda: layer(x))
    assert count == 1
    with backend.watch():
        expected, count = _taken(lambda: layer(x))
    assert count == 0
    assert _bits(y) == _bits(expected)
    assert y.stride() == expected.stride()
    ours, theirs = (torch.autograd.grad(z.square().sum(), x)[0] for z in (y, expected))
    assert _bits(ours) == _bits(theirs)


def test_a_function_mode_sees_the_function_before_the_extension_takes_it():
    layer, x = normkit.GroupNorm(2, 6), torch.randn(IMAGE)
    with _FunctionMode() as mode:
        y, count = _taken(lambda: layer(x))
    assert F.group_norm in mode.seen
    assert count == 1
    assert torch.equal(y, layer(x))


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_ordinary_goes_python_s_path(why):
    for layer in (normkit.BatchNorm2d(6).eval(), normkit.GroupNorm(2, 6)):
        x = torch.randn(IMAGE)
        _, count = _taken(lambda layer=layer, x=x: REFUSED[why](layer, x))
        assert count == 0
        with torch.no_grad():
            if "meta" not in why:
                assert _taken(lambda layer=layer, x=x: layer(x))[1] == 1


def test_variants_of_batch_norm_are_taken_in_evaluation_alone():
    x = torch.randn(IMAGE)
    layers = (normkit.GhostBatchNorm(6, 2), normkit.BatchRenorm(6), normkit.BatchNorm(6))
    layers[2].accumulate(2)
    for layer in layers:
        _same(layer.train(), {"input": x.requires_grad_()}, taken=0)
        _same(layer.eval(), {"input": x.requires_grad_()})
    average = normkit.BatchNorm(6, momentum=None)
    _same(average, {"input": x}, taken=0)
    _same(average.eval(), {"input": x})
    tracked = normkit.InstanceNorm2d(6, track_running_stats=True)
    _same(tracked, {"input": x}, taken=0)
    _same(tracked.eval(), {"input": x})


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_settings_that_say_little_to_autograd_are_taken():
    layer, x = _made("batch norm of images")
    for context in (
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.autograd.detect_anomaly,
        torch._C.DisableTorchFunction,
    ):
        for training in (True, False):
            with context():
                _same(layer.train(training), {"input": x}, wanted=False)
    with torch.inference_mode():
        y = layer(x)
        assert y.is_inference()
        inference, inner = copy.deepcopy(layer).train(), x.clone()
        _same(inference, {"input": inner}, wanted=False)


def test_changes_after_a_first_call_count():
    x = torch.randn(IMAGE).requires_grad_()
    layer = normkit.BatchNorm(6)

    def change(name, value, taken=1):
        setattr(layer, name, value)
        _same(layer, {"input": x}, taken=taken)

    _same(layer, {"input": x})
    change("eps", 0.5)
    change("momentum", 0.7)
    change("momentum", 1, taken=0)
    change("momentum", 0.2)
    change("act", "relu")
    change("training", False)
    change("training", True)
    change("track_running_stats", False)
    change("track_running_stats", True)
    _same(layer.freeze(), {"input": x})
    _same(layer.unfreeze(), {"input": x})
    _same(layer.accumulate(2), {"input": x}, taken=0)
    _same(layer.accumulate(1), {"input": x})
    change("weight", nn.Parameter(torch.rand(6)))
    change("bias", None)
    change("weight", None)
    change("running_mean", torch.rand(6))
    change("num_batches_tracked", None)
    change("running_var", torch.rand(12)[::2], taken=0)
    change("running_var", torch.rand(6))
    layer.running_mean = layer.running_var = None
    _same(layer, {"input": x})
    layer = normkit.BatchNorm(6)
    hook = layer.register_forward_hook(lambda module, inputs, y: 2 * y)
    _same(layer, {"input": x})
    hook.remove()
    _same(layer.double(), {"input": x.detach()})
    nn.utils.parametrize.register_parametrization(layer, "weight", _Scaled())
    _same(layer, {"input": x}, taken=1)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    _same(layer, {"input": x})
    rows = normkit.LayerNorm(5)
    for name, value in (("eps", 0.1), ("act", "gelu"), ("weight", None), ("bias", None)):
        setattr(rows, name, value)
        _same(rows, {"input": x})


def test_synchronized_layers_wait_in_python_and_only_in_training():
    layer = normkit.BatchNorm(6).synchronize()
    x = torch.randn(IMAGE)
    with pytest.warns(RuntimeWarning, match="no process group") if _says_alone() else nullcontext():
        assert _taken(lambda: layer(x))[1] == 0
    assert _taken(lambda: layer.eval()(x))[1] == 1
    assert _taken(lambda: layer.desynchronize().train()(x))[1] == 1


def _says_alone():
    return normkit.runtime.sync._say_alone.cache_info().currsize == 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (normkit.BatchNorm2d(6), (3, 5, 4, 5)),
        (normkit.BatchNorm1d(6), (1, 6)),
        (normkit.BatchNorm2d(6), (3, 6, 4)),
        (normkit.InstanceNorm2d(6), (3, 6, 1, 1)),
        (normkit.GroupNorm(2, 6), (3, 5)),
        (normkit.LayerNorm(8), (3, 7)),
        (normkit.RMSNorm(6, channels_first=True), (6,)),
    ],
    ids=lambda value: str(value),
)
def test_errors_are_those_of_python(layer, shape):
    x = torch.randn(shape)
    before = eager.calls.taken()
    named = type(layer).__name__
    with pytest.raises(ValueError, match=named) as found:
        layer(x)
    assert eager.calls.taken() == before
    with backend.watch(), pytest.raises(ValueError, match=named) as expected:
        layer(x)
    assert str(found.value) == str(expected.value)
    assert str(layer) in str(found.value)


def test_versions_move_with_running_statistics():
    layer, x = normkit.BatchNorm2d(6), torch.randn(IMAGE)
    before = [b._version for b in layer.buffers()]
    layer(x)
    after = [b._version for b in layer.buffers()]
    assert after == [version + 1 for version in before]
    with backend.watch():
        layer(x)
    assert [b._version for b in layer.buffers()] == [version + 1 for version in after]


def test_a_backward_tells_what_was_changed_or_freed():
    layer, x = normkit.LayerNorm(8), torch.randn(4, 8).requires_grad_()
    inner = 2 * x
    y = layer(inner)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = layer(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    layer = normkit.BatchNorm(8, act="relu")
    y = layer(x, residual=torch.randn(4, 8))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_one_of_two_results_may_have_no_gradient():
    layer, x = normkit.RMSNorm(8), torch.randn(4, 8).requires_grad_()
    add = torch.randn(4, 8).requires_grad_()
    for one in (0, 1):
        found = torch.autograd.grad(layer(x, add=add)[one].square().sum(), (x, add))
        with backend.watch():
            expected = torch.autograd.grad(layer(x, add=add)[one].square().sum(), (x, add))
        assert [_bits(t) for t in found] == [_bits(t) for t in expected]


def test_many_gradients_at_once_and_odd_ones():
    layer, x = normkit.BatchNorm(6, act="relu"), torch.randn(IMAGE).requires_grad_()

    def gradients(y):
        many = torch.randn(2, *IMAGE, generator=torch.Generator().manual_seed(0))
        odd = torch.randn(IMAGE[::-1], generator=torch.Generator().manual_seed(0)).permute(
            3, 2, 1, 0
        )
        return (
            *torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True),
            *torch.autograd.grad(y, x, odd, retain_graph=True),
            *torch.autograd.grad(y.sum(), x, retain_graph=True),
            *torch.autograd.grad(y, x, many[0].as_subclass(_Subclass)),
        )

    found, count = _taken(lambda: gradients(layer(x)))
    assert count == 1
    with backend.watch():
        expected = gradients(layer(x))
    assert [_bits(t) for t in found] == [_bits(t) for t in expected]


def test_an_error_in_a_differentiated_backward_reaches_the_caller(monkeypatch):
    layer, x = normkit.LayerNorm(8), torch.randn(4, 8).requires_grad_()
    y = layer(x)

    def fail(*args):
        raise ArithmeticError("said in the backward")

    monkeypatch.setattr(backend.reference, "normalize_backward", fail)
    with pytest.raises(ArithmeticError, match="said in the backward"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_autograd_traces_the_formula():
    layer, x = normkit.LayerNorm(8, act="gelu"), torch.randn(4, 8)
    compiled = torch.compile(backend="eager")
    for beside in ({}, {"add": torch.randn(4, 8)}):
        leaf = x.clone().requires_grad_()
        y = _results(layer(leaf, **beside))[0]
        with torch._dynamo.compiled_autograd._enable(compiled):
            y.square().sum().backward()
        other = x.clone().requires_grad_()
        with backend.watch():
            y = _results(layer(other, **beside))[0]
        y.square().sum().backward()
        torch.testing.assert_close(leaf.grad, other.grad)


def test_threads_share_a_layer():
    layer, x = normkit.LayerNorm(64, act="silu"), torch.randn(32, 64)
    expected, failed = layer(x), []

    def work():
        for _ in range(100):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.sum().backward()
            if not torch.equal(y, expected):
                failed.append(y)

    threads = [threading.Thread(target=work) for _ in range(3)]
    _, count = _taken(lambda: [t.start() for t in threads] and [t.join() for t in threads])
    assert not failed
    assert count == 300


def test_copies_and_pickles_hold_nothing_of_it():
    layer, x = _made("batch norm of images")
    layer(x)
    assert set(vars(layer)) == set(vars(normkit.BatchNorm2d(6)))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.eval()(x), layer.eval()(x))


def test_the_profiler_sees_the_operators():
    layer, x = normkit.LayerNorm(8), torch.randn(4, 8).requires_grad_()
    with torch.profiler.profile() as profile:
        layer(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"normkit::normalize", "normkit::normalize_backward", "NormalizeBackward"} <= names


def test_an_extension_of_another_torch_is_said_and_not_loaded(monkeypatch):
    monkeypatch.setattr(eager, "_FILE", "_eager.torch-0.so")
    assert "built for another torch or Python (_eager.torch-" in eager._load()
    monkeypatch.setenv("NORMKIT_NO_EAGER", "1")
    assert eager._load() == "switched off by NORMKIT_NO_EAGER=1"
    assert "eager calls" in normkit.info()
