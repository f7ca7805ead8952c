"""Interleaved timing: every contestant in one process, in alternating order, round by round."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import normkit

from .. import backend
from .cases import Case

Step = Callable[[], object]


def steps(case: Case, compiled: bool) -> dict[str, Step]:
    """The contestants of a case: the floor, torch twice (the noise of the run), normkit."""
    torch.manual_seed(0)
    x, dy = case.tensor(), case.tensor()
    second = case.tensor() if case.norm.second else None
    theirs = case.norm.torch_layer(case.shape).to(case.dtype)
    ours = case.norm.normkit_layer(case.shape).to(case.dtype)
    if case.mode == "evaluation":
        theirs.eval()
        ours.eval()
    norm = case.norm
    found = {
        "floor": _floor(case, x, dy),
        "torch": _step(case, theirs, norm.torch_call, x, second, dy),
        "torch again": _step(case, theirs, norm.torch_call, x, second, dy),
        "normkit": _step(case, ours, norm.normkit_call, x, second, dy),
    }
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(norm.torch_call, fullgraph=True, dynamic=False)
        found["compile"] = _step(case, theirs, call, x, second, dy)
    return found


def _floor(case: Case, x: Tensor, dy: Tensor) -> Step:
    if case.mode == "forward+backward":
        return lambda: (x.clone(), x + dy)
    return lambda: x.clone()


def _step(
    case: Case,
    layer: nn.Module,
    call: Callable[..., Any],
    x: Tensor,
    second: Tensor | None,
    dy: Tensor,
) -> Step:
    if case.mode != "forward+backward":
        inputs = (x,) if second is None else (x, second)

        def forward() -> object:
            with torch.no_grad():
                return call(layer, *inputs)

        return forward
    leaf = x.detach().requires_grad_()
    leaves = (leaf,) if second is None else (leaf, second.detach().requires_grad_())
    wanted = [*leaves, *layer.parameters()]

    def both() -> object:
        y = call(layer, *leaves)
        if isinstance(y, tuple):
            return torch.autograd.grad(y, wanted, (dy, dy))
        return torch.autograd.grad(y, wanted, dy)

    return both


def measure(
    found: dict[str, Step], seconds: float = 1.0, least: int = 7, most: int = 101
) -> dict[str, list[float]]:
    """Seconds per call of each contestant, round by round; a round times each of them once.

    Odd rounds run in reverse order. A round repeats a short call until it takes half a millisecond.
    """
    repeats = {}
    for name, step in found.items():
        step()
        repeats[name] = max(1, round(5e-4 / _timed(step, 3)))
    times: dict[str, list[float]] = {name: [] for name in found}
    start = time.perf_counter()
    for i in range(most):
        for name in list(found) if i % 2 else reversed(found):
            times[name].append(_timed(found[name], repeats[name]))
        if i + 1 >= least and time.perf_counter() - start > seconds:
            break
    return times


def _timed(step: Step, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - start) / repeats


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> float:
    """The median over rounds of the ratio of two contestants' times."""
    return statistics.median(a / b for a, b in zip(times[ours], times[theirs], strict=True))


def row(case: Case, times: dict[str, list[float]]) -> dict[str, Any]:
    """What is kept of a case; every entry but `floor_ms` is a ratio of times of this run."""
    kept: dict[str, Any] = {
        "norm": case.norm.name,
        "shape": list(case.shape),
        "layout": case.layout,
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": case.mode,
        "bytes": case.bytes,
        "rounds": len(times["floor"]),
        "floor_ms": round(statistics.median(times["floor"]) * 1e3, 4),
        "torch/floor": ratio(times, "torch", "floor"),
        "normkit/floor": ratio(times, "normkit", "floor"),
        "normkit/torch": ratio(times, "normkit", "torch"),
        "torch/torch": ratio(times, "torch again", "torch"),
    }
    if "compile" in times:
        kept["normkit/compile"] = ratio(times, "normkit", "compile")
        kept["compile/torch"] = ratio(times, "compile", "torch")
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in kept.items()}


def model_row(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """What is kept of a model's training step."""
    return {
        "model": name,
        "rounds": len(times["torch"]),
        "torch_ms": round(statistics.median(times["torch"]) * 1e3, 2),
        "normkit/torch": round(ratio(times, "normkit", "torch"), 4),
        "torch/torch": round(ratio(times, "torch again", "torch"), 4),
    }


def machine() -> dict[str, Any]:
    """The facts without which the figures mean nothing."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "backend cpu": normkit.backends()["cpu"] or backend.cpu.instructions(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()
