"""Conformance, then the table of cases and ResNet-50, on one NVIDIA GPU; JSON with its facts.

    make bench-gpu
    python benchmarks/gpu.py --out benchmarks/results/gpu.json --seconds 1200

Times are medians of CUDA events, the L2 flushed before each. GB/s counts each byte once: a row or
instance norm's forward reads x and writes y; batch norm's in training reads x twice, in evaluation
once; a backward reads x and dy and writes dx; a residual or `add` adds its own bytes. What is
measured so far is written after each case, so a run that is cut short keeps its rows.
"""

import argparse
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normkit
from normkit import backend
from normkit.bench.cases import Case, cases

SCALE = 32
"""The CPU table's leading sizes times this: a gigabyte and more, well past L2."""


def flushed(step: Callable[[], object], device: str, rounds: int = 20) -> float:
    """Return the median of milliseconds of a call, with a cold L2."""
    for _ in range(3):
        step()
    if device == "cpu":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    times = []
    for _ in range(rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def moved(case: Case) -> int:
    """Return the bytes that a case must move through memory, each counted once."""
    reads = 2 if case.norm.name.startswith("BN") and case.mode != "evaluation" else 1
    second = 1 if case.norm.second else 0
    passes = reads + 1 + second + (second if case.norm.name == "add+RMS" else 0)
    if case.mode == "forward+backward":
        passes += 3 + second
    return passes * case.bytes


def table(small: bool) -> list[Case]:
    """Return the CPU table's cases, forward and backward at GPU sizes first, then as they are."""
    own = list(cases())
    if small:
        own = [c for c in own if c.shape in ((60, 100), (64, 512, 7, 7))]
        return [replace(c, shape=(4, *(min(n, 8) for n in c.shape[1:]))) for c in own]
    large = [replace(c, shape=(c.shape[0] * SCALE, *c.shape[1:])) for c in own]
    return [c for c in large if c.bytes >= 1 << 26] + own


def contestants(case: Case, device: str, compiled: bool) -> dict[str, Callable[[], object]]:
    """Return a step of each: torch, torch.compile, normkit, and Liger-Kernel and quack."""
    norm = case.norm
    x, dy = case.tensor().to(device), case.tensor().to(device)
    second = case.tensor().to(device) if norm.second else None

    def step(layer: nn.Module, call: Callable[..., Any]) -> Callable[[], object]:
        layer = layer.to(device, case.dtype)
        if case.mode == "evaluation":
            layer.eval()
        inputs = [x] if second is None else [x, second]
        if case.mode != "forward+backward":

            def forward() -> object:
                with torch.no_grad():
                    return call(layer, *inputs)

            return forward
        leaves = [t.detach().requires_grad_() for t in inputs]
        wanted = [*leaves, *layer.parameters()]

        def both() -> object:
            y = call(layer, *leaves)
            return torch.autograd.grad(y, wanted, (dy, dy) if isinstance(y, tuple) else dy)

        return both

    found = {
        "torch": step(norm.torch_layer(case.shape), norm.torch_call),
        "normkit": step(norm.normkit_layer(case.shape), norm.normkit_call),
    }
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(norm.torch_call, dynamic=False)
        found["compile"] = step(norm.torch_layer(case.shape), call)
    if norm.name in ("LN", "RMS") and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerLayerNorm, LigerRMSNorm

        made = (LigerLayerNorm if norm.name == "LN" else LigerRMSNorm)(case.shape[-1])
        found["liger"] = step(made, lambda layer, x: layer(x))
    if norm.name == "RMS" and importlib.util.find_spec("quack"):
        from quack import rmsnorm

        found["quack"] = step(nn.RMSNorm(case.shape[-1]), lambda layer, x: rmsnorm(x, layer.weight))
    return found


def conformance(device: str) -> float:
    """Compare the chosen backend with the float64 formula on every norm; return the worst error."""
    worst = 0.0
    for case in table(small=True):
        if case.mode != "forward+backward":
            continue
        layer = case.norm.normkit_layer(case.shape).to(device)
        inputs = [case.tensor().to(device) for _ in range(2 if case.norm.second else 1)]
        with torch.no_grad(), backend.watch() as calls:
            y = case.norm.normkit_call(layer, *inputs)
        spec, seen = calls[0]
        up = [t.double() if t is not None and t.is_floating_point() else t for t in seen]
        exact = backend.reference.normalize(spec, type(seen)(*up))[0]
        got = y[0] if isinstance(y, tuple) else y
        error = float((got.detach().double() - exact).abs().max())
        limit = 8e-2 if case.dtype == torch.bfloat16 else 1e-4
        if not error <= limit:
            raise SystemExit(f"conformance: {case}: off by {error:.3g}, more than {limit}")
        worst = max(worst, error)
    return worst


class Bottleneck(nn.Module):
    """ResNet's bottleneck block."""

    def __init__(self, inside: int, width: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inside, width, 1, bias=False), norm(width), nn.ReLU(True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width), nn.ReLU(True)),
            *(nn.Conv2d(width, out, 1, bias=False), norm(out)),
        )
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inside != out:
            self.short = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), norm(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet50(norm: Callable[[int], nn.Module]) -> nn.Module:
    """Return ResNet-50 (arXiv 1512.03385)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.ReLU(True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inside = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(blocks):
            layers.append(Bottleneck(inside, width, stride if i == 0 else 1, norm))
            inside = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def training(norm: Callable[[int], nn.Module], device: str, batch: int, size: int) -> dict:
    """Return images/s and peak memory of a bfloat16 channels_last training step of ResNet-50."""
    net = resnet50(norm).to(device, torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = flushed(step, device, rounds=10)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"images/s": batch / ms * 1e3, "peak bytes": peak}


def copied(device: str, elements: int) -> float:
    """Return the GB/s of a copy, read and write counted."""
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / flushed(lambda: target.copy_(source), device) / 1e6


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop the table after")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU: a self-check")
    options = parser.parse_args()
    device = "cpu" if options.dry else "cuda"
    if not options.dry and (missing := normkit.backends()["triton"]) is not None:
        sys.exit(f"bench-gpu: the triton backend can't be used: {missing}")
    result: dict[str, Any] = {"conformance": conformance(device), "rows": [], "resnet50": {}}
    result["machine"] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        import triton

        facts = torch.cuda.get_device_properties(0)
        result["machine"] |= {"gpu": facts.name, "multiprocessors": facts.multi_processor_count}
        result["machine"] |= {"memory": facts.total_memory, "cuda": torch.version.cuda}
        result["machine"]["triton"] = triton.__version__
    result["copy GB/s"] = copy = copied(device, 1 << 12 if options.dry else 1 << 30)

    def save() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    batch, size = (2, 64) if options.dry else (256, 224)
    for name, norm in (("torch", nn.BatchNorm2d), ("normkit", normkit.BatchNorm2d)):
        result["resnet50"][name] = training(norm, device, batch, size)
        save()
    begun = time.monotonic()
    for case in table(small=options.dry):
        if time.monotonic() - begun > options.seconds:
            result["stopped"] = f"after {options.seconds} s, before {case}"
            break
        steps = contestants(case, device, not (options.no_compile or options.dry))
        row: dict[str, Any] = {"case": str(case), "bytes": moved(case)}
        for name, step in steps.items():
            ms = flushed(step, device)
            rate = moved(case) / ms / 1e6
            row[name] = {"ms": ms, "GB/s": rate, "of copy": rate / copy}
        result["rows"].append(row)
        print(case, {k: round(v["of copy"], 3) for k, v in row.items() if isinstance(v, dict)})
        save()
    save()


if __name__ == "__main__":
    main()
