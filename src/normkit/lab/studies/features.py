"""Do features of one range make a better error surface?

LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, sections 4.3 and 5: inputs of mean zero and
one variance, uncorrelated where possible, make the Hessian better conditioned, and gradient descent
at the rate that its largest eigenvalue allows advances in the other directions too.

One network without norm on inputs that are standardized, raw, min-max scaled and whitened; on raw
ones with batch norm besides. Every arm runs at the configuration's rate and at its best of a grid
that goes down to 1e-4 of it, since raw inputs can need so little. The rule looks at the best rates:

- Target: 98 % of the median, over the seeds, of the standardized arm's final smoothed validation
  accuracy.
- Fewer steps: per seed the log ratio of the steps to the target, raw over standardized. A run that
  never reaches it, or diverges, counts as reaching it at the very end. The claim holds when the
  95 % interval of the median ratio lies above 1, is reversed when it lies below 1.
- Rounder surface: unevenness is the largest over the mean absolute eigenvalue of the Hessian of the
  loss on training samples, all weights included; 1 for a round bowl. (A ratio to the smallest or
  the median means nothing here: most eigenvalues of a network's Hessian are 0 or nearly so.) Per
  seed the log ratio, raw over standardized, at the start, where both have the same weights, and at
  the end. It holds when both intervals lie above 1, is reversed when both lie below. Pairs with a
  diverged run are left out.
- The table's comparisons of all arms with the standardized one, of which any may be picked out, are
  paired t tests on the log ratio of steps, corrected by Holm.

Where all features come in one range (an image is scaled by channel), raw inputs differ from
standardized ones by one shift and one scale, and the study says that it can't speak of unequal
ranges.

History: fixed before the first study.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normkit.lab.numerics import condition_number, deviation_ratio, unevenness
from normkit.lab.report.figures import Axis, Interval, Mark, intervals, lines, maps, over_seeds
from normkit.lab.results.measures import (
    VALIDATION,
    arrivals,
    count,
    interval,
    paired,
    percent,
    said,
    speedups,
    target_of,
    tested,
    times,
)
from normkit.lab.results.store import Run
from normkit.lab.results.verdict import (
    Verdict,
    Word,
    all_of,
    compare,
    estimate,
    headline,
    settled_by,
    word,
)
from normkit.lab.study import Evidence, Figure, Findings, NotApplicable, Study
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data, scaled
from normkit.lab.training.models import build, layers
from normkit.lab.training.probe import Probe

ARMS = (
    Arm("standardized", "standardized", options={"inputs": "standardized"}),
    Arm("raw", "raw", options={"inputs": "raw"}),
    Arm("min-max", "min-max scaled", options={"inputs": "min-max"}),
    Arm("whitened", "whitened", options={"inputs": "whitened"}),
    Arm("raw-batch", "raw, batch norm", norm="batch", options={"inputs": "raw"}),
)
COLOURS = {"standardized": 0, "raw": 5, "min-max": 4, "whitened": 2, "raw-batch": 1}
GRID = (1e-4, 1e-3, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
ONE_RANGE = 2.0
"""Deviations of raw features that differ by less than this factor are one range."""
MOST_FEATURES = 2000
"""With more, inputs are neither whitened nor their eigenvalues computed."""
_SAMPLES = 500
_CONTOUR = np.linspace(-6.0, 6.0, 25)


def arms(config: Config, data: Data) -> Sequence[Arm]:
    """Return the arms; whitened inputs only for up to 2,000 features.

    NotApplicable for a single feature, or where --inputs would scale what the arms scale.
    """
    features = data.train[0][0].numel()
    if features < 2:
        raise NotApplicable(f"data {data.name!r} has one feature; ranges are compared of two")
    if config.inputs != "standardized":
        raise NotApplicable(
            f"--inputs {config.inputs}: this study scales the inputs of each arm; leave it out"
        )
    return [arm for arm in ARMS if arm.name != "whitened" or features <= MOST_FEATURES]


def finish(at: Probe) -> dict[str, Any]:
    """Return the Hessian's unevenness at the run's start and end, and facts of its inputs.

    In training mode, on at most 500 training samples. For the first seed also the condition number
    of the inputs, and of raw and standardized inputs a contour of the loss.
    """
    x, y = (part[:_SAMPLES] for part in at.data.train)
    start = build(at.config, at.data, at.arm, at.seed).train()
    found: dict[str, Any] = {
        "start": unevenness(start, x, y, at.seed),
        "end": unevenness(at.model, x, y, at.seed),
        "spread": deviation_ratio(at.data.train[0]),
    }
    if at.seed == 0 and x[0].numel() <= MOST_FEATURES:
        found["condition"] = condition_number(at.data.train[0])
    if at.seed == 0 and at.arm.norm == "none" and at.config.inputs in ("raw", "standardized"):
        found["contour"] = contour(at)
    return found


def contour(at: Probe) -> dict[str, Any] | None:
    """Return the loss in a plane of the first layer's weights, around the weights as they are.

    Each unit's weight of the raw feature (channel) with the largest deviation moves by a s_j / q,
    that of the one with the middle deviation by b s_j / q, with one random sign s_j a unit and q
    the root mean square of the first of the two as it is fed: "loss"[b][a] for a and b in "at".
    None where the first layer doesn't take the data's features.
    """
    first = next(iter(layers(at.model).values()))
    raw, fed = (scaled(at.data, "raw") if at.config.inputs == "standardized" else at.data), at.data
    x, y = (part[:_SAMPLES] for part in fed.train)
    weight: Tensor = first.weight  # type: ignore[assignment]
    columns = (lambda t: t.flatten(1)) if isinstance(first, nn.Linear) else (lambda t: t)
    if weight.shape[1] != columns(x).shape[1] or weight.shape[1] < 2:
        return None
    over = [0, *range(2, columns(x).ndim)]
    order = columns(raw.train[0]).double().std(over).argsort()
    wide, middle = int(order[-1]), int(order[len(order) // 2])
    generator = torch.Generator().manual_seed(at.seed)
    signs = (2.0 * torch.randint(0, 2, (len(weight),), generator=generator) - 1.0).to(weight)
    size = columns(x).double().square().mean(over)[wide].sqrt()
    signs = (signs / float(size)).reshape(-1, *[1] * (weight.ndim - 2))
    kept = weight.detach().clone()
    rows: list[list[float]] = []
    with torch.no_grad():
        for b in _CONTOUR:
            rows.append([])
            for a in _CONTOUR:
                weight.copy_(kept)
                weight[:, wide] += a * signs
                weight[:, middle] += b * signs
                rows[-1].append(float(nn.functional.cross_entropy(at.model(x), y)))
        weight.copy_(kept)
    return {"at": _CONTOUR.tolist(), "loss": rows, "wide": wide, "middle": middle}


def judge(evidence: Evidence) -> Findings:
    """Return the verdicts, table and figures."""
    config, runs, tuned = evidence.config, evidence.runs, evidence.tuned or evidence.runs
    present = [arm for arm in ARMS if arm.name in runs]
    target = target_of(tuned["standardized"])
    reached = {name: arrivals(found, target) for name, found in tuned.items()}
    spreads = {name: _first(found, "spread") for name, found in tuned.items()}
    one_range = (spreads.get("raw") or math.inf) < ONE_RANGE
    verdicts = []
    if "raw" in runs:
        verdicts = [
            _fewer_steps(config, runs, reached, target, one_range),
            _rounder(tuned, one_range),
        ]
    where = "here all features come in one range" if one_range else "on this data"
    return Findings(
        headline=headline(verdicts),
        verdicts=verdicts,
        columns=[
            "Inputs",
            "Best rate",
            f"Steps to {target:.1%}",
            "Standardized is faster by",
            "Told apart (Holm)",
            "Unevenness at the start",
            "Unevenness at the end",
            "Condition number of the inputs",
            "Test accuracy",
            "Test accuracy at one rate",
        ],
        rows=list(_rows(present, evidence, tuned, reached, target)),
        figures=list(_figures(present, evidence, tuned, reached, target)),
        notes=_notes(config, evidence, spreads, one_range, where),
    )


STUDY = Study(
    name="features",
    claim="Features of one range make a better error surface.",
    source="LeCun, Bottou, Orr & Müller 1998, Efficient BackProp, sections 4.3 and 5",
    arms=arms,
    judge=judge,
    finish=finish,
    tuned=True,
    grid=GRID,
    published="Convergence is usually faster with inputs of mean 0 and equal variance: the "
    "Hessian's eigenvalues spread less, and one rate suits more of them. No numbers.",
)

_ONE_RANGE = " All features come in one range here: raw inputs differ by one shift and one scale."


def _fewer_steps(
    config: Config,
    runs: Mapping[str, Sequence[Run]],
    reached: Mapping[str, Mapping[int, float]],
    target: float,
    one_range: bool,
) -> Verdict:
    assert config.steps is not None
    values = speedups(reached["raw"], reached["standardized"], config.steps)
    effect = estimate(values)
    outcome = word(effect)
    raw, standard = (
        estimate(list(reached[name].values())).median for name in ("raw", "standardized")
    )
    accuracy = [
        estimate([tested(run) for run in runs[name]]).median for name in ("raw", "standardized")
    ]
    text = (
        f"Median steps to {target:.1%} at the best rates: raw {count(raw)}, standardized "
        f"{count(standard)}: {said(effect, times, '×')} as many with raw inputs. At one rate, "
        f"{config.lr:g}, they end at {accuracy[0]:.1%} and {accuracy[1]:.1%} test accuracy."
    )
    if outcome == Word.INCONCLUSIVE:
        text += settled_by(values)
    return Verdict("Fewer steps", outcome, text + _ONE_RANGE * one_range)


def _rounder(tuned: Mapping[str, Sequence[Run]], one_range: bool) -> Verdict:
    effects = {}
    for when in ("start", "end"):
        measure = functools.partial(_uneven, when=when)
        values = paired(tuned["raw"], tuned["standardized"], measure)
        effects[when] = [value for value in values if math.isfinite(value)]
    if not all(effects.values()):
        return Verdict("Rounder surface", Word.INCONCLUSIVE, "No pair of runs that both finished.")
    found = {when: estimate(values) for when, values in effects.items()}
    words = {when: word(effect) for when, effect in found.items()}
    outcome = all_of(list(words.values()))
    text = (
        f"The Hessian's largest over its mean absolute eigenvalue is with raw inputs "
        f"{said(found['start'], times, '×')} that with standardized ones at the start of training, "
        f"where the weights are the same, and {said(found['end'], times, '×')} at its end."
    )
    open_ = [effects[when] for when in words if words[when] == Word.INCONCLUSIVE]
    if outcome == Word.INCONCLUSIVE:
        text += max(map(settled_by, open_), key=len) if open_ else " The two disagree."
    return Verdict("Rounder surface", outcome, text + _ONE_RANGE * one_range)


def _uneven(run: Run, when: str) -> float:
    value = run.found.get(when)
    return math.log(value) if value else math.nan


def _first(runs: Sequence[Run], fact: str) -> Any:
    return next((run.found[fact] for run in runs if run.found.get(fact) is not None), None)


def _rows(
    present: Sequence[Arm],
    evidence: Evidence,
    tuned: Mapping[str, Sequence[Run]],
    reached: Mapping[str, Mapping[int, float]],
    target: float,
) -> Iterator[list[str]]:
    config = evidence.config
    assert config.steps is not None
    assert config.lr is not None
    family = {
        arm.name: speedups(reached[arm.name], reached["standardized"], config.steps)
        for arm in present[1:]
    }
    compared = compare(family)
    for arm in present:
        steps = estimate(list(reached[arm.name].values()))
        faster = told = ""
        if arm.name in compared:
            faster = said(compared[arm.name].effect, times, "×")
            told = {Word.HOLDS: "slower", Word.REVERSED: "faster"}.get(
                compared[arm.name].word, compared[arm.name].word
            )
            told += f", p = {compared[arm.name].p:.2g}"
        number = _first(tuned[arm.name], "condition")
        yield [
            arm.label,
            f"{config.lr * evidence.factors.get(arm.name, 1.0):g}",
            f"{count(steps.median)} ({interval(steps, count)})",
            faster,
            told,
            *(_shown(tuned[arm.name], when) for when in ("start", "end")),
            "" if number is None else f"{number:.2g}",
            said(estimate([tested(run) for run in tuned[arm.name]]), percent),
            said(estimate([tested(run) for run in evidence.runs[arm.name]]), percent),
        ]


def _shown(runs: Sequence[Run], when: str) -> str:
    values = [run.found[when] for run in runs if when in run.found]
    return said(estimate(values), lambda value: f"{value:,.0f}") if values else "diverged"


def _notes(
    config: Config,
    evidence: Evidence,
    spreads: Mapping[str, float | None],
    one_range: bool,
    where: str,
) -> list[str]:
    n = len(evidence.runs["standardized"])
    notes = []
    if one_range:
        notes.append(
            "All features (of an image: its channels) come in one range here. Raw inputs differ "
            "from standardized ones by one shift and one scale, so this data tests those, and says "
            "nothing about features of unequal ranges; wine and breast-cancer do."
        )
    elif raw := spreads.get("raw"):
        notes.append(
            f"Deviations of the raw features differ by a factor of up to {raw:,.0f}, of the "
            f"min-max scaled ones of {spreads.get('min-max') or math.nan:,.1f}."
        )
    notes += [
        "Unevenness: largest over mean absolute eigenvalue of the Hessian of the loss on at most "
        "500 training samples, all weights, training mode, by Lanczos quadrature; 1 for a round "
        "bowl. At the start all arms have the same weights.",
        "Condition number of the inputs: of E[(x, 1)(x, 1)'], the Hessian of one linear unit; "
        "eigenvalues that are 0 to rounding left out. It depends on the data alone.",
        "A run that never reached the target counts as reaching it at the last step in a ratio, "
        "and as “never” in a median of steps. A diverged run has accuracy 0.",
        f"Medians with their exact 95 % interval (the sign test's) over {n} seeds, paired: same "
        "initial weights, same batches. “Told apart” is a paired t test on log steps against "
        "standardized inputs, corrected by Holm.",
    ]
    ends = [arm.label for arm in ARMS if evidence.factors.get(arm.name) in (GRID[0], GRID[-1])]
    if ends:
        notes.append(f"The best rate is at the grid's end for: {', '.join(ends)}.")
    return notes


def _figures(
    present: Sequence[Arm],
    evidence: Evidence,
    tuned: Mapping[str, Sequence[Run]],
    reached: Mapping[str, Mapping[int, float]],
    target: float,
) -> Iterator[Figure]:
    n = len(tuned["standardized"])
    config = evidence.config
    assert config.lr is not None
    drawn, marks, words = [], [], []
    for arm in present:
        colour = COLOURS[arm.name]
        rate = config.lr * evidence.factors.get(arm.name, 1.0)
        label = f"{arm.label}, {rate:g}"
        drawn.append(over_seeds(label, colour, tuned[arm.name], VALIDATION, smooth=1))
        first = estimate(list(reached[arm.name].values())).median
        words.append(f"{arm.label} {count(first)}")
        if math.isfinite(first):
            marks.append(
                Mark(f"{label} reaches the target", colour, first, target, "after %{x:,} steps")
            )
    yield lines(
        name="accuracy",
        title="Validation accuracy, each arm at its best rate",
        caption=f"Median over {n} seeds, smoothed over five evaluations; the band spans all seeds. "
        f"A dot is the median of the steps after which an arm reaches {target:.1%}. The number "
        "behind a name is its learning rate.",
        alt=f"Validation accuracy against training steps. Steps to {target:.1%}: "
        f"{', '.join(words)}.",
        drawn=drawn,
        x=Axis("training steps", log=True, format=","),
        level=(target, f"target {target:.1%}"),
        marks=marks,
    )
    rows, words = [], []
    for when, named in (("start", "start"), ("end", "end")):
        for arm in present:
            values = [run.found[when] for run in tuned[arm.name] if when in run.found]
            if values:
                effect = estimate(values)
                rows.append(Interval(f"{arm.label}, {named}", COLOURS[arm.name], effect))
                words.append(f"{arm.label} at the {named} {effect.median:,.0f}")
    if rows:
        yield intervals(
            name="unevenness",
            title="How uneven the curvature is",
            caption="Largest over mean absolute eigenvalue of the Hessian, at the start of "
            f"training (same weights in all arms) and at its end: median over {n} seeds with its "
            "95 % interval. Left is rounder.",
            alt=f"Unevenness of the Hessian: {', '.join(words)}.",
            rows=rows,
            x=Axis("largest ÷ mean |eigenvalue| of the Hessian", log=True),
        )
    planes = [
        (arm, plane) for arm in present if (plane := _first(tuned[arm.name], "contour")) is not None
    ]
    if planes:
        wide, middle = (planes[0][1][key] + 1 for key in ("wide", "middle"))
        yield maps(
            name="contour",
            title="The loss in a plane of the first layer's weights",
            caption=f"Training loss of the first seed at its end. Across, each unit's weight of "
            f"the raw data's widest feature (number {wide}) moves by that much, with a random sign "
            f"a unit; upwards, that of feature {middle}, whose deviation is the middle one. Both "
            "in units of 1 / root mean square of the widest feature as it is fed, which moves a "
            "unit's input by about 1. Stripes: one rate can't suit both weights. One even "
            "colour: these weights hardly matter there, as where units are saturated.",
            alt="Contours of the training loss around the trained weights, for "
            f"{' and '.join(arm.label for arm, _ in planes)} inputs.",
            shown=[(f"{arm.label} inputs", p["at"], p["at"], p["loss"]) for arm, p in planes],
            x=Axis(f"weights of feature {wide}"),
            y=Axis(f"weights of feature {middle}"),
            z=Axis("loss (nats)"),
        )
