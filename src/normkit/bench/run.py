"""`normkit bench`: every case timed, kept as JSON with the machine's facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from normkit.bench import harness, small
from normkit.bench.cases import Case, cases
from normkit.bench.models import MODELS, training_step
from normkit.common.errors import LabError
from normkit.common.files import check_writable, write

COMPILED = ((128, 64, 32, 32), (4096, 768))
"""The shapes at which torch.compile runs too, forward and backward: each costs it a minute."""


def main(out: Path | None, only: str | None, seconds: float, compiled: bool) -> None:
    """Time the cases whose name holds `only` (all), print a line each, write `out`.

    Raises LabError where no case's name does, or `out` can't be written.
    """
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_writable(out)
    machine = harness.machine()  # its load too is that before the run
    rows = []
    for case in cases():
        if only is None or only in str(case):
            times = harness.measure(harness.steps(case, compiled and _compiles(case)), seconds)
            rows.append(harness.row(case, times))
            _show(str(case), rows[-1])
    models = []
    for model in MODELS:
        if only is None or only in model.name:
            found = {
                "torch": training_step(model, model.theirs),
                "torch again": training_step(model, model.theirs),
                "normkit": training_step(model, model.ours),
            }
            times = harness.measure(found, seconds * 4)
            models.append(harness.model_row(model.name, times))
            _show(model.name, models[-1])
    calls = _small_calls(only, seconds)
    if not rows and not models and not calls:
        some = ", ".join(map(str, list(cases())[:3]))
        raise LabError(f"no case's name holds {only!r}; cases: {some}, ...")
    if out is not None:
        result = {"machine": machine, "rows": rows, "models": models, "small calls": calls}
        write(out, json.dumps(result, indent=1) + "\n")


def _small_calls(only: str | None, seconds: float) -> list[dict[str, Any]]:
    """Every small call whose name, which begins with "small", holds `only`."""
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in small.cases():
            name = f"small {case}"
            if only is None or only in name:
                rows.append(small.row(case, harness.measure(small.steps(case), seconds, least=25)))
                _show(name, rows[-1])
    finally:
        torch.set_num_threads(threads)
    for line in small.summary(rows):
        print(line)
    return rows


def _compiles(case: Case) -> bool:
    return (
        case.mode == "forward+backward"
        and case.shape in COMPILED
        and case.layout == "contiguous"
        and str(case.dtype) == "torch.float32"
    )


def _show(name: str, row: dict[str, Any]) -> None:
    ratios = "  ".join(f"{k} {v:.2f}" for k, v in row.items() if "/" in k)
    print(f"{name:<70} {ratios}", flush=True)
