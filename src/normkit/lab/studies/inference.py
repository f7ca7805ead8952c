"""Do running averages serve at test time, where a batch's statistics cannot?

Ioffe & Szegedy 2015, section 3.1 and algorithm 2. One network with batch norm is trained for each
momentum of the running averages (torch's convention, the weight of the new batch), and looked at
when its training is over; nothing is tuned. The rule, on test accuracy at momentum 0.1, by seed:

- Running averages serve: their accuracy is within one percentage point of that with the statistics
  of test batches of 256 (or the most that the test part has).
- Batch statistics need a batch: from test batches of 256 to batches of 2 their accuracy falls by
  more than one point.
- Single samples work: with running averages, samples that come one at a time get the scores that
  they get in a batch: the largest difference, over the largest score, is below 1e-4 in every run.
  (It holds or is reversed for each run, without an interval.)
- Recalibration changes little: accuracy with the exact statistics of the training part is within
  one point of that with running averages.
- A drifting stream breaks the averages: the test part comes as a stream of batches of 32 whose
  inputs grow to twice their size and move by one standard deviation; over its last quarter the
  statistics of the batch are more than one point better than the averages.

Five claims, each about one effect named beforehand, each with its own verdict.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normkit.lab.report.figures import Axis, Line, lines, panels
from normkit.lab.results.measures import interval, percent, points, said
from normkit.lab.results.store import Run
from normkit.lab.results.verdict import (
    Verdict,
    Word,
    estimate,
    headline,
    negligible,
    settled_by,
    word,
)
from normkit.lab.study import Evidence, Figure, Findings, NotApplicable, Study
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.lab.training.models import norms
from normkit.lab.training.probe import Probe
from normkit.tools.recalibrate import recalibrate

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ARMS = (
    Arm("batch", "momentum 0.1", norm="batch"),
    Arm("slow", "momentum 0.01", norm="batch", arguments={"momentum": 0.01}),
    Arm("slowest", "momentum 0.001", norm="batch", arguments={"momentum": 0.001}),
    Arm("fast", "momentum 0.9", norm="batch", arguments={"momentum": 0.9}),
)
MARGIN = 0.01
ROUNDING = 1e-4
_COLOURS = {"batch": 1, "slow": 2, "slowest": 4, "fast": 3}
_STREAM_BATCH = 32
_QUARTERS = 4
_MOST = 2_000


def arms(config: Config, data: Data) -> Sequence[Arm]:
    """Return an arm for every momentum."""
    if len(data.test[0]) < 2 * _STREAM_BATCH:
        raise NotApplicable(
            f"{len(data.test[0])} test samples; two batches of {_STREAM_BATCH} at least are needed"
        )
    return ARMS


def probe(at: Probe) -> dict[str, float]:
    """Return validation accuracy with the statistics of batches as large as the training's."""
    x, y = at.data.validation
    return {"batch_accuracy": _accuracy(_by_batch(at.model, x, at.config.batch_size), y[: len(x)])}


@torch.no_grad()
def finish(at: Probe) -> dict[str, Any]:
    """Return test accuracies by the source of the statistics, and of a stream that drifts."""
    order = torch.randperm(len(at.data.test[0]), generator=torch.Generator().manual_seed(at.seed))
    x, y = (part[order[:_MOST].to(part.device)] for part in at.data.test)
    model = at.model.eval()
    scores = model(x)
    alone = torch.cat([model(sample) for sample in x.split(1)])
    found: dict[str, Any] = {
        "running": _accuracy(scores, y),
        "single": float((alone - scores).abs().max() / scores.abs().max()),
        "batch": {},
    }
    for size in (size for size in SIZES if size <= len(x)):
        try:
            found["batch"][str(size)] = _accuracy(_by_batch(model, x, size), y)
        except ValueError:
            # One value per channel has no variance to normalize by.
            found["batch"][str(size)] = None
    drifting = _drifted(x)
    found["stream"] = {
        "running": _by_quarter(model(drifting), y),
        "batch": _by_quarter(_by_batch(model, drifting, _STREAM_BATCH), y),
        "following": _by_quarter(_following(model, drifting), y),
    }
    recalibrate(model, at.data.train[0].split(at.config.batch_size))
    found["recalibrated"] = _accuracy(model(x), y)
    return found


