"""The Triton kernels without a GPU: interpreted in a process of its own, and compiled."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from normkit.backend import reference, triton, triton_plan
from normkit.formula import pool
from normkit.formula.spec import Inputs, Spec

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.fixture
def device(request):
    """Where kernels run: on a GPU with `--device cuda`; else interpreted, in the process below."""
    wanted = request.config.getoption("--device")
    if wanted != triton.DEVICE:
        pytest.skip("runs in the process below")
    return wanted


on_kernels = pytest.mark.usefixtures("device")


@pytest.mark.timeout(1200)
def test_the_kernels_are_right_under_tritons_interpreter(request):
    """This file's interpreted tests, and the conformance tests that every backend passes."""
    if triton.interpreting() or request.config.getoption("--device") != "cpu":
        pytest.skip("this is that process")
    files = [str(HERE / f"test_{name}.py") for name in ("triton", "oracle", "masks", "gradients")]
    few = "batch-masked-leaky_relu or group-masked-leaky_relu or layer-masked-silu"
    chosen = f"triton and (not derivatives or {few})"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-k", chosen, "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.fixture(params=[False, True], ids=["launch table", "small tiles"])
def tiles(request, monkeypatch):
    """The committed table; and tiny tiles, so that small tensors are looped over and split."""
    if request.param:
        monkeypatch.setattr(triton_plan, "LARGEST", {"forward": 64, "backward": 64})
        limits = {"TILE": 64, "LOOPED": 256, "CHUNK": 128, "PROGRAMS": 8, "SMALL": 0, "MERGED": 4}
        for name, value in limits.items():
            monkeypatch.setattr(triton_plan, name, value)
    for cached in (triton_plan.geometry, triton_plan.launch):
        cached.cache_clear()
    yield
    for cached in (triton_plan.geometry, triton_plan.launch):
        cached.cache_clear()


# (pool, shape, given)
CALLS = [
    (pool.BATCH, (5, 6, 7, 3), False),
    (pool.BATCH, (3, 4, 10, 10), False),
    (pool.BATCH, (5, 6, 7, 3), True),
    (pool.BATCH, (50, 6), False),
    (pool.ghost(2), (4, 6, 7, 3), False),
    (pool.INSTANCE, (5, 6, 7, 3), False),
    (pool.group(2), (3, 6, 7, 3), False),
    (pool.group(4), (3, 8, 7, 3), False),
    (pool.group(3), (5, 6), False),
    (pool.CHANNELS, (3, 6, 7, 3), False),
    (pool.CHANNELS, (2, 150, 7, 1), False),
    (pool.last(1), (5, 4, 20), False),
    (pool.last(2), (3, 20, 25), False),
]
KINDS = [
    {"act": None, "masked": False},
    {"act": "silu", "masked": True},
    {"act": "relu", "masked": False, "residual": True},
]


