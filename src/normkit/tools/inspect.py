"""The norm doctor: a linter for the normalization of a model on its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normkit.tools.findings import Finding
from normkit.tools.measure import Facts, Layer, measure
from normkit.tools.model import (
    Forward,
    ToolError,
    again,
    check_loader,
    first_input,
    inner,
    taken,
)
from normkit.tools.norms import unknown_norms
from normkit.tools.page import page
from normkit.tools.recalibrate import recalibrate
from normkit.tools.restore import preserved, undone_on_failure
from normkit.tools.rules import RULES
from normkit.tools.swap import swap
from normkit.tools.table import Report

_MENDED_BY_RECALIBRATE = ("train-eval-gap", "never-updated", "stale")
_MENDED_BY_SWAP = "near-overflow"


@dataclass
class Inspection(Report):
    """The findings as rows; `layers` is what they were judged by.

    `mended` are those that `fix=True` made go away.
    """

    layers: list[Layer] = field(repr=False, default_factory=list)
    mended: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The findings and the facts as plain values."""
        return {**super().to_dict(), "mended": [dataclasses.asdict(f) for f in self.mended]}

    def __str__(self) -> str:
        """The findings as a linter prints them, and a line that counts them."""
        lines = [str(row) for row in self.rows]
        lines += [f"mended {f.layer}: {f.code} {f.name}: {f.measured}" for f in self.mended]
        norms = f"{self.facts['norms']} norms, {self.facts['batches']} batches"
        lines += [f"{n}: unknown norm: {w}" for n, w in self.facts.get("unknown norms", {}).items()]
        count = len(self.rows)
        said = "no findings" if not count else f"{count} finding{'s' * (count > 1)}"
        lines.append(f"{said} ({norms})" if self.layers else "no norms here; nothing to inspect")
        return "\n".join(lines)

    def to_html(self) -> str:
        """A page that opens offline: the findings, and each layer's data."""
        return page(self.model, self.rows, self.layers, self.facts["batches"])


def inspect(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Forward | None = None,
    *,
    validation: Iterable[Any] | None = None,
    batches: int = 8,
    ignore: Iterable[str] = (),
    fix: bool = False,
) -> Inspection:
    """Look for faults of normalization in a model, on a few batches, and change nothing.

    The batches run as in training (batch statistics, dropout off, no running average moves) and as
    in evaluation; rules (`normkit.tools.rules.RULES`) judge what was measured. Weights, buffers,
    gradients, hooks, train or eval of every module, the optimizer and all random states are as they
    were, also after an exception.

    Args:
        model: any module, as it is trained.
        loader: training batches; a tensor, or a tuple that starts with one, unless `forward` is
            given.
        loss: `loss(output, batch)` is a scalar; with it gradients are measured for the page.
        optimizer: with it its groups are looked at.
        forward: `forward(model, batch)`; by default as for `recalibrate`.
        validation: validation batches, to compare with the training ones.
        batches: at most so many of each.
        ignore: codes of rules to leave out, as "NK10".
        fix: then mend what can be mended safely: running statistics by `recalibrate` with the whole
            loader, overflow by `swap`. What went away is in the report's `mended`.

    Returns:
        an `Inspection`, with one `Finding` a row; `.to_html()` is a page with every layer's data.

    Raises:
        ToolError: an empty loader, an unknown code, batches of an unknown form, a model of
            scripted, quantized or lazy modules.
    """
    given = taken(model)
    model = inner(given)
    ignored = set(ignore)
    if missing := ignored - {rule.code for rule in RULES}:
        raise ToolError(
            f"unknown code {sorted(missing)[0]!r}; known: {', '.join(r.code for r in RULES)}"
        )
    check_loader(loader)
    if batches < 1:
        raise ToolError(f"batches must be at least 1, got {batches}")
    run = forward or first_input
    if fix:
        again(loader, "fix=True")
    with preserved(model, loader, validation, loss):
        train = list(islice(loader, batches))
        if not train:
            raise ToolError("the loader is empty; give at least one batch")
        held = [] if validation is None else list(islice(validation, batches))
        facts = measure(model, train, held, run, loss, optimizer)
    findings = _judge(facts, ignored)
    counts: dict[str, Any] = {"norms": len(facts.layers), "batches": len(train)}
    if unknown := unknown_norms(model):
        counts["unknown norms"] = unknown
    report = Inspection(given, findings, counts, facts.layers)
    if not fix:
        return report
    with undone_on_failure(given, tensors=list(given.buffers())):
        if not _mend(given, findings, loader, run):
            return report
        now = inspect(
            *(given, loader, loss, optimizer, run),
            validation=validation,
            batches=batches,
            ignore=ignored,
        )
        left = {(f.code, f.layer) for f in now.rows}
        now.mended = [f for f in findings if (f.code, f.layer) not in left]
        return now


def _judge(facts: Facts, ignored: set[str]) -> list[Finding]:
    return [
        Finding(rule.code, rule.name, layer, measured, rule.why, mend)
        for rule in RULES
        if rule.code not in ignored
        for layer, measured, mend in rule.check(facts, rule.threshold)
    ]


def _mend(model: nn.Module, findings: list[Finding], loader: Iterable[Any], run: Forward) -> bool:
    """Apply the safe changes; return whether there were any."""
    overflowing = {f.layer for f in findings if f.name == _MENDED_BY_SWAP}
    stale = [f for f in findings if f.name in _MENDED_BY_RECALIBRATE]
    if overflowing:
        swap(model, only=lambda name, module: name in overflowing)
    if stale:
        recalibrate(model, loader, run)
    return bool(overflowing or stale)