def _by_batch(model: nn.Module, x: Tensor, size: int) -> Tensor:
    """Return the scores of batches of `size`, normalized by the batches' own statistics.

    Running averages don't move; all but the norms is in evaluation. The last batch is filled up
    from the one before, so that all have the same size.
    """
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    for norm in norms(model).values():
        norm.train()
    scores = []
    try:
        with torch.no_grad():
            for start in range(0, len(x), size):
                first = max(0, min(start, len(x) - size))
                scores.append(model(x[first : start + size])[start - first :])
        return torch.cat(scores)
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
        model.eval()


def _following(model: nn.Module, x: Tensor) -> Tensor:
    """Return the scores with running averages that each batch moves before it is scored."""
    model.eval()
    kept = [(b, b.clone()) for b in model.buffers()]
    scores = []
    for batch in x.split(_STREAM_BATCH):
        for norm in norms(model).values():
            norm.train()
        model(batch)
        model.eval()
        scores.append(model(batch))
    for buffer, value in kept:
        buffer.copy_(value)
    return torch.cat(scores)


def _drifted(x: Tensor) -> Tensor:
    """Return x[i] * (1 + t) + t, t from 0 to 1 along the stream, in whole batches."""
    whole = len(x) - len(x) % _STREAM_BATCH
    t = torch.linspace(0, 1, whole, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
    return x[:whole] * (1 + t) + t


def _accuracy(scores: Tensor, y: Tensor) -> float:
    return float((scores.argmax(1) == y).double().mean())


def _by_quarter(scores: Tensor, y: Tensor) -> list[float]:
    pairs = zip(scores.chunk(_QUARTERS), y[: len(scores)].chunk(_QUARTERS), strict=True)
    return [_accuracy(s, labels) for s, labels in pairs]


def judge(evidence: Evidence) -> Findings:
    """Return the verdicts, table and figures."""
    runs = [run for run in evidence.runs["batch"] if run.found]
    verdicts = _verdicts(runs) if runs else []
    return Findings(
        headline=headline(verdicts, "no run finished"),
        verdicts=verdicts,
        columns=[
            "Arm",
            "Running averages",
            "Batch statistics, 256",
            "Batch statistics, 2",
            "Recalibrated",
            "Stream's last quarter: running",
            "batch",
            "averages that follow",
        ],
        rows=[_row(arm, evidence.runs[arm.name]) for arm in evidence.arms],
        figures=[
            _size_figure(evidence),
            _stream_figure(runs),
            _training_figure(evidence),
        ],
        notes=[
            "Accuracies on the test part (at most 2,000 samples), in an order drawn for each seed. "
            "With batch statistics only the norms are in training mode, and what they would add to "
            "their running averages is taken back.",
            "The stream: batches of 32, inputs x (1 + t) + t with t from 0 to 1 from its first to "
            "its last sample. Averages that follow are moved by each batch, at the arm's momentum, "
            "before it is scored.",
            "Recalibrated: the running averages replaced by the exact statistics of the training "
            "part, in batches as in training (normkit.recalibrate).",
            f"Medians with their exact 95 % interval over {evidence.config.seeds} seeds. Five "
            "claims named beforehand, each with its own chance of at most 1 in 20 of being called "
            "wrongly.",
        ],
    )


STUDY = Study(
    name="inference",
    claim="At test time running averages replace the batch's statistics, and single samples work.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.1; Wu & Johnson 2021, Rethinking "
    "“Batch” in BatchNorm (arXiv:2105.07576), section 3",
    arms=arms,
    judge=judge,
    probe=probe,
    finish=finish,
    length=1 / 3,
    published="At test time moving averages stand for the batch's statistics (Ioffe & Szegedy); "
    "statistics of 1,000 to 10,000 samples beat the moving average, and the best validation error "
    "is at normalization batches of 32 to 128 (Wu & Johnson).",
)


def _verdicts(runs: Sequence[Run]) -> list[Verdict]:
    found = [run.found for run in runs]
    largest = max((size for size in found[0]["batch"]), key=int)
    running = [each["running"] for each in found]
    whole = [each["batch"][largest] for each in found]
    pairs = [each["batch"]["2"] for each in found]
    exact = [each["recalibrated"] for each in found]
    ends = [(each["stream"]["batch"][-1], each["stream"]["running"][-1]) for each in found]
    worst = max(each["single"] for each in found)

    def difference(a: Sequence[float], b: Sequence[float]) -> list[float]:
        return [x - y for x, y in zip(a, b, strict=True)]

    def small(claim: str, values: list[float], text: str) -> Verdict:
        effect = estimate(values)
        called = negligible(effect, MARGIN)
        tail = settled_by([MARGIN - abs(v) for v in values]) if called == Word.INCONCLUSIVE else ""
        return Verdict(claim, called, f"{text} {said(effect, points, ' points')}.{tail}")

    def large(claim: str, values: list[float], text: str) -> Verdict:
        effect = estimate(values)
        called = word(effect, MARGIN)
        tail = settled_by(values, MARGIN) if called == Word.INCONCLUSIVE else ""
        return Verdict(claim, called, f"{text} {said(effect, points, ' points')}.{tail}")

    few = len(runs) < 6
    return [
        small(
            "Running averages serve",
            difference(running, whole),
            f"Test accuracy is {percent(estimate(running).median)} with running averages and "
            f"{percent(estimate(whole).median)} with the statistics of test batches of {largest}; "
            "the difference by seed is",
        ),
        large(
            "Batch statistics need a batch",
            difference(whole, pairs),
            f"From test batches of {largest} to batches of 2, accuracy with the batch's statistics "
            f"falls to {percent(estimate(pairs).median)}, by",
        ),
        Verdict(
            "Single samples work",
            Word.RANGE_ONLY if few else Word.HOLDS if worst < ROUNDING else Word.REVERSED,
            "With running averages, the scores of samples that come one at a time differ from "
            f"those in a batch by at most {worst:.1e} of the largest score, in any of "
            f"{len(runs)} runs.",
        ),
        small(
            "Recalibration changes little",
            difference(exact, running),
            "With the exact statistics of the training part test accuracy is "
            f"{percent(estimate(exact).median)}; less that with running averages, by seed, it is",
        ),
        large(
            "A drifting stream breaks the averages",
            [batch - averages for batch, averages in ends],
            "Over the last quarter of the stream, accuracy is "
            f"{percent(estimate([b for b, _ in ends]).median)} with the batch's statistics and "
            f"{percent(estimate([a for _, a in ends]).median)} with running averages; the "
            "difference by seed is",
        ),
    ]


def _row(arm: Arm, runs: Sequence[Run]) -> list[str]:
    found = [run.found for run in runs if run.found]

    def cell(pick: Callable[[dict[str, Any]], float | None]) -> str:
        values = [value for each in found if (value := pick(each)) is not None]
        if not values:
            return ""
        effect = estimate(values)
        return f"{percent(effect.median)} ({interval(effect, percent)})"

    return [
        arm.label,
        cell(lambda each: each["running"]),
        cell(lambda each: each["batch"][max(each["batch"], key=int)]),
        cell(lambda each: each["batch"]["2"]),
        cell(lambda each: each["recalibrated"]),
        *(
            cell(lambda each, source=source: each["stream"][source][-1])  # type: ignore[misc]
            for source in ("running", "batch", "following")
        ),
    ]


def _size_figure(evidence: Evidence) -> Figure:
    shown = []
    for arm in evidence.arms:
        found = [run.found for run in evidence.runs[arm.name] if run.found]
        if not found:
            continue
        sizes = [size for size in found[0]["batch"] if found[0]["batch"][size] is not None]
        effects = [estimate([each["batch"][size] for each in found]) for size in sizes]
        numbers = [int(size) for size in sizes]
        running = estimate([each["running"] for each in found])
        ends = [1, max(numbers)]
        shown.append(
            (
                arm.label,
                [
                    Line(
                        "statistics of the test batch",
                        4,
                        numbers,
                        [e.median for e in effects],
                        [e.low for e in effects],
                        [e.high for e in effects],
                        markers=True,
                    ),
                    Line(
                        "running averages",
                        1,
                        ends,
                        [running.median] * 2,
                        [running.low] * 2,
                        [running.high] * 2,
                    ),
                ],
            )
        )
    return panels(
        name="sizes",
        title="Test accuracy over the size of a test batch",
        caption="Median over the seeds and its 95 % interval, by the momentum of training. Running "
        "averages don't depend on the test batch. A batch of one is drawn where it has more than "
        f"one value per channel. N = {evidence.config.seeds} seeds.",
        alt="Accuracy with the statistics of the test batch rises with its size; with running "
        "averages it is the same for all sizes.",
        shown=shown,
        x=Axis("samples in a test batch", log=True, format=","),
        y=Axis("test accuracy", format=".0%"),
    )


def _stream_figure(runs: Sequence[Run]) -> Figure:
    labels = {
        "batch": ("statistics of the batch", 4),
        "following": ("averages that follow", 2),
        "running": ("running averages of training", 1),
    }
    drawn = []
    for source, (label, colour) in labels.items():
        effects = [
            estimate([run.found["stream"][source][quarter] for run in runs])
            for quarter in range(_QUARTERS if runs else 0)
        ]
        drawn.append(
            Line(
                label,
                colour,
                list(range(1, len(effects) + 1)),
                [e.median for e in effects],
                [e.low for e in effects],
                [e.high for e in effects],
                markers=True,
            )
        )
    return lines(
        name="stream",
        title="A stream of inputs that drifts",
        caption="Test accuracy over the quarters of a stream whose inputs grow to twice their size "
        f"and move by one standard deviation. Momentum 0.1; median of {len(runs)} seeds and its "
        "95 % interval.",
        alt="Accuracy by quarter of a drifting stream, for three sources of the statistics.",
        drawn=drawn if runs else [],
        x=Axis("quarter of the stream"),
        y=Axis("test accuracy", format=".0%"),
    )


def _training_figure(evidence: Evidence) -> Figure:
    drawn: list[Line | None] = []
    for arm in evidence.arms:
        found = [
            run
            for run in evidence.runs[arm.name]
            if run.status == "finished" and "batch_accuracy" in run.curves
        ]
        if not found:
            continue
        steps = found[0].curves["batch_accuracy"][0]
        gaps = []
        for run in found:
            running = dict(zip(*run.curves["validation_accuracy"], strict=True))
            own = dict(zip(*run.curves["batch_accuracy"], strict=True))
            gaps.append([own[step] - running[step] for step in steps])
        effects = [estimate(column) for column in zip(*gaps, strict=True)]
        drawn.append(
            Line(
                arm.label,
                _COLOURS[arm.name],
                steps,
                [100 * e.median for e in effects],
                [100 * e.low for e in effects],
                [100 * e.high for e in effects],
                markers=True,
            )
        )
    return lines(
        name="training",
        title="How far running averages lag during training",
        caption="Validation accuracy with the statistics of the batch less that with running "
        f"averages, in percentage points, by momentum. Median of {evidence.config.seeds} seeds and "
        "its 95 % interval.",
        alt="The gap between batch statistics and running averages over training, by momentum.",
        drawn=drawn,
        y=Axis("gap, percentage points"),
        level=(0.0, "no gap"),
    )
