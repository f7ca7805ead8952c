"""Does normalization widen the range of learning rates that work, and is its best rate larger?

Bjorck et al. 2018 explain what batch norm gains by the larger rates that it makes possible. De &
Smith 2020 find the best rate larger at large batches only: at small ones it is similar with and
without. Nine rates, about half a decade apart, from a hundredth to a hundred times the
configuration's, without norm, with batch norm and with layer norm; without and with batch norm
also in batches of 8, with as many samples in all and at the same rates. The rule looks, for each
seed, at test accuracy over the rate:

- A rate is stable at which a run doesn't diverge and ends with a loss on the training part below
  that of a guess, the logarithm of the number of classes. At others accuracy counts as 0.
- Range that works: the rates around the best whose accuracy is at least 99 % of the best of that
  arm and seed; between two rates accuracy is taken for linear in the log rate. The range ends at
  the ends of the grid. Its width is in decades; 0 where no rate is stable.
- Best rate: the one with the highest smoothed final validation accuracy; of equals the geometric
  mean.
- Wider, at each batch size: with batch norm less without, by seed, it holds when the interval of
  the median lies above a quarter of a decade, is reversed when it lies below minus that, and is
  "little difference" when it lies between.
- Best rates, the log ratio with over without: similar when the interval of the median lies within
  one step of the grid, else larger when it lies above 1, smaller when below. "Larger best rate"
  (the configuration's batches; Bjorck's claim) holds when larger, is reversed when smaller, and is
  "little difference" when similar. "Similar best rate at small batches" (De & Smith's) holds when
  similar, is reversed when larger or smaller.
- Four claims named beforehand, each about one effect. The table's comparisons of widths with no
  norm, of which any may be picked out, are paired t tests corrected by Holm.

Measured besides: the largest stable rate.

History: fixed before the first study.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from normkit.lab.report.figures import Axis, Interval, Line, intervals, panels, short
from normkit.lab.results.measures import final, percent, said, tested
from normkit.lab.results.store import Run
from normkit.lab.results.verdict import (
    Comparison,
    Estimate,
    Verdict,
    Word,
    compare,
    estimate,
    headline,
    matters,
    negligible,
    seeds_to_place,
    settling,
    word,
)
from normkit.lab.study import Evidence, Figure, Findings, NotApplicable, Study
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.lab.training.probe import Probe
from normkit.lab.training.train import score

FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SMALL = 8
NORMS = {"none": "no norm", "batch": "batch norm", "layer": "layer norm"}
COLOURS = {"none": 0, "batch": 1, "layer": 2}
SHARE = 0.99
WIDTH_MARGIN = 0.25
"""Decades of width that are little."""
ONE_STEP = max(math.log10(b / a) for a, b in pairwise(FACTORS)) + 1e-6
"""The grid's largest step, in decades: best rates that are nearer are similar."""
_SAMPLES = 2_000


def arms(config: Config, data: Data) -> list[Arm]:
    """Return an arm for every norm, batch size and rate."""
    if len(data.train[0]) < config.batch_size:
        raise NotApplicable(
            f"{len(data.train[0])} training samples don't fill a batch of {config.batch_size}"
        )
    found = [
        Arm(f"{norm}-{config.batch_size}", f"{label}, batches of {config.batch_size}", norm=norm)
        for norm, label in NORMS.items()
    ]
    if config.batch_size > SMALL:
        found += [
            Arm(
                f"{norm}-{SMALL}",
                f"{NORMS[norm]}, batches of {SMALL}",
                norm=norm,
                options={"batch_size": SMALL},
            )
            for norm in ("none", "batch")
        ]
    return [arm.at(factor) for arm in found for factor in FACTORS]


def finish(at: Probe) -> dict[str, Any]:
    """Return whether training ended with a loss below that of a guess, on the training part."""
    loss = score(at.model, (at.data.train[0][:_SAMPLES], at.data.train[1][:_SAMPLES]))[0]
    return {"stable": loss < math.log(at.data.classes)}


