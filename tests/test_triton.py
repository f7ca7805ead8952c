"""The Triton kernels without a GPU: interpreted in a process of its own, and compiled."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normkit
from normkit import pool
from normkit.backend import reference, triton, triton_plan
from normkit.spec import Inputs, Spec

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.fixture
def device(request):
    """Where the kernels run: on a GPU with `--device cuda`; else interpreted, in a process below."""
    wanted = request.config.getoption("--device")
    if wanted != triton.DEVICE:
        pytest.skip("runs in the process below")
    return wanted


on_kernels = pytest.mark.usefixtures("device")


def test_the_kernels_are_right_under_tritons_interpreter():
    """This file's interpreted tests, and the conformance tests that every backend passes."""
    if triton.interpreting():
        pytest.skip("this is that process")
    files = [str(HERE / f"test_{name}.py") for name in ("triton", "oracle", "masks")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-k", "triton", "-p", "no:cacheprovider"],
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
        for name, value in (("TILE", 64), ("LOOPED", 256), ("CHUNK", 128), ("PROGRAMS", 8)):
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
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert ours[0].stride() == x.stride()
    saved = inputs._replace(mean=ours[1], var=None, rstd=ours[2])
    if residual:
        saved = saved._replace(residual=None, output=ours[0])
    gradients = triton.normalize_backward(spec, saved, dy)
    expected = reference.normalize_backward(spec, saved, dy)
    for got, want in zip(gradients[: 4 if residual else 3], expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype):
    x, weight = torch.randn(6, 40).to(dtype) * 3 + 5, torch.randn(40)
    spec = Spec(pool.last(1), 1e-5)
    y = triton.normalize(spec, Inputs(x, weight))[0]
    want = reference.normalize(spec, Inputs(x.double(), weight.double()))[0]
    torch.testing.assert_close(y.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@on_kernels
def test_a_row_does_not_depend_on_the_others():
    x, dy = torch.randn(2, 33, 100)
    spec = Spec(pool.last(1), 1e-5)

    def run(rows):
        y, mean, rstd, _ = triton.normalize(spec, Inputs(x[rows]))
        inputs = Inputs(x[rows], mean=mean, rstd=rstd)
        return y, triton.normalize_backward(spec, inputs, dy[rows])[0]

    for whole, alone in zip(run(slice(0, 33)), run(slice(32, 33)), strict=True):
        assert torch.equal(whole[32:], alone)


@on_kernels
def test_a_misaligned_view_is_right():
    x = torch.randn(4 * 64 + 1)[1:].view(4, 64)
    y = triton.normalize(Spec(pool.last(1), 1e-5), Inputs(x))[0]
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (64,)))


def test_what_a_call_lacks_is_said():
    spec, x = Spec(pool.last(1), 1e-5), torch.randn(2, 4)
    if not triton.interpreting():
        assert triton.why_not(spec, Inputs(x)) == "x is on cpu"
        assert "backend triton" in normkit.info()
        if not torch.cuda.is_available():
            assert triton.available() in (
                "no NVIDIA GPU is available",
                f"torch {torch.__version__} is built without CUDA",
            )


def test_an_old_gpu_and_devices_that_differ_are_said(monkeypatch):
    class On:
        type = "cuda"

        def __str__(self):
            return "cuda:0"

    monkeypatch.setattr(triton, "interpreting", lambda: False)
    monkeypatch.setattr(triton, "_capability", lambda device: (7, 5))
    x = torch.empty(2, 4, device="meta")
    monkeypatch.setattr(triton, "DEVICE", "meta")
    spec = Spec(pool.last(1), 1e-5)
    assert triton.why_not(spec, Inputs(x)) == "meta has compute capability 7.5, below 8.0"
    monkeypatch.setattr(triton, "_capability", lambda device: (9, 0))
    assert triton.why_not(spec, Inputs(x, torch.ones(4))) == "weight is on cpu, x on meta"
    assert triton.why_not(spec, Inputs(x)) is None


def aot():
    spec = importlib.util.spec_from_file_location("aot", HERE.parent / "benchmarks/aot.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["aot"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(triton.interpreting(), reason="the interpreter doesn't compile")
@pytest.mark.parametrize("name", ["LN 65536x4096", "LN over channels 256x512", "BN+add+relu"])
def test_kernels_compile_ahead_of_time_without_spills(name):
    module = aot()
    call = next(c for c in module.CALLS if str(c).startswith(name))
    for launch in module.launches(call):
        assert module.compiled(launch, 90)["spilled"] == 0
