"""Compile every kernel of a list of calls for NVIDIA GPUs, without one; write results/aot.json.

    python benchmarks/aot.py
    python benchmarks/render.py --no-picture

The calls are made on tensors without data, and their launches are recorded instead of run: what is
compiled is what a GPU would be given. Registers are those of a thread, `spilled` is the bytes of
its stack, which these kernels need for nothing else; both as cuobjdump reads them off the binary.
`accesses` counts the loads, asynchronous copies and stores of global memory in the PTX by their
width in bytes: of a thread, 16 is the widest there is.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normkit.backend import triton as backend
from normkit.common.files import write
from normkit.formula import pool
from normkit.formula.pool import Pool
from normkit.formula.spec import Inputs, Spec

RESULTS = Path(__file__).parent / "results/aot.json"
CAPABILITIES = (80, 90, 100)
BF16, F32 = torch.bfloat16, torch.float32
LETTERS = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Call:
    """A forward and a backward of a norm."""

    name: str
    pool: Pool
    shape: tuple[int, ...]
    last: bool = False
    dtype: torch.dtype = BF16
    act: str | None = None
    center: bool = True
    residual: bool = False
    add: bool = False
    masked: bool = False
    given: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        layout = " channels_last" if self.last else ""
        return f"{self.name} {shape}{layout} {str(self.dtype).removeprefix('torch.')}"


IMAGE = (256, 64, 56, 56)
CALLS = (
    Call("BN", pool.BATCH, (256, 256, 56, 56)),
    Call("BN", pool.BATCH, (256, 256, 56, 56), last=True),
    Call("BN", pool.BATCH, (256, 256, 56, 56), last=True, dtype=F32),
    Call("BN", pool.BATCH, (2048, 512, 7, 7)),
    Call("BN", pool.BATCH, (64, 512, 7, 7)),
    Call("BN", pool.BATCH, (128, 64)),
    Call("BN eval", pool.BATCH, IMAGE, last=True, given=True),
    Call("BN+relu", pool.BATCH, IMAGE, last=True, act="relu"),
    Call("BN+add+relu", pool.BATCH, IMAGE, last=True, act="relu", residual=True),
    Call("BN+gelu", pool.BATCH, IMAGE, act="gelu"),
    Call("BN masked", pool.BATCH, IMAGE, masked=True),
    Call("IN", pool.INSTANCE, IMAGE),
    Call("IN", pool.INSTANCE, IMAGE, last=True),
    Call("IN", pool.INSTANCE, (32, 32, 64, 128, 128), dtype=F32),
    Call("GN(8)", pool.group(8), IMAGE),
    Call("GN(8)", pool.group(8), IMAGE, last=True),
    Call("GN(32)", pool.group(32), (256, 256, 28, 28), last=True),
    Call("GN(32)", pool.group(32), IMAGE, last=True),
    Call("LN over channels", pool.CHANNELS, IMAGE),
    Call("LN over channels", pool.CHANNELS, (256, 512, 28, 28)),
    Call("LN over channels", pool.CHANNELS, IMAGE, last=True),
    Call("LN", pool.last(1), (262144, 768)),
    Call("LN", pool.last(1), (65536, 4096)),
    Call("LN", pool.last(1), (65536, 4096), dtype=F32),
    Call("LN", pool.last(1), (32768, 8192)),
    Call("LN", pool.last(1), (16384, 16384)),
    Call("LN", pool.last(1), (2097152, 100)),
    Call("LN+gelu", pool.last(1), (65536, 4096), act="gelu"),
    Call("LN masked", pool.last(1), (65536, 4096), masked=True),
    Call("RMS", pool.last(1), (65536, 4096), center=False),
    Call("RMS", pool.last(1), (65536, 8192), center=False),
    Call("RMS", pool.last(1), (2097152, 100), center=False),
    Call("add+RMS", pool.last(1), (65536, 4096), center=False, add=True),
)


@dataclass
class Launch:
    """A kernel as it would have been launched."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def source(self) -> tuple[ASTSource, dict[str, Any]]:
        """Return what Triton compiles, specialized as its launcher does, and the options."""
        options = {k: self.constants[k] for k in ("num_warps", "enable_fp_fusion")}
        given = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        given |= {k: v for k, v in self.constants.items() if k not in options}
        signature, constants, attributes = {}, {}, {}
        fixed = {self.kernel.arg_names[i] for i in self.kernel.constexprs}
        for i, name in enumerate(self.kernel.arg_names):
            value = given[name]
            if name in fixed or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + LETTERS[value.dtype]
                divisible = True
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                divisible = value % 16 == 0
            if divisible:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes), options


