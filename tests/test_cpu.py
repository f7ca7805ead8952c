"""The C++ core: the same bits however it runs, right on every instruction set; safe on any call."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import normkit
from normkit import backend
from normkit import functional as F
from normkit.backend import cpu, reference
from normkit.formula.pool import BATCH, last
from normkit.formula.spec import Inputs, Spec

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))

INSTRUCTIONS = ("avx512_bf16", "avx512", "avx2", "portable")

# (layer, shape, layout): long and short runs, pools fewer and more than threads, odd sizes.
CASES = [
    (lambda: normkit.BatchNorm(3), (5, 3, 61, 59), "contiguous"),
    (lambda: normkit.BatchNorm(70, act="relu"), (9, 70, 7, 7), "contiguous"),
    (lambda: normkit.BatchNorm(70, act="silu"), (9, 70, 17, 7), "channels_last"),
    (lambda: normkit.BatchNorm(33), (65, 33, 5), "contiguous"),
    (lambda: normkit.BatchNorm(100), (700, 100), "contiguous"),
    (lambda: normkit.InstanceNorm2d(3, affine=True), (1, 3, 130, 131), "contiguous"),
    (lambda: normkit.InstanceNorm2d(40, affine=True), (6, 40, 19, 11), "channels_last"),
    (lambda: normkit.GroupNorm(4, 36), (2, 36, 21, 13), "contiguous"),
    (lambda: normkit.GroupNorm(4, 36, act="gelu"), (5, 36, 21, 13), "channels_last"),
    (lambda: normkit.GroupNorm(5, 35), (1100, 35), "contiguous"),
    (lambda: normkit.LayerNorm(37, channels_first=True), (3, 37, 23, 11), "contiguous"),
    (lambda: normkit.LayerNorm(37, channels_first=True), (3, 37, 23, 11), "channels_last"),
    (lambda: normkit.LayerNorm(129), (701, 129), "contiguous"),
    (lambda: normkit.LayerNorm(70_001), (2, 70_001), "contiguous"),
    (lambda: normkit.RMSNorm(129, act="leaky_relu"), (701, 129), "contiguous"),
    (lambda: normkit.GhostBatchNorm(20, 4), (12, 20, 9, 9), "contiguous"),
]


def run(case, dtype=torch.float32, masked=False):
    """y, the gradients and the running statistics of a training step."""
    make, shape, layout = case
    torch.manual_seed(1)
    layer = make().to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) + 0.5)
    x = (torch.randn(shape) * 3 + 5).to(dtype)
    dy = torch.randn(shape).to(dtype)
    if layout == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    mask = torch.rand(shape) < 0.7 if masked else None
    x.requires_grad_()
    y = layer(x, mask=mask)
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    return [t.detach() for t in (y, *gradients, *layer.buffers())]


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_bit_is_the_same_on_any_number_of_threads(case, dtype, masked):
    torch.set_num_threads(1)
    alone = run(CASES[case], dtype, masked)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for one, many in zip(alone, run(CASES[case], dtype, masked), strict=True):
            assert torch.equal(one, many)
            assert one.stride() == many.stride()


@pytest.mark.parametrize(
    "case", [c for c in range(len(CASES)) if "Batch" not in str(type(CASES[c][0]()))]
)
def test_a_sample_of_a_row_norm_does_not_depend_on_the_others(case):
    make, shape, layout = CASES[case]
    layer = make()
    x, dy = torch.randn(2, *shape)
    if layout == "channels_last":
        x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    x.requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    last = slice(shape[0] - 1, shape[0])
    alone = x[last].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y_alone = layer(alone)
    (dx_alone,) = torch.autograd.grad(y_alone, alone, dy[last].clone())
    assert torch.equal(y[last], y_alone)
    assert torch.equal(dx[last], dx_alone)


FACTORS = torch.tensor([1.0, 1 + 2.0**-8, -(2.0**-60), 2.0**-140, 3e38])


def every_bfloat16(axis):
    """Every value of bfloat16 times some factors, rounded by a kernel that runs along `axis`."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = x.expand(5, -1).T.contiguous() if axis == 0 else x.expand(1, 5, -1).contiguous()
    zero, one = torch.zeros(5), torch.ones(5)
    return x, normkit.functional.batch_norm(x, zero, one, FACTORS, zero, eps=0.0)


