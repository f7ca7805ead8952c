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
from normkit import backend
from normkit.bench.cases import Case

Step = Callable[[], object]


def steps(case: Case, compiled: bool) -> dict[str, Step]:
    """The contestants of a case: the floor, torch twice (the noise of the run), normkit."""
    x, dy, second = tensors(case)
    norm = case.norm
    theirs = norm.torch_layer(case.shape)
    found = {
        "floor": _floor(case, x, dy),
        "torch": step(case, theirs, norm.torch_call, x, second, dy),
        "torch again": step(case, theirs, norm.torch_call, x, second, dy),
        "normkit": step(case, norm.normkit_layer(case.shape), norm.normkit_call, x, second, dy),
    }
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(norm.torch_call, fullgraph=True, dynamic=False)
        found["compile"] = step(case, theirs, call, x, second, dy)
        ours = torch.compile(norm.normkit_call, fullgraph=True, dynamic=False)
        layer = norm.normkit_layer(case.shape)
        found["normkit compiled"] = step(case, layer, ours, x, second, dy)
    return found


def tensors(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
    """x, the gradient of y, and the residual or `add` where the norm takes one."""
    torch.manual_seed(0)
    x, dy = case.tensor(device), case.tensor(device)
    return x, dy, case.tensor(device) if case.norm.second else None


def _floor(case: Case, x: Tensor, dy: Tensor) -> Step:
    if case.mode == "forward+backward":
        return lambda: (x.clone(), x + dy)
    return lambda: x.clone()


def step(
    case: Case,
    layer: nn.Module,
    call: Callable[..., Any],
    x: Tensor,
    second: Tensor | None,
    dy: Tensor,
) -> Step:
    """What is timed of a case: a forward without gradients, a backward alone, or both."""
    layer = layer.to(x.device, case.dtype)
    layer.train(case.mode != "evaluation")
    if case.mode in ("evaluation", "training"):
        inputs = (x,) if second is None else (x, second)

        def forward() -> object:
            with torch.no_grad():
                return call(layer, *inputs)

        return forward
    leaf = x.detach().requires_grad_()
    leaves = (leaf,) if second is None else (leaf, second.detach().requires_grad_())
    wanted = [*leaves, *layer.parameters()]

    def backward(y: Any, again: bool = False) -> object:
        return torch.autograd.grad(
            y, wanted, (dy, dy) if isinstance(y, tuple) else dy, retain_graph=again
        )

    if case.mode == "backward":
        kept = call(layer, *leaves)
        return lambda: backward(kept, again=True)
    return lambda: backward(call(layer, *leaves))


def measure(
    found: dict[str, Step],
    seconds: float = 1.0,
    least: int = 7,
    most: int = 101,
    timed: Callable[[Step, int], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each contestant, round by round; a round times each of them once.

    Odd rounds run in reverse order. A round repeats a short call until it takes half a millisecond.
    `timed(step, repeats)`, by default by the wall clock, gives the seconds of one of the calls.
    """
    timed = timed or _timed
    repeats = {}
    for name, run in found.items():
        run()
        repeats[name] = max(1, round(5e-4 / timed(run, 3)))
    times: dict[str, list[float]] = {name: [] for name in found}
    start = time.perf_counter()
    for i in range(most):
        for name in list(found) if i % 2 else reversed(found):
            times[name].append(timed(found[name], repeats[name]))
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


def described(case: Case) -> dict[str, Any]:
    """Which case it is."""
    return {
        "norm": case.norm.name,
        "shape": list(case.shape),
        "layout": case.layout,
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": case.mode,
    }


def row(case: Case, times: dict[str, list[float]]) -> dict[str, Any]:
    """What is kept of a case; every entry but `floor_ms` is a ratio of times of this run."""
    kept: dict[str, Any] = {
        **described(case),
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
        kept["normkit compiled/compile"] = ratio(times, "normkit compiled", "compile")
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
