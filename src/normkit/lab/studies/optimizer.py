"""Do optimizers change the way down, and does normalization change the surface?

A common account. That normalization makes the surface smoother is in Santurkar et al. 2018; that
the optimizer has its part in the surface that it meets, as its rate bounds the curvature that it
can stay in, is in Cohen et al. 2021. Four optimizers, without norm and with batch norm, each at its
own rate (SGD's and momentum's of the network, 0.001 for RMSProp and Adam) and at the best of a
grid, at which the rule looks:

- Optimizers change the way down: per seed and network the log ratio of the steps to the target, SGD
  over each other optimizer; the target is 98 % of the median final smoothed validation accuracy of
  SGD without norm, and a run that never reaches it counts as reaching it at the very end. It holds
  when at least one of these ratios is above or below 1 by a paired t test corrected by Holm over
  all six, else is "little difference" when the interval of every median lies within a factor of
  1.5.
- Normalization changes the surface more: the curvature is the largest eigenvalue of the Hessian of
  the training loss in all weights. As it changes along the way, all arms of a seed are compared at
  one loss: the lowest that each of them reached. Per seed, the mean over optimizers of the absolute
  log ratio of curvatures without over with norm, less the mean over all pairs of optimizers in each
  network of the absolute log ratio between the two. Both are mean distances between two runs that
  differ in one thing. It holds when the interval of the median lies above 0, is reversed when it
  lies below: then another optimizer changes the curvature more than the norm does. Seeds with a
  diverged run are left out.

Loss and curvature are measured at thirty times of a run on the same 4 batches of training samples,
as large as the training's, in training mode: batch norm takes each one's statistics. The eigenvalue
is by power iteration; between two times its logarithm is taken for linear in that of the loss.

History: fixed before the first study.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from torch import nn

from normkit.lab.numerics import POWER_ITERATIONS, curvature
from normkit.lab.report.contrast import STEPS_MARGIN
from normkit.lab.report.figures import (
    ACCURACY,
    Axis,
    Interval,
    Line,
    intervals,
    over_seeds,
    panels,
    short,
)
from normkit.lab.results.measures import (
    VALIDATION,
    arrivals,
    count,
    exponential,
    percent,
    said,
    speedups,
    target_of,
    tested,
    times,
)
from normkit.lab.results.store import Run
from normkit.lab.results.verdict import (
    Comparison,
    Estimate,
    Verdict,
    Word,
    compare,
    estimate,
    headline,
    negligible,
    seeds_to_place,
    settled_by,
    settling,
    word,
)
from normkit.lab.study import Evidence, Figure, Findings, NotApplicable, Study
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import OPTIMIZERS, Config
from normkit.lab.training.data import Data
from normkit.lab.training.probe import Probe

NAMES = {"sgd": "SGD", "momentum": "momentum", "rmsprop": "RMSProp", "adam": "Adam"}
NETWORKS = {"none": "no norm", "batch": "batch norm"}
COLOURS = {"sgd": 0, "momentum": 2, "rmsprop": 3, "adam": 5}
_BATCHES = 4


def arms(config: Config, data: Data) -> list[Arm]:
    """Return an arm for every optimizer without and with norm.

    A rate that was given is that of the configuration's optimizer; the others start from theirs.
    """
    if len(data.train[0]) < _BATCHES * config.batch_size:
        raise NotApplicable(
            f"{len(data.train[0])} training samples; the curvature is measured on {_BATCHES} "
            f"batches of {config.batch_size}"
        )
    return [
        Arm(
            f"{optimizer}-{norm}",
            f"{NAMES[optimizer]}, {label}",
            norm=norm,
            options={"optimizer": optimizer}
            | ({} if optimizer == config.optimizer else {"lr": None}),
        )
        for norm, label in NETWORKS.items()
        for optimizer in OPTIMIZERS
    ]


def probe(at: Probe) -> dict[str, float]:
    """Return the loss and its curvature on the same training samples each time.

    In training mode. Holds two vectors of the gradient's size besides the gradient.
    """
    order = torch.randperm(len(at.data.train[0]), generator=torch.Generator().manual_seed(0))
    index = order[: _BATCHES * at.config.batch_size].to(at.data.train[0].device)
    x, y = (part[index].split(at.config.batch_size) for part in at.data.train)
    losses = [nn.functional.cross_entropy(at.model(a), b) for a, b in zip(x, y, strict=True)]
    loss = torch.stack(losses).mean()
    weights = [p for p in at.model.parameters() if p.requires_grad]
    return {"sample_loss": float(loss.detach()), "curvature": curvature(loss, weights)}


def at_loss(run: Run, level: float) -> float:
    """Return the log curvature when the run's loss first came down to `level`.

    Between two probes it is taken for linear in the log loss; before the first one it is that of
    the first. NaN for a run that diverged or didn't come down so far.
    """
    if run.status != "finished" or "curvature" not in run.curves:
        return math.nan
    losses, curves = (
        np.log(np.maximum(run.curves[name][1], 1e-12)) for name in ("sample_loss", "curvature")
    )
    below = np.flatnonzero(losses <= math.log(level))
    if not len(below):
        return math.nan
    last = int(below[0])
    if last == 0:
        return float(curves[0])
    part = (losses[last - 1] - math.log(level)) / (losses[last - 1] - losses[last])
    return float(curves[last - 1] + part * (curves[last] - curves[last - 1]))


@dataclasses.dataclass(frozen=True)
class Matched:
    """Log curvatures of one seed's arms at one loss, by optimizer and network."""

    level: float
    curvatures: Mapping[tuple[str, str], float]

    def by_norm(self) -> list[float]:
        """Return the log ratios of curvatures without over with norm, by optimizer."""
        return [
            self.curvatures[optimizer, "none"] - self.curvatures[optimizer, "batch"]
            for optimizer in self._optimizers()
        ]

    def by_optimizer(self) -> list[float]:
        """Return the log ratios between two optimizers, by network and pair."""
        return [
            self.curvatures[one, norm] - self.curvatures[other, norm]
            for norm in NETWORKS
            for one, other in combinations(self._optimizers(), 2)
        ]

    def excess(self) -> float:
        """Return by how much the norm changes the curvature more than an optimizer does."""
        return float(np.abs(self.by_norm()).mean() - np.abs(self.by_optimizer()).mean())

    def _optimizers(self) -> list[str]:
        return [name for name in OPTIMIZERS if (name, "none") in self.curvatures]