def working(logs: Sequence[float], values: Sequence[float], share: float) -> tuple[float, float]:
    """Return the ends of the range around the best of `values` that has `share` of the best.

    `values` are taken for linear between the ascending `logs`; the range ends at their ends. It is
    a single point without a value above 0.
    """
    best = max(range(len(values)), key=lambda i: values[i])
    if not values[best] > 0:
        return logs[best], logs[best]
    least = share * values[best]

    def end(step: int) -> float:
        i = best
        while 0 <= i + step < len(values):
            if values[i + step] < least:
                part = (values[i] - least) / (values[i] - values[i + step])
                return logs[i] + part * (logs[i + step] - logs[i])
            i += step
        return logs[i]

    return end(-1), end(1)


@dataclass(frozen=True)
class Reach:
    """What the rates did to one arm and seed: log10 of the factors of the rate, and accuracy.

    The best rate, the ends of the range that works, the largest stable rate (minus infinity where
    there is none).
    """

    best: float
    low: float
    high: float
    stable: float
    accuracy: float

    @property
    def width(self) -> float:
        """Say how many decades the range that works spans."""
        return self.high - self.low


def reach_of(runs: Mapping[str, Sequence[Run]], name: str) -> dict[int, Reach]:
    """Return the reach of an arm by seed, for the seeds that were run at all its rates."""
    tried = [(math.log10(f), runs[key]) for f in FACTORS if (key := f"{name}@{f:g}") in runs]
    by_seed: dict[int, list[tuple[float, Run]]] = {}
    for log, found in tried:
        for run in found:
            by_seed.setdefault(run.seed, []).append((log, run))
    return {seed: _reach(each) for seed, each in by_seed.items() if len(each) == len(tried)}


def _reach(tried: Sequence[tuple[float, Run]]) -> Reach:
    logs = [log for log, _ in tried]
    values = [tested(run) if run.found.get("stable") else 0.0 for _, run in tried]
    merits = [round(final(run), 9) for _, run in tried]
    best = [log for log, merit in zip(logs, merits, strict=True) if merit == max(merits)]
    stable = [log for log, run in tried if run.found.get("stable")]
    low, high = working(logs, values, SHARE)
    return Reach(sum(best) / len(best), low, high, max(stable, default=-math.inf), max(values))


def judge(evidence: Evidence) -> Findings:
    """Return the verdicts, table and figures."""
    config, runs = evidence.config, evidence.runs
    names = list(dict.fromkeys(arm.name.partition("@")[0] for arm in evidence.arms))
    found = {name: reach for name in names if (reach := reach_of(runs, name))}
    labels = {arm.name.partition("@")[0]: arm.label for arm in evidence.arms}
    sizes = list(dict.fromkeys(int(name.partition("-")[2]) for name in names))
    verdicts = []
    for size in sizes:
        none, batch = (found.get(f"{norm}-{size}") for norm in ("none", "batch"))
        if none and batch:
            verdicts += [_wider(none, batch, size), _best_rate(none, batch, size, config)]
    family = {
        name: _by_seed(reach, found[base], "width")
        for name, reach in found.items()
        if (base := f"none-{name.partition('-')[2]}") in found and name != base
    }
    compared = compare(family)
    missing = len(FACTORS) * len(names) - len(runs)
    return Findings(
        headline=headline(verdicts),
        verdicts=verdicts,
        columns=[
            "Arm",
            "Decades of rates that work",
            "Wider than no norm by",
            "Told apart (Holm)",
            "Smallest that works",
            "Largest that works",
            "Best rate",
            "Largest stable rate",
            "Best test accuracy",
        ],
        rows=[
            _row(config, labels[name], reach, compared.get(name)) for name, reach in found.items()
        ],
        figures=list(_figures(evidence, found, labels, sizes)),
        notes=[
            f"Rates from {_rate(config, math.log10(FACTORS[0]))} to "
            f"{_rate(config, math.log10(FACTORS[-1]))}, about half a decade apart, the same for "
            "every arm and batch size.",
            "A rate works that gives at least 99 % of the best test accuracy of its arm and seed; "
            "between two rates accuracy is taken for linear in the log rate. At a rate that isn't "
            "stable accuracy counts as 0. A range that goes to an end of the grid may be wider "
            "than is said. Where test samples are few, the best of nine accuracies is partly luck, "
            "and the range around it narrower than it would be.",
            "Best rate: by the smoothed final validation accuracy. Largest stable rate: the "
            "largest at which training didn't diverge and ended with a loss below that of a guess.",
            "Best test accuracy is that of the best of the rates, and as such too good: it says "
            "what the ranges are relative to, not how good an arm is.",
            "“Told apart”: paired t tests on the widths against no norm at the same batch size, "
            "corrected by Holm.",
            f"Medians with their exact 95 % interval over {config.seeds} seeds, paired: same "
            "initial weights, same batches. Four claims named beforehand. Every arm saw as many "
            "samples.",
            *(
                [f"{missing} rates were left out by --arms: ranges are of those that were run."]
                if missing
                else []
            ),
        ],
    )


