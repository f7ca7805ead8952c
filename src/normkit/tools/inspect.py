"""The norm doctor: a linter for the normalization of a model on its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from normkit.tools.findings import Finding
from normkit.tools.measure import Facts, Layer, Lonely, lonely_layer, measure
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
from normkit.tools.rules import RECALIBRATE, RULES, Found, Rule
from normkit.tools.swap import swap
from normkit.tools.table import Report
from normkit.tools.trials import Pool, Trials, sample_count

_MENDED_BY_SWAP = "near-overflow"
_MOST_CAUSES = 8
"""After so many causes are undone one after the other, what is left is taken as it was found."""


@dataclass
class Inspection(Report):
    """The findings as rows, those that cost the most first.

    Attributes:
        notes: what is worth knowing and needs no mending.
        layers: what was measured at each norm.
        mended: the findings that `fix=True` made go away.
    """

    notes: list[Finding] = field(default_factory=list)
    layers: list[Layer] = field(repr=False, default_factory=list)
    mended: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The findings and the facts as plain values."""
        more = {"notes": self.notes, "mended": self.mended}
        return {
            **super().to_dict(),
            **{name: [dataclasses.asdict(f) for f in found] for name, found in more.items()},
        }

    def __str__(self) -> str:
        """The findings as a linter prints them, and a line that counts them."""
        lines = [str(row) for row in self.rows]
        lines += [f"note {note}" for note in self.notes]
        lines += [f"mended {f.where}: {f.code} {f.name}: {f.measured}" for f in self.mended]
        norms = f"{self.facts['norms']} norms, {self.facts['batches']} batches"
        lines += [f"{n}: unknown norm: {w}" for n, w in self.facts.get("unknown norms", {}).items()]
        count = len(self.rows)
        said = "no findings" if not count else f"{count} finding{'s' * (count > 1)}"
        seen = self.layers or self.rows
        lines.append(f"{said} ({norms})" if seen else "no norms here; nothing to inspect")
        return "\n".join(lines)

    def to_html(self) -> str:
        """A page that opens offline: the findings, and each layer's data."""
        return page(self.model, self.rows, self.notes, self.layers, self.facts["batches"])


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
    in evaluation; rules (`normkit.tools.rules.RULES`) judge what was measured. Suspects are tried:
    the model runs again without them, and what evaluation gains is what they cost. Findings come by
    cost, without those that follow from another. Weights, buffers, gradients, hooks, train or eval
    of every module, the optimizer and all random states are as they were, also after an exception.

    Args:
        model: any module, as it is trained.
        loader: training batches; a tensor, or a tuple that starts with one, unless `forward` is
            given.
        loss: `loss(output, batch)` is a scalar. With it costs are in loss, and what doesn't lower
            it is no finding; without it they are changes of the outputs, and thresholds are higher.
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
    rules = [rule for rule in RULES if rule.code not in ignored]
    with preserved(model, loader, validation, loss):
        train = list(islice(loader, batches))
        if not train:
            raise ToolError("the loader is empty; give at least one batch")
        held = [] if validation is None else list(islice(validation, batches))
        trials = Trials(model, train, held, run, loss)
        lonely = _lonely(trials, loader)
        facts = measure(trials, optimizer, lonely, gradients=loss is not None)
        findings = _causes(facts, rules)
    counts: dict[str, Any] = {"norms": len(facts.layers), "batches": len(train)}
    if found := unknown_norms(model):
        counts["unknown norms"] = found
    report = Inspection(
        given,
        [f for f in findings if not f.note],
        counts,
        [f for f in findings if f.note],
        facts.layers,
    )
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
        left = {(f.code, f.layers) for f in now.rows}
        now.mended = [f for f in report.rows if (f.code, f.layers) not in left]
        return now


def _causes(facts: Facts, rules: Sequence[Rule]) -> list[Finding]:
    """What the rules find, the costliest first, without what follows from something else.

    The costliest suspect is undone and everything is measured again: what isn't found any more was
    its consequence.
    """
    unit = "output" if facts.trials.loss is None else "loss"
    causes: list[tuple[Rule, Found]] = []
    hits = [(rule, found) for rule in rules for found in rule.check(facts, rule.threshold)]
    while True:
        hits.sort(key=lambda hit: (hit[0].symptom, -(hit[1].cost or 0.0)))
        at = next((i for i, (_, found) in enumerate(hits) if found.undo), None)
        if at is None or len(causes) >= _MOST_CAUSES:
            break
        causes += hits[: at + 1]
        undo = hits[at][1].undo
        assert undo is not None
        left = {rule.code for rule, _ in hits[at + 1 :]}
        if not left:
            hits = []
            break
        with torch.no_grad():
            undo()
        facts = measure(facts.trials, facts.optimizer, facts.lonely)
        hits = [
            (rule, found)
            for rule in rules
            if rule.code in left
            for found in rule.check(facts, rule.threshold)
        ]
    hits = causes + hits
    explained = any(found.cost and not rule.symptom for rule, found in hits)
    return [rule.finding(found, unit) for rule, found in hits if not (rule.symptom and explained)]


def _lonely(trials: Trials, loader: Iterable[Any]) -> Lonely | None:
    """A batch of one by which a layer can't normalize; such batches are taken out of the trials."""
    ones = [i for i, batch in enumerate(trials.batches) if sample_count(batch) == 1]
    from_dataset, last = isinstance(loader, DataLoader), None
    total = len(trials.batches)
    if isinstance(loader, DataLoader):
        size, sampler = loader.batch_size, loader.sampler
        if size and not loader.drop_last and isinstance(sampler, Sized):
            total = -(-len(sampler) // size)
            pool = Pool.of(trials.batches[:1]) if len(sampler) % size == 1 else None
            last = pool and pool.of_size(1, 1)[0]
    elif isinstance(loader, Sequence):
        total = len(loader)
        last = loader[-1] if sample_count(loader[-1]) == 1 else None
    example = trials.batches[ones[0]] if ones else last
    layer = None if example is None else lonely_layer(trials, example)
    if layer is None:
        return None
    trials.batches = [batch for i, batch in enumerate(trials.batches) if i not in ones]
    return Lonely(layer, ones[0] + 1 if ones else total, total, from_dataset)


def _mend(model: nn.Module, findings: list[Finding], loader: Iterable[Any], run: Forward) -> bool:
    """Apply the safe changes; return whether there were any."""
    safe = {rule.code for rule in RULES if rule.safe}
    found = [f for f in findings if f.code in safe and f.fix.startswith("normkit.")]
    overflowing = {layer for f in found if f.name == _MENDED_BY_SWAP for layer in f.layers}
    if overflowing:
        swap(model, only=lambda name, module: name in overflowing)
    if any(f.fix.startswith(RECALIBRATE) for f in found):
        recalibrate(model, loader, run)
    return bool(found)