def matched(tuned: Mapping[str, Sequence[Run]]) -> dict[int, Matched]:
    """Return by seed the curvatures at the lowest loss that all its runs reached.

    Only optimizers that were run in both networks; seeds with a diverged run are left out.
    """
    both = [o for o in OPTIMIZERS if all(f"{o}-{norm}" in tuned for norm in NETWORKS)]
    by_seed: dict[int, dict[tuple[str, str], Run]] = {}
    for optimizer in both:
        for norm in NETWORKS:
            for run in tuned[f"{optimizer}-{norm}"]:
                if run.status == "finished" and "curvature" in run.curves:
                    by_seed.setdefault(run.seed, {})[optimizer, norm] = run
    found = {}
    for seed, runs in by_seed.items():
        if len(runs) == len(both) * len(NETWORKS):
            level = max(min(run.curves["sample_loss"][1]) for run in runs.values())
            found[seed] = Matched(level, {key: at_loss(run, level) for key, run in runs.items()})
    return found


def judge(evidence: Evidence) -> Findings:
    """Return the verdicts, table and figures."""
    config, tuned = evidence.config, evidence.tuned
    assert config.steps is not None
    target = target_of(tuned["sgd-none"])
    reached = {name: arrivals(runs, target) for name, runs in tuned.items()}
    quicker = {
        arm.name: speedups(reached[f"sgd-{arm.norm}"], reached[arm.name], config.steps)
        for arm in evidence.arms
        if not arm.name.startswith("sgd") and f"sgd-{arm.norm}" in reached
    }
    compared = compare(quicker)
    seeds = matched(tuned)
    labels = {arm.name: arm.label for arm in evidence.arms}
    verdicts = []
    if quicker:
        verdicts.append(_way_down(quicker, compared, labels, target))
    if verdict := _surface(seeds, len(tuned["sgd-none"])):
        verdicts.append(verdict)
    left_out = len(tuned["sgd-none"]) - len(seeds)
    return Findings(
        headline=headline(verdicts),
        verdicts=verdicts,
        columns=[
            "Arm",
            "Own rate",
            "Test accuracy, own rate",
            "Best rate",
            "Test accuracy, best rate",
            f"Steps to {percent(target)}",
            "Faster than SGD by",
            "Told apart (Holm)",
            "Largest eigenvalue at equal loss",
            "Diverged",
        ],
        rows=[_row(evidence, arm, reached, compared, seeds) for arm in evidence.arms],
        figures=list(_figures(evidence, quicker, seeds, target)),
        notes=[
            "Every arm at its own rate, which for RMSProp, Adam and momentum is a custom, not "
            "tuned, and at the best of a grid around it, at which the claims are judged.",
            "Curvature: the largest eigenvalue of the Hessian of the training loss in all weights, "
            f"on the same {_BATCHES} batches of {config.batch_size} each time, training mode, by "
            f"{POWER_ITERATIONS} power iterations. All arms of a seed are compared at the lowest "
            "loss that each of them reached"
            + (
                f", a median of {estimate([s.level for s in seeds.values()]).median:.3g}."
                if seeds
                else "."
            ),
            *([f"{left_out} seeds with a diverged run are left out of that."] if left_out else []),
            "“Told apart”: paired t tests on the log ratio of steps against SGD in the same "
            "network, corrected by Holm over the six. A run that never reached the target counts "
            "as reaching it at the last step in a ratio.",
            f"Medians with their exact 95 % interval over {config.seeds} seeds, paired: same "
            "initial weights, same batches.",
        ],
    )