@pytest.mark.parametrize("axis", [0, -1])
def test_rounding_to_bfloat16_is_torchs(axis):
    """Subnormal results, ties, infinities and NaN among them."""
    x, y = every_bfloat16(axis)
    expected = (x.float() * (FACTORS if axis == 0 else FACTORS[:, None])).bfloat16()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert (y.isnan() == x.isnan()).all()
    assert ((y != 0) & (y.abs() < torch.finfo(torch.bfloat16).smallest_normal)).sum() > 1000


def test_avx2_and_avx512_give_the_same_bits():
    """Each in a process of its own, since the choice is made once."""
    script = (
        "import hashlib, json, sys; sys.path.insert(0, sys.argv[1]); import torch, test_cpu\n"
        "from normkit.backend import cpu\n"
        "digests = [hashlib.sha256(b''.join(t.float().numpy().tobytes() for t in "
        "test_cpu.run(case, dtype))).hexdigest() for case in test_cpu.CASES "
        "for dtype in (torch.float32, torch.bfloat16, torch.float16)]\n"
        "digests += [hashlib.sha256(test_cpu.every_bfloat16(axis)[1].view(torch.int16).numpy()"
        ".tobytes()).hexdigest() for axis in (0, -1)]\n"
        "print(json.dumps([cpu.instructions(), digests]))"
    )
    ran = {}
    for wanted in INSTRUCTIONS[:-1]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script, str(Path(__file__).parent)],
            env=os.environ | {"NORMKIT_CPU": wanted},
            capture_output=True,
            text=True,
        )
        if f"NORMKIT_CPU={wanted}: this processor and build offer" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        name, ran[wanted] = json.loads(done.stdout)
        assert name == wanted
    if len(ran) < 2:
        pytest.skip(f"this processor has no two of them: {', '.join(ran) or 'none'}")
    first = next(iter(ran.values()))
    assert all(digests == first for digests in ran.values())


@pytest.mark.parametrize("wanted", INSTRUCTIONS)
def test_every_instruction_set_passes_the_oracle(wanted):
    if cpu.instructions() == wanted:
        return  # what test_oracle itself ran on
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider"),
            Path(__file__).parent / "test_oracle.py",
        ],
        env=os.environ | {"NORMKIT_CPU": wanted},
        capture_output=True,
        text=True,
    )
    if f"NORMKIT_CPU={wanted}: this processor and build offer" in done.stdout:
        pytest.skip(f"this processor has no {wanted}")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


