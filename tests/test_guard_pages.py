"""No kernel touches a byte beside its tensors, and none leaves one of its results unwritten.

guard_pages.c, preloaded, puts every block at a page that faults: that of a tensor handed in, of a
result, of what a kernel keeps in between. AddressSanitizer sees no masked load or store, the
processor sees all.
"""

import ctypes
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import normkit

INSTRUCTIONS = ("avx512_bf16", "avx512", "avx2", "portable")
SIDES = {"nowhere": 0, "end": 1, "begin": 2}  # of a block, beside which the page lies
BATCH, INSTANCE, GROUP, LAYER = range(4)  # the operators' `summed`
NONE, RELU, _, SILU, _ = range(5)  # their `act`

# (summed, groups, trailing, shape, channels_last)
SMALL = [
    *((BATCH, 0, 0, (3, 5, 19), False), (BATCH, 0, 0, (2, 1, 17), False)),
    *((BATCH, 0, 0, (4, 3, 5), False), (BATCH, 0, 0, (1, 3, 1, 1), False)),
    *((BATCH, 0, 0, (2, 7, 3, 5), True), (BATCH, 0, 0, (1, 1), False)),
    *((BATCH, 2, 0, (4, 3, 17), False), (BATCH, 2, 0, (4, 3, 5), False)),
    *((BATCH, 2, 0, (4, 7), False), (BATCH, 2, 0, (4, 9, 3, 3), True)),
    *((INSTANCE, 0, 0, (2, 3, 19), False), (INSTANCE, 0, 0, (2, 3, 5, 7), True)),
    *((INSTANCE, 0, 0, (2, 3), False), (GROUP, 2, 0, (2, 6, 11), False)),
    *((GROUP, 2, 0, (2, 6, 3, 5), True), (GROUP, 3, 0, (5, 9), False)),
    *((LAYER, 1, 0, (2, 5, 7), False), (LAYER, 1, 0, (2, 5, 3, 3), True)),
    *((LAYER, 1, 0, (3, 7), False), (LAYER, 1, 2, (3, 2, 9), False)),
    *((GROUP, 40, 0, (5, 80), False), (GROUP, 2, 0, (1, 2060, 2, 2), True)),
]
# Every rest of a vector, below and above the kernels' short run and their four slots.
REST = [
    case
    for n in (*range(1, 18), 31, 33, 63, 65, 127, 129)
    for case in (
        (BATCH, 0, 0, (5, n), False),
        (INSTANCE, 0, 0, (1, 2, n), False),
        (LAYER, 1, 1, (3, n), False),
    )
]
# Several blocks or tiles, and too few of them for the threads.
LARGE = [
    *((BATCH, 0, 0, (5, 3, 61, 59), False), (BATCH, 0, 0, (300, 1030), False)),
    *((BATCH, 0, 0, (3, 70, 17, 7), True), (BATCH, 0, 0, (600, 33, 5), False)),
    *((INSTANCE, 0, 0, (1, 3, 130, 131), False), (INSTANCE, 0, 0, (2, 33, 31, 21), True)),
    *((GROUP, 2, 0, (1, 6, 61, 59), False), (GROUP, 2, 0, (2, 34, 31, 21), True)),
    *((LAYER, 1, 0, (1, 300, 41, 13), False), (LAYER, 1, 1, (2, 20_001), False)),
    *((LAYER, 1, 0, (1, 3000, 65), False), (LAYER, 1, 1, (9000, 3), False)),
]
# Results of 8 MB are written past the caches, those of 32 MB in huge pages.
STREAMED = [
    *((BATCH, 0, 0, (8, 64, 67, 67), False), (BATCH, 0, 0, (8, 65, 67, 67), True)),
    *((LAYER, 1, 1, (2100, 1025), False), (LAYER, 1, 0, (2, 300, 61, 61), False)),
]
HUGE = (LAYER, 1, 1, (8300, 1025), False)


def calls(case, dtype, masked, residual, act, center):
    """The tensors of some calls, and a function of them that makes the calls."""
    summed, groups, trailing, shape, channels_last = case
    torch.manual_seed(0)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    entries = shape[len(shape) - trailing :] if trailing else (shape[1],)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, dy, z = (torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(3))
    tensors = {
        "x": x,
        "dy": dy,
        "residual": z if residual else None,
        "mask": (torch.rand_like(x, dtype=torch.float32) < 0.7) if masked else None,
        "weight": torch.randn(entries, dtype=compute),
        "bias": torch.randn(entries, dtype=compute),
    }
    constants = (summed, groups, trailing, 1e-5, center, act)
    adds = summed == LAYER and not residual
    ops = torch.ops.normkit

    def call(x, dy, residual, mask, weight, bias):
        affine = (weight, bias)
        y, mean, rstd, var = ops.normalize(x, *affine, residual, mask, None, None, *constants)
        results = [y, mean, rstd, var]
        results.append(ops.output(x, *affine, residual, mask, mean, var, *constants))
        output = y if act == RELU and residual is not None else None
        saved = (x, *affine, None if output is not None else residual, output, mask, mean, rstd)
        dtotal = dy if adds else None
        backward = ops.normalize_backward
        results += backward(dy, *saved, None, None, dtotal, *constants, False, residual is not None)
        if adds:
            results += ops.add_normalize(x, dy, *affine, mask, *constants)
        if not trailing:
            results.append(ops.moments(x, mask, *constants))
            sums = mean * 0.25
            results += backward(dy, *saved, sums, sums, None, *constants, True, True)
        if summed == BATCH:
            results.append(ops.sums(dy, *saved, *constants))
            if not groups:
                ops.move(mean, var, None, rstd, rstd, 0.1, 1.0)
                results += [mean, var]
        return [t for t in results if t is not None]

    return tensors, call