STUDY = Study(
    name="optimizer",
    claim="Optimizers change the way down, normalization changes the surface.",
    source="Santurkar et al. 2018 (arXiv:1805.11604) for the surface; against it, Cohen et al. "
    "2021, Gradient Descent Typically Occurs at the Edge of Stability (arXiv:2103.00065).",
    arms=arms,
    judge=judge,
    probe=probe,
    probes=30,
    tuned=True,
    length=0.3,
    published="Batch norm makes the surface smoother (Santurkar et al.); the optimizer has a part "
    "in the surface it meets, as its rate bounds the curvature (Cohen et al.).",
)


def _way_down(
    quicker: Mapping[str, Sequence[float]],
    compared: Mapping[str, Comparison],
    labels: Mapping[str, str],
    target: float,
) -> Verdict:
    claim = "Optimizers change the way down"
    told = {Word.HOLDS: "faster", Word.REVERSED: "slower"}
    found = [
        f"{labels[name]} {said(each.effect, times, '×')}, {told[each.word]}"
        for name, each in compared.items()
        if each.word in told
    ]
    little = [negligible(each.effect, STEPS_MARGIN) for each in compared.values()]
    if Word.RANGE_ONLY in little:
        outcome = Word.RANGE_ONLY
    elif found:
        outcome = Word.HOLDS
    else:
        outcome = Word.LITTLE_DIFFERENCE if set(little) == {Word.HOLDS} else Word.INCONCLUSIVE
    text = f"Steps to {percent(target)} at the best rates, SGD's over the other's: " + (
        "; ".join(found) or "none can be told from SGD by a test corrected for all of them"
    )
    text += "."
    if outcome == Word.INCONCLUSIVE:
        open_ = [
            seeds_to_place(values, STEPS_MARGIN)
            for values in quicker.values()
            if negligible(estimate(values), STEPS_MARGIN) == Word.INCONCLUSIVE
        ]
        known = [n for n in open_ if n is not None]
        text += settling(max(known) if len(known) == len(open_) else None)
    return Verdict(claim, outcome, text)


def _surface(seeds: Mapping[int, Matched], runs: int) -> Verdict | None:
    claim = "Normalization changes the surface more"
    values = [seed.excess() for seed in seeds.values() if len(seed.curvatures) > len(NETWORKS)]
    if not values:
        return (
            Verdict(claim, Word.INCONCLUSIVE, "No seed whose runs all finished.") if runs else None
        )
    norm = estimate([float(np.abs(seed.by_norm()).mean()) for seed in seeds.values()])
    optimizer = estimate([float(np.abs(seed.by_optimizer()).mean()) for seed in seeds.values()])
    signed = estimate([float(np.mean(seed.by_norm())) for seed in seeds.values()])
    effect = estimate(values)
    outcome = word(effect)
    text = (
        "At equal training loss the largest eigenvalue of the Hessian changes by a factor of "
        f"{times(norm.median)} with batch norm or without, and by {times(optimizer.median)} from "
        f"one optimizer to another, on average; the first is {said(effect, times, '×')} the "
        f"second. Without norm it is {said(signed, times, '×')} that with batch norm."
    )
    if outcome == Word.INCONCLUSIVE:
        text += settled_by(values)
    return Verdict(claim, outcome, text)


def _own_rate(config: Config, arm: Arm) -> float:
    settled = dataclasses.replace(config, **arm.options).resolved("optimizer")
    assert settled.lr is not None
    return settled.lr


def _row(
    evidence: Evidence,
    arm: Arm,
    reached: Mapping[str, Mapping[int, float]],
    compared: Mapping[str, Comparison],
    seeds: Mapping[int, Matched],
) -> list[str]:
    runs, tuned = evidence.runs[arm.name], evidence.tuned[arm.name]
    rate = _own_rate(evidence.config, arm)
    faster = compared.get(arm.name)
    told = {Word.HOLDS: "faster", Word.REVERSED: "slower"}
    curved = _curvatures(seeds, arm)
    return [
        arm.label,
        f"{rate:g}",
        said(estimate([tested(run) for run in runs]), percent),
        f"{rate * evidence.factors[arm.name]:g}",
        said(estimate([tested(run) for run in tuned]), percent),
        said(estimate(list(reached[arm.name].values())), count),
        said(faster.effect, times, "×") if faster else "",
        f"{told.get(faster.word, faster.word)}, p = {faster.p:.2g}" if faster else "",
        said(curved, lambda value: f"{value:.3g}") if curved else "",
        f"{sum(run.status == 'diverged' for run in tuned)} of {len(tuned)}",
    ]