STUDY = Study(
    name="learning-rate",
    claim="Batch normalization widens the range of learning rates that work.",
    source="Bjorck et al. 2018, Understanding Batch Normalization (arXiv:1806.02375); on the best "
    "rate at small batches against it, De & Smith 2020 (arXiv:2002.10444).",
    arms=arms,
    judge=judge,
    finish=finish,
    length=0.15,
    published="At a low rate batch norm and none end alike, and batch norm wins through the larger "
    "rate (Bjorck et al.); at small batches the best rate is similar with and without (De & "
    "Smith).",
)


Reached = Mapping[int, Reach]


def _each(reached: Reached, what: str) -> list[float]:
    return [getattr(reach, what) for reach in reached.values()]


def _by_seed(ours: Reached, theirs: Reached, what: str) -> list[float]:
    both = [seed for seed in ours if seed in theirs]
    return [getattr(ours[seed], what) - getattr(theirs[seed], what) for seed in both]


def _decades(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _times(value: float) -> str:
    return f"{10**value:.3g}"


def _rate(config: Config, log: float) -> str:
    assert config.lr is not None
    return "none" if math.isinf(log) else f"{float(f'{config.lr * 10**log:.2g}'):g}"


def _wider(none: Reached, batch: Reached, size: int) -> Verdict:
    values = _by_seed(batch, none, "width")
    outcome = matters(estimate(values), WIDTH_MARGIN)
    widths = [estimate(_each(reached, "width")).median for reached in (batch, none)]
    text = (
        f"Rates within 1 % of the best accuracy span {widths[0]:.2f} decades with batch norm and "
        f"{widths[1]:.2f} without: {said(estimate(values), _decades)} by seed."
    )
    if ends := sum(reach.high >= math.log10(FACTORS[-1]) for reach in batch.values()):
        text += f" With batch norm {ends} of {len(values)} ranges go to the end of the grid."
    if outcome == Word.INCONCLUSIVE:
        text += settling(seeds_to_place(values, WIDTH_MARGIN))
    return Verdict(f"Wider range at batches of {size}", outcome, text)


def larger_rate(effect: Estimate) -> Word:
    """Return the verdict on a log10 ratio of best rates that the claim says is positive.

    LITTLE_DIFFERENCE where the whole interval lies within one step of the grid.
    """
    if negligible(effect, ONE_STEP) == Word.HOLDS:
        return Word.LITTLE_DIFFERENCE
    return word(effect)


def _best_rate(none: Reached, batch: Reached, size: int, config: Config) -> Verdict:
    values = _by_seed(batch, none, "best")
    outcome = larger_rate(estimate(values))
    if size == config.batch_size:
        claim = f"Larger best rate at batches of {size}"
    else:
        claim = f"Similar best rate at batches of {size}"
        outcome = {Word.LITTLE_DIFFERENCE: Word.HOLDS, Word.HOLDS: Word.REVERSED}.get(
            outcome, outcome
        )
    best = [_rate(config, estimate(_each(reached, "best")).median) for reached in (batch, none)]
    text = (
        f"The best rate is {best[0]} with batch norm and {best[1]} without, by the median; by seed "
        f"it is {said(estimate(values), _times, '×')} as large with."
    )
    if outcome == Word.INCONCLUSIVE:
        text += settling(seeds_to_place(values, ONE_STEP))
    return Verdict(claim, outcome, text)


def _row(config: Config, label: str, reached: Reached, told: Comparison | None) -> list[str]:
    def rates(what: str) -> str:
        return said(estimate(_each(reached, what)), lambda log: _rate(config, log))

    widths = estimate(_each(reached, "width"))
    words = {Word.HOLDS: "wider", Word.REVERSED: "narrower"}
    return [
        label,
        said(widths, lambda value: f"{value:.2f}"),
        said(told.effect, _decades) if told else "",
        f"{words.get(told.word, told.word)}, p = {told.p:.2g}" if told else "",
        rates("low"),
        rates("high"),
        rates("best"),
        rates("stable"),
        said(estimate(_each(reached, "accuracy")), percent),
    ]


def _figures(
    evidence: Evidence,
    found: Mapping[str, Reached],
    labels: Mapping[str, str],
    sizes: Sequence[int],
) -> Iterator[Figure]:
    config, n = evidence.config, evidence.config.seeds
    assert config.lr is not None
    yield panels(
        name="accuracy",
        title="Test accuracy over the learning rate",
        caption=f"Median of {n} seeds; the band spans all seeds. A run that diverged has accuracy "
        "0. Every arm saw as many samples.",
        alt="Test accuracy against the learning rate, a panel for each batch size, a line for each "
        "norm.",
        shown=[
            (
                f"batches of {size}",
                [_curve(evidence, norm, size) for norm in NORMS if f"{norm}-{size}" in found],
            )
            for size in sizes
        ],
        x=Axis("learning rate", log=True),
        y=Axis("test accuracy", format=".0%"),
    )
    for name, what, title, caption, axis in (
        (
            "widths",
            "width",
            "How wide the range is that works",
            "Rates around the best with at least 99 % of its test accuracy",
            Axis("decades of rates"),
        ),
        (
            "best",
            "best",
            "The best rate",
            "The rate with the highest final validation accuracy",
            Axis("learning rate", log=True),
        ),
        (
            "stable",
            "stable",
            "The largest stable rate",
            "The largest rate at which training didn't diverge and ended with a loss below that "
            f"of a guess; the grid ends at {_rate(config, math.log10(FACTORS[-1]))}",
            Axis("learning rate", log=True),
        ),
    ):
        rows = []
        for each, reached in found.items():
            values = _each(reached, what)
            if axis.log:
                values = [config.lr * 10**value for value in values]
            rows.append(Interval(labels[each], COLOURS[each.partition("-")[0]], estimate(values)))
        yield intervals(
            name=name,
            title=title,
            caption=f"{caption}: median and 95 % interval of {n} seeds.",
            alt="; ".join(f"{row.label}: {row.effect.median:.3g}" for row in rows),
            rows=rows,
            x=axis,
        )


def _curve(evidence: Evidence, norm: str, size: int) -> Line:
    assert evidence.config.lr is not None
    found = [
        (evidence.config.lr * factor, [tested(run) for run in runs])
        for factor in FACTORS
        if (runs := evidence.runs.get(f"{norm}-{size}@{factor:g}"))
    ]
    return Line(
        NORMS[norm],
        COLOURS[norm],
        [rate for rate, _ in found],
        short(estimate(values).median for _, values in found),
        short(min(values) for _, values in found),
        short(max(values) for _, values in found),
        markers=True,
    )