# (masked, residual, act, center)
EVERYTHING = (True, True, SILU, True)
OPTIONS = [
    EVERYTHING,
    (False, False, NONE, True),
    (False, True, RELU, True),
    (True, False, NONE, False),
]


def every_call(instructions):
    """(case, dtype, *options) and a side: all cases at the end, where rests of vectors are."""
    own = instructions == "avx512_bf16"  # of which only bfloat16's kernels are of its own
    wide = [torch.bfloat16] if own else [torch.bfloat16, torch.float32]
    for dtype in wide:
        for case in SMALL:
            yield from ((case, dtype, *options, "end") for options in OPTIONS)
            yield case, dtype, *EVERYTHING, "begin"
        yield from ((case, dtype, *EVERYTHING, "end") for case in REST)
        yield from ((case, dtype, *options, "end") for case in LARGE for options in OPTIONS[1:3])
        yield STREAMED[0], dtype, *OPTIONS[2], "end"
    for dtype in () if own else (torch.float16, torch.float64):
        yield from ((case, dtype, *EVERYTHING, "end") for case in SMALL)
    yield from ((case, wide[-1], *OPTIONS[2], "end") for case in STREAMED[1:])
    yield HUGE, wide[-1], *OPTIONS[1], "end"


def check_every_call(guard, instructions):
    """Every call beside a page that faults gives the bits that it gives elsewhere."""
    os.environ["NORMKIT_CPU"] = instructions
    torch.set_num_threads(2)
    for *described, side in every_call(instructions):
        print(instructions, *described, side, flush=True)
        tensors, call = calls(*described)
        expected, found = (
            guarded(guard, where, call, tensors) for where in (SIDES["nowhere"], SIDES[side])
        )
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
    print(instructions, "passed")


def guarded(guard, where, call, tensors):
    """The call's results, its tensors' copies and all that it allocates beside such pages."""
    guard(where)
    try:
        return call(**{name: None if t is None else t.clone() for name, t in tensors.items()})
    finally:
        guard(SIDES["nowhere"])


def touch(guard, where, offset):
    """Writes a byte `offset` bytes from the begin of a block of 100."""
    malloc = ctypes.CDLL(None).malloc
    malloc.restype = ctypes.c_void_p
    faulthandler.disable()
    guard(where)
    block = malloc(ctypes.c_size_t(100))
    guard(SIDES["nowhere"])
    ctypes.memset(block + offset, 0, 1)


def in_a_fork(function, *arguments):
    """The status in which a copy of this process ends that calls the function."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*arguments)
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            if status:
                sys.excepthook(*sys.exc_info())
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main():
    """Forks, before anything has run, for each instruction set: it is chosen once a process."""
    assert normkit.backends()["cpu"] is None
    guard = ctypes.CDLL(None).guard
    for side, inside, outside in (("end", 99, 100), ("begin", 0, -1)):
        assert in_a_fork(touch, guard, SIDES[side], inside) == 0
        assert in_a_fork(touch, guard, SIDES[side], outside) == -signal.SIGSEGV
    print("the pages fault")
    for instructions in INSTRUCTIONS:
        print(instructions, "ended with", in_a_fork(check_every_call, guard, instructions))


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if normkit.backends()["cpu"] is not None or compiler is None or sys.platform != "linux":
        pytest.skip("needs the C++ core, a C compiler and Linux")
    library = tmp_path_factory.mktemp("guard") / "guard_pages.so"
    source = Path(__file__).with_name("guard_pages.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-X", "faulthandler", __file__],
        env=os.environ | {"LD_PRELOAD": str(library), "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "the pages fault" in done.stdout
    return done.stdout


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_no_byte_beside_a_tensor_is_touched(said, instructions):
    if f"NORMKIT_CPU={instructions}: this processor and build offer" in said:
        pytest.skip(f"this processor has no {instructions}")
    mine = said[: said.index(f"{instructions} ended with")]
    assert f"{instructions} passed\n" in mine, mine[-4000:]


if __name__ == "__main__":
    main()