class Recorder:
    """In place of the module of the kernels: keeps their launches."""

    def __init__(self, kernels: Any) -> None:
        self.kernels, self.launches = kernels, []

    def __getattr__(self, name: str) -> Any:
        kernel, launches = getattr(self.kernels, name), self.launches

        class Grid:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                return lambda *a, **k: launches.append(Launch(kernel, grid, a, k))

        return Grid()


def launches(call: Call) -> list[Launch]:
    """Return what a forward and a backward of this call launch."""

    def new(*shape: int, dtype: torch.dtype = call.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = new(*call.shape)
    if call.last:
        x = x.contiguous(memory_format=torch.channels_last)
    like = torch.empty_like
    entries = call.shape[-call.pool.trailing :] if call.pool.trailing else (call.shape[1],)
    weight = new(*entries, dtype=F32)
    given = weight if call.given else None
    spec = Spec(call.pool, 1e-5, call.center, call.act, call.given)
    inputs = Inputs(
        x,
        weight,
        weight if call.center else None,
        like(x) if call.residual else None,
        like(x, dtype=torch.bool) if call.masked else None,
        like(x) if call.add else None,
        given,
        given,
    )
    real = backend._kernels()
    recorder = Recorder(real)
    backend._kernels = lambda: recorder
    try:
        y, mean, rstd, *_ = backend.normalize(spec, inputs)
        saved = inputs._replace(add=None, mean=mean, var=None, rstd=rstd)
        if call.residual:
            saved = saved._replace(residual=None, output=y)
        backend.normalize_backward(spec, saved, like(x), like(x) if call.add else None)
    finally:
        backend._kernels = lambda: real
    return recorder.launches


def compiled(launch: Launch, capability: int) -> Any:
    """Return the kernel as Triton compiles it."""
    source, options = launch.source()
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: Any) -> dict[str, int]:
    """Return registers, spilled bytes and shared memory of a kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    assert found is not None, done.stdout
    registers, stack, shared, local = map(int, found.groups())
    shared += kernel.metadata.shared
    return {"registers": registers, "spilled": stack + local, "shared": shared}


def accesses(ptx: str) -> dict[int, int]:
    """Return how many instructions access global memory so many bytes wide."""
    plain = re.findall(r"\b(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfsu](\d+)\s", ptx)
    found = Counter(int(lanes or 1) * int(bits) // 8 for lanes, bits in plain)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x\w+),", ptx)
    found.update(int(width, 16) for width in copies)
    return dict(sorted(found.items(), reverse=True))


def rows(calls: tuple[Call, ...]) -> Iterator[dict[str, Any]]:
    """Yield a row for each kernel of each call."""
    for call in calls:
        for launch in launches(call):
            constants = launch.constants
            made = {capability: compiled(launch, capability) for capability in CAPABILITIES}
            yield {
                "call": str(call),
                "kernel": launch.kernel.__name__,
                "phase": constants.get("PHASE", ""),
                "tile": [constants["A"], constants["B"]] if "A" in constants else None,
                "warps": constants["num_warps"],
                "accesses": accesses(made[90].asm["ptx"]),
                **{str(capability): resources(kernel) for capability, kernel in made.items()},
            }


if __name__ == "__main__":
    found: list[dict[str, Any]] = []
    for row in rows(CALLS):
        found.append(row)
        shown = "  ".join(f"{c}: {row[str(c)]['registers']}" for c in CAPABILITIES)
        spills = max(row[str(c)]["spilled"] for c in CAPABILITIES)
        note = f"  SPILLS {spills}" if spills else ""
        print(f"{row['call']:<44} {row['kernel']:<9} {row['phase']:<9} {shown}{note}", flush=True)
    write(RESULTS, json.dumps({"triton": triton.__version__, "rows": found}, indent=1) + "\n")