def _curvatures(seeds: Mapping[int, Matched], arm: Arm) -> Estimate | None:
    key = (str(arm.options["optimizer"]), arm.norm)
    values = [math.exp(s.curvatures[key]) for s in seeds.values() if key in s.curvatures]
    return estimate(values) if values else None


def _figures(
    evidence: Evidence,
    quicker: Mapping[str, Sequence[float]],
    seeds: Mapping[int, Matched],
    target: float,
) -> Iterator[Figure]:
    n = evidence.config.seeds
    rows = [
        Interval(arm.label, COLOURS[str(arm.options["optimizer"])], effect)
        for arm in evidence.arms
        if (effect := _curvatures(seeds, arm)) is not None
    ]
    if rows:
        yield intervals(
            name="curvature",
            title="How sharp the surface is at equal training loss",
            caption="Largest eigenvalue of the Hessian when the training loss came down to the "
            f"lowest that all arms of a seed reached: median and 95 % interval of {len(seeds)} "
            "seeds, each arm at its best rate. Left is flatter.",
            alt="; ".join(f"{row.label}: {row.effect.median:.3g}" for row in rows),
            rows=rows,
            x=Axis("largest eigenvalue", log=True),
        )
    yield panels(
        name="trajectory",
        title="Sharpness on the way down",
        caption="Largest eigenvalue of the Hessian against the training loss where it was "
        f"measured: medians of {n} seeds at thirty times of the training, which goes from right "
        "to left. Each arm at its best rate.",
        alt="The Hessian's largest eigenvalue against the training loss, a panel for each network, "
        "a line for each optimizer.",
        shown=[
            (
                label,
                [
                    _trajectory(arm, evidence.tuned[arm.name])
                    for arm in evidence.arms
                    if arm.norm == norm
                ],
            )
            for norm, label in NETWORKS.items()
        ],
        x=Axis("training loss (nats)", log=True, format="~g"),
        y=Axis("largest eigenvalue", log=True),
    )
    yield panels(
        name="accuracy",
        title="Validation accuracy over training",
        caption=f"Median of {n} seeds, smoothed over five evaluations, each arm at its best rate; "
        f"the band spans all seeds. The target is {percent(target)}.",
        alt="Validation accuracy against training steps, a panel for each network, a line for each "
        "optimizer.",
        shown=[
            (
                label,
                [
                    over_seeds(
                        NAMES[optimizer],
                        COLOURS[optimizer],
                        evidence.tuned.get(f"{optimizer}-{norm}", ()),
                        VALIDATION,
                        smooth=1,
                    )
                    for optimizer in OPTIMIZERS
                ],
            )
            for norm, label in NETWORKS.items()
        ],
        x=Axis("training steps", log=True, format=","),
        y=ACCURACY,
    )
    if quicker:
        labels = {arm.name: arm for arm in evidence.arms}
        steps = [
            Interval(
                labels[name].label,
                COLOURS[str(labels[name].options["optimizer"])],
                exponential(estimate(values)),
            )
            for name, values in quicker.items()
        ]
        yield intervals(
            name="paces",
            title="Steps to the target against SGD",
            caption="SGD's steps over the other optimizer's in the same network, each at its best "
            f"rate: median and 95 % interval of {n} paired seeds. Right of 1 the other is faster; "
            "between the outer dotted lines, within a factor of 1.5, the difference is little.",
            alt="; ".join(f"{row.label}: {row.effect.median:.2f} times" for row in steps),
            rows=steps,
            x=Axis("SGD's steps ÷ the other's", log=True),
            level=(math.exp(-STEPS_MARGIN), 1.0, math.exp(STEPS_MARGIN)),
        )


def _trajectory(arm: Arm, runs: Sequence[Run]) -> Line | None:
    found = [run.curves for run in runs if run.status == "finished" and "curvature" in run.curves]
    if not found:
        return None
    loss, curved = (
        np.median([curves[name][1] for curves in found], 0) for name in ("sample_loss", "curvature")
    )
    optimizer = str(arm.options["optimizer"])
    return Line(NAMES[optimizer], COLOURS[optimizer], short(loss), short(curved))
