"""Small calls, on one thread: what a call costs beside its arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch

from normkit.bench import harness
from normkit.bench.cases import IMAGE_NORMS, ROW_NORMS, Case

ROWS = ((1, 64), (8, 64), (32, 128), (60, 100), (256, 64), (256, 256), (1, 768), (16, 768))
IMAGES = ((1, 32, 8, 8), (8, 16, 14, 14), (32, 64, 4, 4), (1, 64, 32, 32))
FORWARD = "training forward"
MODES = ("evaluation", FORWARD, "forward+backward")


def cases() -> Iterator[Case]:
    """Every norm, in every mode; a batch of one row has no variance."""
    for mode in MODES:
        for shape in ROWS:
            for norm in ROW_NORMS:
                if shape[0] > 1 or not norm.name.startswith("BN"):
                    yield Case(norm, shape, "contiguous", torch.float32, mode)
        for image in IMAGES:
            for norm in IMAGE_NORMS:
                if image[1] % norm.multiple == 0:
                    yield Case(norm, image, "contiguous", torch.float32, mode)


def steps(case: Case) -> dict[str, harness.Step]:
    """The contestants of a case: torch twice (the noise of the run), normkit."""
    return {
        "torch": _step(case, case.norm.torch_layer, case.norm.torch_call),
        "torch again": _step(case, case.norm.torch_layer, case.norm.torch_call),
        "normkit": _step(case, case.norm.normkit_layer, case.norm.normkit_call),
    }


def _step(case: Case, make: Any, call: Any) -> harness.Step:
    x, dy, second = harness.tensors(case)
    layer = make(case.shape)
    if case.mode != FORWARD:
        return harness.step(case, layer, call, x, second, dy)
    inputs = [t.requires_grad_() for t in (x, second) if t is not None]
    return lambda: call(layer, *inputs)


def row(case: Case, times: dict[str, list[float]]) -> dict[str, Any]:
    """What is kept of a case, by the fastest round of each: other load only adds to a call."""
    fastest = {name: min(rounds) for name, rounds in times.items()}
    return {
        **harness.described(case),
        "rounds": len(times["torch"]),
        "torch_us": round(fastest["torch"] * 1e6, 2),
        "normkit/torch": round(fastest["normkit"] / fastest["torch"], 4),
        "torch/torch": round(fastest["torch again"] / fastest["torch"], 4),
    }


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Times faster than torch by mode: geometric mean, and the slowest row."""
    for mode in MODES:
        faster = {i: 1 / row["normkit/torch"] for i, row in enumerate(rows) if row["mode"] == mode}
        if faster:
            slowest = rows[min(faster, key=faster.__getitem__)]
            yield (
                f"small calls, {mode}: {statistics.geometric_mean(faster.values()):.2f} times "
                f"torch's speed, at least {min(faster.values()):.2f} ({slowest['norm']} "
                f"{'x'.join(map(str, slowest['shape']))})"
            )