# The first is 9 MB of runs that don't begin at whole vectors, the others are all aligned.
@pytest.mark.parametrize(
    ("shape", "layout", "dtype"),
    [
        ((8, 64, 67, 67), "contiguous", torch.float32),
        ((8, 64, 64, 72), "contiguous", torch.float32),
        ((8, 96, 64, 64), "channels_last", torch.float32),
        ((16, 64, 64, 72), "contiguous", torch.bfloat16),
        ((8, 64, 64, 72), "contiguous", torch.float64),
    ],
    ids=str,
)
def test_large_outputs_are_written_whole(shape, layout, dtype):
    x, dy, z = (torch.randn(shape).to(dtype) for _ in range(3))
    if layout == "channels_last":
        x, dy, z = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy, z))
    spec = Spec(BATCH, 1e-5, act="relu")
    weight, bias = torch.rand(2, shape[1])
    inputs = Inputs(x, weight, bias, z)
    wide = Inputs(x.double(), weight.double(), bias.double(), z.double())
    close = (
        {"rtol": 0.01, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    )
    (y, mean, rstd, *_), expected = cpu.normalize(spec, inputs), reference.normalize(spec, wide)
    torch.testing.assert_close(y.double(), expected.y, **close)
    # By the output of the core's own, whose sign may differ from the wide one's at zero.
    own = inputs._replace(residual=None, output=y, mean=mean, rstd=rstd)
    theirs = wide._replace(residual=None, output=y.double(), mean=expected.mean, rstd=expected.rstd)
    found = cpu.normalize_backward(spec, own, dy)
    expected = reference.normalize_backward(spec, theirs, dy.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.02, atol=close["atol"] * 10)


@pytest.mark.parametrize(("shape", "most"), [((256, 64), 1e-6), ((64, 2048), 3e-7)], ids=str)
def test_a_block_that_begins_far_from_its_mean_is_as_exact(shape, most):
    """Without the second read the errors are 2e-5 and 2e-6."""
    down = shape[0] == 256
    x = torch.randn(shape)
    x[(slice(8),) if down else (slice(None), slice(256))] += 1e4
    _, _, var = cpu.moments(Spec(BATCH if down else last(1), 1e-5), Inputs(x)).unbind()
    exact = x.double().var(0 if down else 1, unbiased=False)
    assert float((var / exact - 1).abs().max()) < most


def test_without_the_extension_the_reference_serves_and_says_so_once():
    script = (
        "import warnings, torch, normkit\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    layer = normkit.LayerNorm(4)\n"
        "    y = layer(torch.randn(2, 4)); layer(torch.randn(2, 4))\n"
        "print(len(said), said[0].message, normkit.backends()['cpu'], float(y.mean().abs()) < 1e-6)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"NORMKIT_NO_EXTENSION": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("1 ")
    assert "switched off by NORMKIT_NO_EXTENSION=1" in done.stdout
    assert done.stdout.strip().endswith("True")


def test_what_fits_the_core_runs_on_it():
    for layer, shape in ((normkit.BatchNorm2d(4), (2, 4, 3, 3)), (normkit.RMSNorm(4), (5, 4))):
        assert "runs on: cpu" in normkit.explain(layer, torch.randn(shape))
    conditional = normkit.explain(
        normkit.GroupNorm(2, 4), torch.randn(2, 4, 3), weight=torch.ones(2, 4)
    )
    assert "runs on: reference" in conditional
    assert "cpu: weight or bias is given per sample" in conditional


SAVED = {
    "plain": (lambda: normkit.BatchNorm(16), False, 1),
    "relu": (lambda: normkit.BatchNorm(16, act="relu"), False, 1),
    "add+relu": (lambda: normkit.BatchNorm(16, act="relu"), True, 2),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_the_backward_saves(name):
    make, residual, whole = SAVED[name]
    x = torch.randn(4, 16, 9, 9, requires_grad=True)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = make()(x, residual=torch.randn_like(x) if residual else None)
    large = {t.data_ptr() for t in saved if t.numel() == x.numel()}
    assert len(large) == whole
    assert large == ({x.data_ptr()} if whole == 1 else {x.data_ptr(), y.data_ptr()})


# ---- calls of the operators themselves, however wrong

sizes = st.lists(st.integers(0, 5), min_size=0, max_size=5)
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)


@st.composite
def tensors(draw, like=None):
    if like is not None and draw(st.booleans()):
        shape, dtype = like
    else:
        shape, dtype = tuple(draw(sizes)), draw(dtypes)
    kind = draw(st.sampled_from(["dense", "permuted", "expanded", "sliced", "huge", "empty"]))
    if kind == "empty":
        return torch.empty(draw(st.permutations((0, 2**64 // 3 + 1))), dtype=dtype)
    base = torch.ones(shape, dtype=dtype)
    if kind == "permuted" and base.dim() > 1:
        order = draw(st.permutations(range(base.dim())))
        return base.permute(order)
    if kind == "expanded" and base.dim():
        return torch.ones((), dtype=dtype).expand(shape)
    if kind == "sliced" and base.dim() and shape[-1] < 9:
        return torch.ones((*shape[:-1], shape[-1] * 2), dtype=dtype)[..., ::2]
    if kind == "huge" and base.dim() and base.numel() == 0:
        return base.as_strided(shape, [2**40] * base.dim())
    return base


def called(operator, *arguments):
    """What it returns, or None where it refuses the call in its own words."""
    try:
        return operator(*arguments)
    except RuntimeError as error:
        if operator._qualified_op_name not in str(error):
            raise
        return None


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_call_is_out_of_bounds(data):
    """Right or refused: with all inputs 1, whatever comes back is finite and of x's shape."""
    x = data.draw(tensors())
    like = (tuple(x.shape), x.dtype)
    channels = x.shape[1] if x.dim() > 1 and x.shape[1] < 2**30 else 0
    small = st.one_of(st.none(), tensors((((channels,)), torch.float32)))
    same = st.one_of(st.none(), tensors(like))
    mask = st.one_of(st.none(), tensors((tuple(x.shape), torch.bool)))
    constants = (
        data.draw(st.integers(-1, 4)),
        data.draw(st.integers(-2, 6)),
        data.draw(st.integers(-1, 6)),
        data.draw(st.sampled_from([1e-5, 1.0, -1.0, float("nan")])),
        data.draw(st.booleans()),
        data.draw(st.integers(-1, 5)),
    )
    weight, bias, residual, masked = map(data.draw, (small, small, same, mask))
    given_mean, given_var = data.draw(small), data.draw(small)
    done = called(
        torch.ops.normkit.normalize,
        *(x, weight, bias, residual, masked, given_mean, given_var, *constants),
    )
    if done is None:
        mean, rstd = data.draw(tensors()), data.draw(tensors())
    else:
        y, mean, rstd, _ = done
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert y.isfinite().all()
    alone = called(
        torch.ops.normkit.output,
        *(x, weight, bias, residual, masked, given_mean, given_var, *constants),
    )
    assert (alone is None) == (done is None)
    assert alone is None or torch.equal(alone, done[0])
    dy, output = data.draw(tensors(like)), data.draw(same)
    backward = (dy, x, weight, bias, residual, output, masked, mean, rstd)
    pools = st.one_of(st.none(), tensors((tuple(mean.shape), torch.float64)))
    done = called(
        torch.ops.normkit.normalize_backward,
        *(*backward, data.draw(pools), data.draw(pools), data.draw(same)),
        *(*constants, data.draw(st.booleans()), data.draw(st.booleans())),
    )
    assert done is None or done[0].shape == x.shape
    done = called(torch.ops.normkit.sums, *backward, *constants)
    assert done is None or tuple(done.shape) == (2, x.shape[1])
    done = called(torch.ops.normkit.moments, x, masked, *constants)
    assert done is None or (len(done) == 3 and done.isfinite().all())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_move_is_out_of_bounds(data):
    averages = st.one_of(tensors(((3,), torch.float32)), tensors())
    counter = st.one_of(st.none(), tensors(((), torch.int64)))
    batches = data.draw(counter)
    moving = [data.draw(averages) for _ in range(4)]
    before = [t.clone() for t in moving]
    count = None if batches is None else batches.clone()
    called(torch.ops.normkit.move, *moving[:2], batches, *moving[2:], 0.25, 1.0)
    for now, then in zip(moving, before, strict=True):
        assert torch.equal(now, then)  # all ones: so they stay
    assert count is None or torch.equal(batches, count) or torch.equal(batches, count + 1)


def test_statistics_and_counters_of_any_kind_are_taken():
    """Running statistics that lie apart in memory, and a counter that isn't an integer."""
    x, apart = torch.randn(4, 6), torch.rand(6, 2)
    expected = nn.functional.batch_norm(x, apart[:, 0], apart[:, 1])
    torch.testing.assert_close(F.batch_norm(x, apart[:, 0], apart[:, 1]), expected)
    layer = normkit.BatchNorm(6)
    layer.num_batches_tracked = layer.num_batches_tracked.float()
    layer(x)
    assert layer.num_batches_tracked == 1


def test_what_is_copied_is_copied_once():
    """x in a layout that no kernel knows: one copy of it for the forward and the backward."""
    x = torch.randn(5, 6, 7).permute(2, 1, 0).requires_grad_()
    layer = normkit.BatchNorm(6)
    dy = torch.randn(7, 6, 5)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(layer(x), x, dy)
    copies = [event.count for event in profile.key_averages() if event.key == "aten::clone"]
    assert copies == [1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_many_gradients_at_once(layout):
    x = torch.randn(4, 6, 5, 3).contiguous(memory_format=layout).requires_grad_()
    y = normkit.BatchNorm(6, act="relu")(x, residual=torch.randn(4, 6, 5, 3))
    dys = torch.randn(3, *y.shape)
    (together,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize("make", [lambda: normkit.BatchNorm(2), lambda: normkit.LayerNorm(49)])
def test_lanes_beyond_a_run_do_not_count(make):
    """A constant pool of 3e36, whose mean times rstd is beyond float32."""
    x = torch.full((4, 2, 49), 3e36, requires_grad=True)
    layer = make()
    gradients = torch.autograd.grad(layer(x), [x, *layer.parameters()], torch.randn(4, 2, 49))
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_running_averages_move_in_place_and_say_so(dtype):
    mean, var, mean_of, var_of = (torch.rand(5).to(dtype) for _ in range(4))
    batches = torch.tensor(7)
    expected = (0.9 * mean.double() + 0.1 * mean_of.double()).to(dtype)
    expected_var = (0.9 * var.double() + 0.1 * 1.25 * var_of.double()).to(dtype)
    versions = [t._version for t in (mean, var, batches)]
    assert cpu.move(mean, var, batches, mean_of.double(), var_of, 0.1, 1.25)
    assert torch.equal(mean, expected)
    assert torch.equal(var, expected_var)
    assert batches == 8
    assert all(t._version > v for t, v in zip((mean, var, batches), versions, strict=True))
    assert not cpu.move(mean.to("meta"), var, None, mean_of, var_of, 0.1, 1.0)
    assert not cpu.move(torch.rand(5, 2).to(dtype)[:, 0], var, None, mean_of, var_of, 0.1, 1.0)


SPLIT = [
    (shape, layout, act, masked)
    for shape, layout in (
        ((5, 3, 61, 59), "contiguous"),
        ((9, 70, 7, 7), "contiguous"),
        ((9, 70, 17, 7), "channels_last"),
        ((65, 33, 5), "contiguous"),
        ((700, 100), "contiguous"),
        ((0, 4, 3), "contiguous"),
    )
    for act, masked in ((None, False), ("relu", False), ("silu", True))
]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "layout", "act", "masked"), SPLIT)
def test_the_split_verbs_are_the_fused_ones_to_the_bit_and_the_definition(
    shape, layout, act, masked, dtype, threads
):
    """moments and normalize, sums and gradient: normalize and normalize_backward in two steps."""
    torch.set_num_threads(threads)
    torch.manual_seed(2)
    x, dy, residual = ((torch.randn(shape) * 3 + 5).to(dtype) for _ in range(3))
    if layout == "channels_last":
        x, dy, residual = (
            t.contiguous(memory_format=torch.channels_last) for t in (x, dy, residual)
        )
    weight, bias = (torch.randn(shape[1]) for _ in range(2))
    mask = torch.rand(shape) < 0.7 if masked else None
    spec = Spec(BATCH, 1e-5, True, act)
    given = dataclasses.replace(spec, given=True)
    inputs = Inputs(x, weight, bias, residual, mask)
    y, mean, rstd, *_ = cpu.normalize(spec, inputs)
    n, *merged = cpu.moments(spec, inputs)
    again = cpu.normalize(given, inputs._replace(mean=merged[0], var=merged[1]))
    assert torch.equal(again.y, y)
    assert torch.equal(again.mean, mean)
    assert torch.equal(again.rstd, rstd)
    saved = inputs._replace(mean=mean, rstd=rstd)
    fused = cpu.normalize_backward(spec, saved, dy)
    sums, *parameters = cpu.sums(given, saved, dy)
    split = cpu.gradient(given, saved, dy, sums / n.clamp(min=1))
    # A channel of short runs is summed before it is weighted here, after it there.
    rounding = 1e-12 if dtype == torch.float64 else 0
    for one, other in zip(fused, (split.x, *parameters, split.residual), strict=True):
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)
    torch.testing.assert_close(
        torch.stack([n, *merged]), reference.moments(spec, inputs), rtol=1e-5, atol=1e-5
    )
    expected, *_ = reference.sums(given, saved, dy)
    scale = expected.abs().amax() if x.numel() else 1.0
    torch.testing.assert_close(sums / scale, expected / scale, rtol=0, atol=1e-5)
    means = sums / n.clamp(min=1)
    expected = reference.gradient(given, saved, dy, means)
    for one, other in ((split.x, expected.x), (split.residual, expected.residual)):
        torch.testing.assert_close(
            one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.ones(3)},
            r"normkit::normalize: weight must have 4 values, got shape \(3,\)",
        ),
        (
            {"x": torch.ones(2, 4, 6)[..., ::2]},
            r"x must be contiguous or channels_last, got strides",
        ),
        ({"residual": torch.ones(2, 4)}, r"residual must have x's shape \(2, 4, 3\), got \(2, 4\)"),
        ({"mask": torch.ones(2, 4, 3)}, r"mask must be Bool, got Float"),
        ({"x": torch.ones(2, 4, 3, dtype=torch.int32)}, r"x must be float32, bfloat16, float16"),
        ({"act": 9}, r"unknown act 9"),
        ({"act": -1}, r"unknown act -1"),
        (
            {"x": torch.empty(2**62, 0), "summed": 2, "groups": 2},
            r"at most 1099511627776 pools and channels, got shape \(4611686018427387904, 0\)",
        ),
        (
            {"x": torch.empty(0, 2**40), "groups": 2**40},
            r"at most 1099511627776 pools and channels, got shape \(0, 1099511627776\)",
        ),
        ({"summed": 4}, r"unknown pool 4"),
        ({"trailing": -1}, r"trailing must be at least 0, got -1"),
        ({"trailing": 1}, r"only pools over axis 1 .*, got 1 with pool ns"),
        ({"eps": -1.0}, r"eps must be finite and >= 0, got -1"),
        ({"summed": 2, "groups": 3}, r"groups must divide the 4 channels, got 3"),
        ({"mean": torch.zeros(4)}, r"mean and var go together"),
    ],
)
def test_a_wrong_call_says_what_was_expected_and_met(change, message):
    none = dict.fromkeys(("weight", "bias", "residual", "mask", "mean", "var"))
    constants = {"summed": 0, "groups": 0, "trailing": 0, "eps": 1e-5, "center": True, "act": 0}
    call = {"x": torch.ones(2, 4, 3)} | none | constants
    with pytest.raises(RuntimeError, match=message):
        torch.ops.normkit.normalize(**call | change)


@pytest.mark.parametrize("pool", ["batch", "row"])
def test_nan_and_inf_stay_where_they_are(pool):
    x = torch.randn(8, 6, 40)
    x[3, 2, 5], x[4, 4, 7] = float("nan"), float("inf")
    x.requires_grad_()
    layer = normkit.BatchNorm(6) if pool == "batch" else normkit.LayerNorm(40)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    hit = torch.zeros(8, 6, 40, dtype=torch.bool)
    if pool == "batch":
        hit[:, [2, 4]] = True
    else:
        hit[3, 2] = hit[4, 4] = True
    assert y[~hit].isfinite().all()
    assert dx[~hit].isfinite().all()
    assert not y[hit].isfinite().all()


@pytest.mark.parametrize(("table", "name"), [("_SUMMED", "ns"), ("_ACTS", "silu")])
def test_a_core_that_numbers_otherwise_is_refused(table, name, monkeypatch):
    monkeypatch.setitem(getattr(cpu, table), name, 7)
    with pytest.raises(RuntimeError, match=rf"{name}=7.*, got .*{name}=[03].*; build the core"):
        cpu.available.__wrapped__()


def test_the_choice_is_visible():
    assert list(backend.BACKENDS) == ["cpu", "triton", "reference"]
    assert cpu.instructions() in normkit.info()


COMPILED = {
    "batch, residual, relu": (lambda: normkit.BatchNorm(6, act="relu"), "residual"),
    "batch, silu, masked": (lambda: normkit.BatchNorm(6, act="silu"), "mask"),
    "group": (lambda: normkit.GroupNorm(2, 6), None),
    "instance": (lambda: normkit.InstanceNorm2d(6, affine=True), None),
    "layer over channels": (lambda: normkit.LayerNorm(6, channels_first=True), None),
    "rms, add": (lambda: normkit.RMSNorm(5), "add"),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_graph_keeps_the_operators(name):
    """In the forward and in the backward; so the bits are those of the layer itself."""
    make, more = COMPILED[name]
    layer, held = make(), []

    def collect(graph, _):
        held.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    call = torch.compile(
        layer, fullgraph=True, backend=aot_autograd(fw_compiler=collect, bw_compiler=collect)
    )
    x = torch.randn(4, 6, 7, 5, requires_grad=True)
    given = torch.rand_like(x) < 0.7 if more == "mask" else torch.randn_like(x)
    arguments = {} if more is None else {more: given}
    results = []
    for function in (call, copy.deepcopy(layer)):
        ys = function(x, **arguments)
        y = ys[0] + ys[1] if isinstance(ys, tuple) else ys
        wanted = [x, *function.parameters()]
        results.append([y, *torch.autograd.grad(y, wanted, torch.ones_like(y))])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert "normkit.normalize.default" in held
    assert "normkit.normalize_backward.default" in held
    held.clear()
    if isinstance(layer, normkit.BatchNorm):
        torch.compile(layer.eval(), fullgraph=True, backend=aot_autograd(fw_compiler=collect))(
            x.detach()
        )
        assert held
        assert not any("normkit" in target for target in held)