@pytest.mark.usefixtures("device", "tiles")
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(f"{v}" for v in k.values()))
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("call", range(len(CALLS)))
def test_forward_and_backward_are_the_references(call, last, kind):
    norm, shape, given = CALLS[call]
    residual = kind.get("residual", False)
    if (last and len(shape) != 4) or (residual and norm.summed == "k"):
        pytest.skip("no such call")
    layout = torch.channels_last if last else torch.contiguous_format

    def random(*size):
        return torch.randn(size, dtype=torch.float64)

    x, dy, other = ((random(*shape) * 2 + 3).contiguous(memory_format=layout) for _ in range(3))
    entries = shape[-norm.trailing :] if norm.trailing else (shape[1],)
    mean, var = (random(*entries), random(*entries).square() + 0.1) if given else (None, None)
    mask = torch.rand(shape) < 0.7 if kind["masked"] else None
    spec = Spec(norm, 1e-5, True, kind["act"], given)
    inputs = Inputs(
        *(x, random(*entries), random(*entries), other if residual else None, mask, None, mean, var)
    )
    assert triton.why_not(spec, inputs) is None
    ours, theirs = triton.normalize(spec, inputs), reference.normalize(spec, inputs)
    for got, want in zip(ours[:4], theirs[:4], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert ours.y.stride() == x.stride()
    saved = inputs._replace(mean=ours.mean, var=None, rstd=ours.rstd)
    if residual:
        saved = saved._replace(residual=None, output=ours.y)
    gradients = triton.normalize_backward(spec, saved, dy)
    expected = reference.normalize_backward(spec, saved, dy)
    for got, want in zip(gradients[: 4 if residual else 3], expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("device", "tiles")
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(f"{v}" for v in k.values()))
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(5, 6, 7, 3), (3, 4, 10, 10)], ids=str)
def test_the_split_verbs_make_up_the_fused_pair(shape, last, kind):
    """Moments, apply, sums and gradient, with nothing merged in between, are batch norm."""
    layout = torch.channels_last if last else torch.contiguous_format
    x, dy, other = (
        torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout) * 2 + 3
        for _ in range(3)
    )
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64)
    mask = torch.rand(shape) < 0.7 if kind["masked"] else None
    residual = other if kind.get("residual") else None
    whole, given = (Spec(pool.BATCH, 1e-5, True, kind["act"], g) for g in (False, True))
    inputs = Inputs(x, weight, bias, residual, mask)
    n, mean, var = triton.moments(whole, inputs)
    counts = torch.ones(shape) if mask is None else mask
    assert torch.equal(n, counts.sum((0, 2, 3), dtype=torch.float64))
    y, _, rstd, *_ = triton.normalize(given, inputs._replace(mean=mean, var=var))
    expected = reference.normalize(whole, inputs)
    for got, wanted in zip((y, mean, rstd, var), expected[:4], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    saved = inputs._replace(mean=mean, rstd=rstd)
    if residual is not None:
        saved = saved._replace(residual=None, output=y)
    total, dweight, dbias = triton.sums(given, saved, dy)
    dx, _, _, dresidual = triton.gradient(given, saved, dy, total / n)
    expected = reference.normalize_backward(whole, saved, dy)
    gradients = (dx, dweight, dbias, dresidual)
    for got, wanted in zip(gradients[: 3 if residual is None else 4], expected, strict=False):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


# (spec, shape, channels_last), of every kind of unit
SOME = [
    (Spec(pool.BATCH, 1e-5, act="relu"), (6, 16, 6, 6), False),
    (Spec(pool.BATCH, 1e-5), (6, 16, 6, 6), True),
    (Spec(pool.INSTANCE, 1e-5), (3, 8, 5, 7), False),
    (Spec(pool.group(2), 1e-5), (3, 8, 5, 7), False),
    (Spec(pool.group(2), 1e-5, act="silu"), (3, 64, 3, 5), True),
    (Spec(pool.CHANNELS, 1e-5), (3, 24, 5, 3), False),
    (Spec(pool.last(1), 1e-5, act="gelu"), (33, 100), False),
    (Spec(pool.last(1), 1e-5, center=False), (33, 40), False),
]


def ran(spec, x, dy, weight=None, bias=None, module=triton):
    """y, dx, dweight and dbias."""
    inputs = Inputs(x, weight, bias if spec.center else None)
    y, mean, rstd, *_ = module.normalize(spec, inputs)
    saved = inputs._replace(mean=mean, rstd=rstd)
    dx, dweight, dbias, _ = module.normalize_backward(spec, saved, dy)
    return [t for t in (y, dx, dweight, dbias) if t is not None]


def drawn(spec, shape, last, dtype=torch.float32):
    """x, dy, weight, bias."""
    layout = torch.channels_last if last else torch.contiguous_format
    x, dy = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    entries = shape[-spec.pool.trailing :] if spec.pool.trailing else (shape[1],)
    return x * 3 + 5, dy, torch.randn(entries), torch.randn(entries)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", range(len(SOME)))
def test_half_precision_is_rounded_once_and_parameters_stay_float32(call, dtype):
    spec, shape, last = SOME[call]
    x, dy, weight, bias = drawn(spec, shape, last, dtype)
    ours = ran(spec, x, dy, weight, bias)
    exact = ran(spec, *(t.double() for t in (x, dy, weight, bias)), reference)
    for got, want in zip(ours, exact, strict=True):
        # Half a unit of the last place of the result, beside float32's error of the sums; Triton's
        # interpreter cuts bfloat16 off.
        cut = triton.interpreting() and dtype == torch.bfloat16
        half = torch.finfo(dtype).eps / (1 if cut else 2) if got.dtype == dtype else 0
        error = 5e-6 * max(1, float(want.abs().max()))
        torch.testing.assert_close(got.double(), want, rtol=half, atol=error)


@on_kernels
@pytest.mark.parametrize("call", range(len(SOME)))
def test_the_same_bits_every_time(call, device):
    spec, shape, last = SOME[call]
    if device == "cpu" and spec.center:
        pytest.skip("the interpreter has one order: one call will do")
    times = 1 if device == "cpu" else 500  # enough programs for an order of theirs to show
    tensors = drawn(spec, (shape[0] * times, *shape[1:]), last)
    first = ran(spec, *tensors)
    for _ in range(1 if device == "cpu" else 5):
        assert all(map(torch.equal, ran(spec, *tensors), first))


@pytest.mark.usefixtures("device", "tiles")
@pytest.mark.parametrize("center", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("size", [60, 200, 1000])
def test_a_row_does_not_depend_on_the_others(size, center):
    """Neither whole in registers nor, by small tiles, read twice or in chunks."""
    x, dy = torch.randn(2, 3, size)
    spec = Spec(pool.last(1), 1e-5, center=center)
    for whole, alone in zip(ran(spec, x, dy), ran(spec, x[2:], dy[2:]), strict=True):
        assert torch.equal(whole[2:], alone)


@on_kernels
@pytest.mark.parametrize("call", range(len(SOME)))
def test_misaligned_views_are_right(call):
    spec, shape, last = SOME[call]
    tensors = drawn(spec, shape, last, torch.bfloat16)

    def moved(t):
        to = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride(), 1)
        assert to.copy_(t).data_ptr() % 16 == t.element_size()
        return to

    aligned, misaligned = ran(spec, *tensors), ran(spec, *map(moved, tensors))
    assert all(map(torch.equal, misaligned, aligned))


@on_kernels
@pytest.mark.parametrize(
    ("norm", "last"),
    [(pool.BATCH, False), (pool.BATCH, True), (pool.group(8), True), (pool.last(1), False)],
    ids=["batch", "batch-channels_last", "group-channels_last", "layer"],
)
def test_more_than_2_31_elements(norm, last, device):
    """129 copies of a block: each must come out as the block does."""
    if device == "cpu" or torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB on a GPU")
    spec, copies, shape = Spec(norm, 1e-5), 129, (64, 64, 64, 64)
    x, dy, _, _ = drawn(spec, shape, last, torch.bfloat16)
    entries = shape[3 if norm.trailing else 1]
    weight, bias = torch.randn(2, entries)
    exact = ran(spec, *(t.double() for t in (x, dy, weight, bias)), reference)

    def repeated(t):
        layout = torch.channels_last if last else torch.contiguous_format
        to = torch.empty((copies * 64, *shape[1:]), dtype=t.dtype, memory_format=layout)
        assert to.numel() > 2**31
        for to_block in to.split(64):
            to_block.copy_(t)
        return to

    y, dx, dweight, dbias = ran(spec, repeated(x), repeated(dy), weight, bias)
    for got, want in ((y, exact[0]), (dx, exact[1])):
        blocks = got.split(64)
        torch.testing.assert_close(blocks[-1].double(), want, rtol=2**-8, atol=1e-4)
        assert all(torch.equal(block, blocks[0]) for block in blocks)
    for got, want in ((dweight, exact[2]), (dbias, exact[3])):
        scale = float(want.abs().max())
        torch.testing.assert_close(got.double() / copies, want, rtol=1e-4, atol=1e-4 * scale)


def test_what_a_machine_lacks_is_said(monkeypatch):
    available = triton.available.__wrapped__
    monkeypatch.setattr(triton, "DEVICE", "cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert available() == f"torch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available() == "no NVIDIA GPU is available"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert available() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert available() == "triton is not installed; pip install triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available().startswith("TRITON_INTERPRET=1 is set")


def test_tensors_on_the_cpu_are_not_interpreted_unless_a_test_asks_for_it(monkeypatch):
    monkeypatch.setattr(triton, "DEVICE", "cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.randn(2, 4, device="cpu")
    assert triton.why_not(Spec(pool.last(1), 1e-5), Inputs(x)) == "x is on cpu"


def test_an_old_gpu_and_devices_that_differ_are_said(monkeypatch):
    monkeypatch.setattr(triton, "_capability", lambda device: (7, 5))
    x = torch.empty(2, 4, device="meta")
    monkeypatch.setattr(triton, "DEVICE", "meta")
    spec = Spec(pool.last(1), 1e-5)
    assert triton.why_not(spec, Inputs(x)) == "meta has compute capability 7.5, below 8.0"
    monkeypatch.setattr(triton, "_capability", lambda device: (9, 0))
    weight = torch.ones(4, device="cpu")
    assert triton.why_not(spec, Inputs(x, weight)) == "weight is on cpu, x on meta"
    assert triton.why_not(spec, Inputs(x)) is None


def aot():
    spec = importlib.util.spec_from_file_location("aot", HERE.parent / "benchmarks/aot.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["aot"] = module
    spec.loader.exec_module(module)
    return module


compiles = pytest.mark.skipif(triton.interpreting(), reason="the interpreter doesn't compile")


@compiles
@pytest.mark.parametrize("name", ["LN 65536x4096", "LN over channels 256x512", "BN+add+relu"])
def test_kernels_compile_ahead_of_time_without_spills(name):
    module = aot()
    call = next(c for c in module.CALLS if str(c).startswith(name))
    for launch in module.launches(call):
        assert module.resources(module.compiled(launch, 90))["spilled"] == 0


@compiles
@pytest.mark.parametrize(
    ("norm", "shape", "last"),
    [
        (pool.BATCH, (2**13, 64, 2**7, 2**7), False),
        (pool.BATCH, (2**13, 64, 2**7, 2**7), True),
        (pool.group(2), (4, 2**5, 2**13, 2**13), False),
        (pool.CHANNELS, (2**13, 64, 2**7, 2**7), False),
        (pool.last(1), (2**21, 2**12), False),
    ],
)
def test_offsets_beyond_2_31_are_computed_in_64_bits(norm, shape, last):
    """Of all tiles of x, y, dy and dx: no kernel adds a 32-bit offset to a pointer to them."""
    g = triton_plan.geometry(norm, shape, last, False, 2)
    end = (g.outer - 1) * g.outer_stride + (g.period - 1) * g.unit_stride
    end += (g.rows - 1) * g.row_stride + g.cols
    assert end == math.prod(shape) > 2**31
    module = aot()
    tiles = 0
    for launch in module.launches(module.Call("huge", norm, shape, last)):
        assert launch.grid[0] < 2**31
        ttir = module.compiled(launch, 90).asm["ttir"]
        added = re.findall(r"tt\.addptr .*<(\S*)!tt\.ptr<bf16>>, tensor<\S*x(i\d+)>", ttir)
        tiles += len(added)
        assert {width for _, width in added} <= {"i64"}
    assert tiles >= 4


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", [pool.BATCH, pool.INSTANCE, pool.group(8), pool.CHANNELS], ids=str)
def test_little_batch_norm_takes_two_launches_and_large_units_are_cut_up(norm, last, way):
    for shape in ((128, 64, 32, 32), (32, 256, 28, 28), (1024, 64, 56, 56)):
        g = triton_plan.geometry(norm, shape, last, False, 2)
        at = triton_plan.launch(g, way, False)
        assert at.chunk * at.chunks >= at.tiles > at.chunk * (at.chunks - 1)
        assert at.a * at.b <= triton_plan.LARGEST[way]
        if norm == pool.BATCH and at.split and math.prod(shape) <= triton_plan.SMALL:
            assert at.merged
        if not at.whole and not at.split:
            assert g.rows * min(g.cols, at.b) <= triton_plan.LOOPED or norm.trailing
