"""Is the surface smoother with batch normalization, and is there less internal covariate shift?

Santurkar et al. 2018, sections 2 and 3. Probed at fifty times of each run, on the batch of the next
step, in training mode (batch norm takes that batch's statistics; noise is the same at all points):

- Along the step: from the weights w along the gradient g to w - k * rate * g, k = 0.5, 1, ..., 4.
  (a) the range (largest minus smallest) of the loss over those points; (b) the range of the l2
  distance between the gradient there and g; (c) the effective beta: the largest of that distance
  over the distance moved. A run's value is the geometric mean over its times.
- Internal covariate shift (ICS) of layer i: the l2 distance and the cosine between the gradient of
  its weights now, and the same after all layers below it took their step. A run's value is the mean
  over times and layers from the second on, of the distance the geometric one.

The rule. All arms run at one rate, at which the network without norm is well tuned, and again each
at its best rate of a grid.

- Smoother: at the one rate, the same distances being looked at (at a larger rate the points lie
  farther apart). Per seed the log ratio, without over with batch norm, of each of the three. The
  claim holds when the 95 % intervals of all three medians lie above a ratio of 1, is reversed when
  all lie below. A diverged run is infinitely rough.
- Not less ICS: at the one rate. It holds when batch norm's is not shown to be, nor may be, lower by
  more than a margin: the intervals of the median log ratio (with over without) of the distance lie
  above -log 1.25, and of the cosine (without minus with) above -0.05. It is reversed when both lie
  below those. Where the truth is just at the margins it holds in at most 1 of 40 studies. Pairs
  with a diverged run are left out.
- Noisy batch norm trains nearly as well: at the best rates. Its test accuracy minus batch norm's is
  held against a margin of two points in the same way.
- The gradient through the statistics matters: at the best rates. Per seed the log ratio of steps to
  the target (98 % of the median final accuracy without norm), with detached statistics over batch
  norm; it holds when the interval of the median lies above a ratio of 1.

History: fixed before the first full study, after one trial of 300 steps with two seeds.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from normkit.lab.report.figures import (
    ACCURACY,
    Axis,
    Interval,
    Line,
    intervals,
    lines,
    over_seeds,
    panels,
)
from normkit.lab.results.measures import (
    VALIDATION,
    arrivals,
    exponential,
    paired,
    percent,
    points,
    said,
    speedups,
    target_of,
    tested,
    times,
)
from normkit.lab.results.store import Run
from normkit.lab.results.verdict import (
    Estimate,
    Verdict,
    Word,
    all_of,
    estimate,
    headline,
    settled_by,
    word,
)
from normkit.lab.study import Evidence, Figure, Findings, NotApplicable, Study
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.lab.training.models import build, layers
from normkit.lab.training.probe import Probe, untouched

ARMS = (
    Arm("none", "no norm"),
    Arm("batch", "batch norm", norm="batch"),
    Arm("noisy", "noisy batch norm", norm="noisy"),
    Arm("detached", "detached batch norm", norm="detached"),
)
COLOURS = {"none": 0, "batch": 1, "noisy": 3, "detached": 5}
MULTIPLES = tuple(k / 2 for k in range(1, 9))
"""How far along the gradient the probes look, in learning rates."""
ROUGHNESS = {
    "loss_range": "range of the loss",
    "gradient_range": "range of the gradient's distance",
    "beta": "effective beta",
}
ICS_MARGIN = math.log(1.25)
COSINE_MARGIN = 0.05
ACCURACY_MARGIN = 0.02
_TINY = 1e-12


def arms(config: Config, data: Data) -> Sequence[Arm]:
    """Return the four arms; NotApplicable for a network of fewer than two layers."""
    found = len(layers(build(config, data, ARMS[0], 0)))
    if found < 2:
        raise NotApplicable(
            f"the model has {found} layer{'s' * (found != 1)} with weights, and internal covariate "
            "shift is what the layers below do to a layer; give a model of two or more"
        )
    return ARMS


def probe(at: Probe) -> dict[str, float]:
    """Return what is seen along the step, and each layer's internal covariate shift."""
    with untouched(at.model, at.optimizer):
        seen = along_the_step(at)
    return seen | covariate_shift(at)


def along_the_step(at: Probe) -> dict[str, float]:
    """Return the loss here, and its range, the gradient's and the effective beta along the step.

    At w - k * rate * g, k in MULTIPLES, g the gradient of the next batch's loss at w:
    "loss_low", "loss_high", "loss_range" of the loss; "gradient_range" of |g(k) - g|; "beta" is the
    largest |g(k) - g| / (k * rate * |g|). Moves the weights. Holds g and one g(k).

    Source: Santurkar et al. 2018 (arXiv 1805.11604), section 3.1.
    """
    parameters = [p for p in at.model.parameters() if p.requires_grad]
    rate = at.optimizer.param_groups[0]["lr"]
    here, gradient = _gradient(at, parameters)
    length = _norm(gradient)
    losses, distances = [], []
    moved = 0.0
    for multiple in MULTIPLES:
        with torch.no_grad():
            for parameter, direction in zip(parameters, gradient, strict=True):
                parameter.sub_(direction, alpha=(multiple - moved) * rate)
        moved = multiple
        loss, there = _gradient(at, parameters)
        losses.append(loss)
        distances.append(_norm(a.sub_(b) for a, b in zip(there, gradient, strict=True)))
    slopes = [d / max(k * rate * length, _TINY) for d, k in zip(distances, MULTIPLES, strict=True)]
    return {
        "loss_here": here,
        "loss_low": min(losses),
        "loss_high": max(losses),
        "loss_range": max(losses) - min(losses),
        "gradient_range": max(distances) - min(distances),
        "beta": max(slopes),
    }


def covariate_shift(at: Probe) -> dict[str, float]:
    """Return the internal covariate shift of each layer i from the second on.

    With g the gradient of layer i's weights on the next batch, h the same after all layers below
    took the optimizer's step: "ics_l2.i" |h - g|, "ics_relative.i" |h - g| / |g|, "ics_cosine.i"
    g · h / |g| |h|. Moves the weights. Holds the gradient, the step and one layer's h.

    Source: Santurkar et al. 2018 (arXiv 1805.11604), Definition 2.1.
    """
    stages = list(_stages(at.model))
    parameters = [p for p in at.model.parameters() if p.requires_grad]
    _, gradient = _gradient(at, parameters)
    before = [p.detach().clone() for p in parameters]
    for parameter, its in zip(parameters, gradient, strict=True):
        parameter.grad = its
    at.optimizer.step()
    after = {id(p): p.detach().clone() for p in parameters}
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    found = {}
    for number, (weight, stage) in enumerate(stages, 1):
        if number > 1 and weight.grad is not None:
            _, (moved,) = _gradient(at, [weight])
            size, other = _norm([weight.grad]), _norm([moved])
            together = float((weight.grad.double() * moved.double()).sum())
            distance = _norm([moved.sub_(weight.grad)])
            found[f"ics_l2.{number}"] = distance
            found[f"ics_relative.{number}"] = distance / max(size, _TINY)
            found[f"ics_cosine.{number}"] = together / max(size * other, _TINY**2)
        with torch.no_grad():
            for parameter in stage:
                if id(parameter) in after:
                    parameter.copy_(after[id(parameter)])
    return found


def _gradient(at: Probe, of: Sequence[Tensor]) -> tuple[float, tuple[Tensor, ...]]:
    # Noise, where a network has any, is the same at every point of one probe.
    torch.manual_seed(at.step)
    x, y = at.batches[at.step]
    loss = nn.functional.cross_entropy(at.model(x), y)
    return float(loss.detach()), torch.autograd.grad(loss, of)


def _norm(tensors: Iterator[Tensor] | Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _stages(model: nn.Module) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
    """Yield each layer's weight, and the parameters from that layer on until the next."""
    found = layers(model)
    weight: Tensor | None = None
    stage: list[nn.Parameter] = []
    for name, module in model.named_modules():
        if name in found:
            if weight is not None:
                yield weight, stage
                stage = []
            weight = found[name].weight  # type: ignore[assignment]
        stage += module.parameters(recurse=False)
    if weight is not None:
        yield weight, stage


def roughness(run: Run, curve: str) -> float:
    """Return the log of a probe's geometric mean over the run; infinite for a diverged run."""
    values = np.array(run.curves[curve][1] if curve in run.curves else [])
    if run.status != "finished" or not len(values) or not np.isfinite(values).all():
        return math.inf
    return float(np.log(np.maximum(values, _TINY)).mean())


def shift(run: Run, kind: str) -> float:
    """Return the mean over times and layers of "ics_l2" (of its log) or "ics_cosine".

    NaN for a diverged run.
    """
    found = [values for name, (_, values) in run.curves.items() if name.startswith(f"{kind}.")]
    if run.status != "finished" or not found:
        return math.nan
    values = np.array(found)
    logarithmic = kind != "ics_cosine"
    return float(np.mean(np.log(np.maximum(values, _TINY)) if logarithmic else values))


def not_less(effect: Estimate, margin: float) -> Word:
    """Return the verdict on a claim that an effect is not below `-margin`.

    "holds" when its whole interval lies above `-margin`, "reversed" when it lies below, "range
    only" for fewer than six pairs, else "inconclusive".
    """
    return word(
        Estimate(effect.median + margin, effect.low + margin, effect.high + margin, effect.n)
    )


def smoothing(ours: Sequence[Run], theirs: Sequence[Run], curve: str) -> list[float]:
    """Return by how much (log ratio) `theirs` are rougher, by seed; two diverged runs tie."""
    rough = {run.seed: roughness(run, curve) for run in theirs}
    found = [(rough[run.seed], roughness(run, curve)) for run in ours if run.seed in rough]
    return [0.0 if a == b else a - b for a, b in found]


def judge(evidence: Evidence) -> Findings:
    """Return the verdicts, table and figures."""
    config, runs, tuned = evidence.config, evidence.runs, evidence.tuned or evidence.runs
    present = [arm for arm in ARMS if arm.name in runs]
    target = target_of(tuned["none"])
    reached = {name: arrivals(found, target) for name, found in tuned.items()}
    verdicts = []
    if "batch" in runs:
        verdicts += [_smoother(runs, tuned), _not_less_shift(runs)]
    if {"batch", "noisy"} <= runs.keys():
        verdicts.append(_noisy(config, tuned, reached))
    if {"batch", "detached"} <= runs.keys():
        verdicts.append(_detached(config, runs, tuned, reached, target))
    return Findings(
        headline=headline(verdicts),
        verdicts=verdicts,
        columns=[
            "Arm",
            "Rate",
            "Loss range",
            "Gradient range",
            "Effective beta",
            "ICS, l2",
            "ICS, relative l2",
            "ICS, cosine",
            "Test accuracy",
            "Diverged",
        ],
        rows=list(_rows(present, evidence)),
        figures=list(_figures(present, evidence, tuned)),
        notes=_notes(config, evidence),
    )


STUDY = Study(
    name="landscape",
    claim="Batch normalization makes the surface smoother; it does not act by less internal "
    "covariate shift.",
    source="Santurkar et al. 2018, How Does Batch Normalization Help Optimization? "
    "(arXiv:1805.11604), Figures 1, 2 and 4",
    arms=arms,
    judge=judge,
    probe=probe,
    probes=50,
    tuned=True,
    published="With batch norm the range of the loss, that of the gradient and effective beta are "
    "smaller and steadier along the step; internal covariate shift is not; with noise behind the "
    "norms VGG trains nearly as well.",
)


def _smoother(runs: Mapping[str, Sequence[Run]], tuned: Mapping[str, Sequence[Run]]) -> Verdict:
    effects = {curve: smoothing(runs["batch"], runs["none"], curve) for curve in ROUGHNESS}
    outcome = all_of([word(estimate(values)) for values in effects.values()])
    parts = [f"{ROUGHNESS[c]} {said(estimate(v), times, '×')}" for c, v in effects.items()]
    text = f"Along the step, without norm over with batch norm, at one rate: {', '.join(parts)}."
    best = [
        times(estimate(smoothing(tuned["batch"], tuned["none"], curve)).median)
        for curve in ROUGHNESS
    ]
    text += f" At each one's best rate: {', '.join(f'{value}×' for value in best)}."
    if outcome == Word.INCONCLUSIVE:
        open_ = [v for v in effects.values() if word(estimate(v)) == Word.INCONCLUSIVE]
        text += max(map(settled_by, open_), key=len) if open_ else " The three disagree."
    return Verdict("Smoother surface", outcome, text)


def _not_less_shift(runs: Mapping[str, Sequence[Run]]) -> Verdict:
    claim = "Not less internal covariate shift"
    distance = _finite(paired(runs["batch"], runs["none"], lambda run: shift(run, "ics_l2")))
    turned = _finite(paired(runs["none"], runs["batch"], lambda run: shift(run, "ics_cosine")))
    if not distance or not turned:
        return Verdict(claim, Word.INCONCLUSIVE, "No pair of runs that both finished.")
    l2, cosine = estimate(distance), estimate(turned)
    outcome = all_of([not_less(l2, ICS_MARGIN), not_less(cosine, COSINE_MARGIN)])
    relative = _finite(paired(runs["batch"], runs["none"], lambda run: shift(run, "ics_relative")))
    text = (
        f"With batch norm over without, the gradient moves by {said(l2, times, '×')} as much in l2 "
        f"distance when the layers below step, {times(estimate(relative).median)}× relative to its "
        f"own length; its cosine to what it was is lower by {said(cosine, _decimal)}."
    )
    if outcome == Word.INCONCLUSIVE:
        text += settled_by([value + ICS_MARGIN for value in distance])
    return Verdict(claim, outcome, text)


def _noisy(
    config: Config,
    tuned: Mapping[str, Sequence[Run]],
    reached: Mapping[str, Mapping[int, float]],
) -> Verdict:
    assert config.steps is not None
    values = paired(tuned["noisy"], tuned["batch"])
    effect = estimate(values)
    outcome = not_less(effect, ACCURACY_MARGIN)
    slower = estimate(speedups(reached["noisy"], reached["batch"], config.steps))
    faster = estimate(speedups(reached["none"], reached["noisy"], config.steps))
    text = (
        f"At their best rates the noise changes batch norm's test accuracy by "
        f"{said(effect, points)} points. To the target it takes {said(slower, times, '×')} batch "
        f"norm's steps; no norm takes {said(faster, times, '×')} its own."
    )
    if outcome == Word.INCONCLUSIVE:
        text += settled_by([value + ACCURACY_MARGIN for value in values])
    return Verdict("With noise it trains nearly as well", outcome, text)


def _detached(
    config: Config,
    runs: Mapping[str, Sequence[Run]],
    tuned: Mapping[str, Sequence[Run]],
    reached: Mapping[str, Mapping[int, float]],
    target: float,
) -> Verdict:
    assert config.steps is not None
    values = speedups(reached["detached"], reached["batch"], config.steps)
    effect = estimate(values)
    outcome = word(effect)
    lost = estimate([tested(run) for run in tuned["detached"]]).median
    kept = estimate([tested(run) for run in tuned["batch"]]).median
    beta = estimate(smoothing(runs["batch"], runs["detached"], "beta"))
    gone = sum(run.status == "diverged" for run in runs["detached"])
    text = (
        f"Without the gradient through mean and deviation, {said(effect, times, '×')} as many "
        f"steps to {target:.1%}, and {lost:.1%} test accuracy against {kept:.1%}, at the best "
        f"rates. At the one rate its effective beta is {said(beta, times, '×')} batch norm's, and "
        f"{gone} of {len(runs['detached'])} runs diverged."
    )
    if outcome == Word.INCONCLUSIVE:
        text += settled_by(values)
    return Verdict("The gradient through the statistics matters", outcome, text)


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _decimal(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


def _rows(present: Sequence[Arm], evidence: Evidence) -> Iterator[list[str]]:
    for arm in present:
        factor = evidence.factors.get(arm.name, 1.0)
        best = factor == 1.0
        yield _row(arm.label, 1.0, best, evidence.runs[arm.name], evidence.config)
        if not best:
            yield _row(arm.label, factor, True, evidence.tuned[arm.name], evidence.config)


def _row(label: str, factor: float, best: bool, runs: Sequence[Run], config: Config) -> list[str]:
    def shown(values: Sequence[float], show: Callable[[float], str]) -> str:
        kept = [value for value in values if not math.isnan(value)]
        return said(estimate(kept), show) if kept else "diverged"

    assert config.lr is not None
    return [
        f"{label}, {factor:g}× rate" if factor != 1.0 else label,
        f"{config.lr * factor:g}{' (best)' if best else ''}",
        *(shown([roughness(run, curve) for run in runs], _power) for curve in ROUGHNESS),
        *(shown([shift(run, kind) for run in runs], _power) for kind in ("ics_l2", "ics_relative")),
        shown([shift(run, "ics_cosine") for run in runs], _decimal),
        shown([tested(run) for run in runs], percent),
        f"{sum(run.status == 'diverged' for run in runs)} of {len(runs)}",
    ]


def _power(value: float) -> str:
    return f"{math.exp(value):.3g}"


def _notes(config: Config, evidence: Evidence) -> list[str]:
    n = len(evidence.runs["none"])
    return [
        f"All arms at the rate {config.lr:g}, at which the network without norm is tuned, and each "
        "at the best of a grid; the surface is compared at the one rate, since the probes look "
        "farther at a larger one. Training is compared at the best rates.",
        "Loss range, gradient range and effective beta: at 0.5, 1, ..., 4 learning rates along the "
        "gradient, on the next batch, in training mode: batch norm takes that batch's statistics. "
        "Geometric means over fifty times of a run.",
        "ICS: how the gradient of a layer's weights changes on one batch when the layers below "
        "take their step. Mean over the layers from the second on, and over the fifty times.",
        "Noise behind each batch norm, in training: per unit and step a mean in ±0.5 and a scale "
        "in 1 to 1.25, per sample a shift and a scale around them with deviation 0.1.",
        "Margins: a quarter of the l2 distance, 0.05 of the cosine, two points of accuracy.",
        f"Medians with their exact 95 % interval (the sign test's) over {n} seeds, paired: same "
        "initial weights, same batches.",
    ]


def _figures(
    present: Sequence[Arm], evidence: Evidence, tuned: Mapping[str, Sequence[Run]]
) -> Iterator[Figure]:
    runs = evidence.runs
    n = len(runs["none"])
    if "batch" in runs:
        yield _ratios(runs, n)
    yield panels(
        name="loss",
        title="The loss along the step",
        caption="The line is the loss on the next batch, the band from its smallest to its largest "
        "value at 0.5 to 4 learning rates along the gradient. First seed, all arms at one rate.",
        alt="The loss and its range along the step over training, a panel an arm.",
        shown=[(arm.label, [_along(arm, runs[arm.name])]) for arm in present],
        y=Axis("loss (nats)", log=True),
    )
    for curve, title, axis in (
        ("gradient_range", "How far the gradient changes along the step", "range of l2 distance"),
        ("beta", "Effective beta", "change of gradient per distance moved"),
    ):
        yield lines(
            name=curve.replace("_", "-"),
            title=title,
            caption=f"Median over {n} seeds; the band spans all seeds. All arms at one rate; lower "
            "is smoother.",
            alt=f"{title} over training, a line an arm.",
            drawn=[
                over_seeds(arm.label, COLOURS[arm.name], runs[arm.name], curve) for arm in present
            ],
            y=Axis(axis, log=True),
        )
    for kind, title, y in (
        ("ics_l2", "Internal covariate shift, l2 distance", Axis("l2 distance", log=True)),
        ("ics_cosine", "Internal covariate shift, cosine", Axis("cosine")),
    ):
        yield panels(
            name=kind.replace("_", "-"),
            title=title,
            caption="Between a layer's gradient before and after the layers below it took their "
            f"step, on the same batch. Median over {n} seeds; the band spans all seeds. "
            + ("Higher" if kind == "ics_l2" else "Lower")
            + " is more shift. All arms at one rate.",
            alt=f"{title} over training, a panel a layer, a line an arm.",
            shown=[
                (
                    f"layer {number}",
                    [
                        over_seeds(arm.label, COLOURS[arm.name], runs[arm.name], f"{kind}.{number}")
                        for arm in present
                    ],
                )
                for number in _some_layers(runs["none"])
            ],
            y=y,
        )
    factors = evidence.factors
    yield lines(
        name="accuracy",
        title="Validation accuracy, each arm at its best rate",
        caption=f"Median over {n} seeds, smoothed over five evaluations; the band spans all seeds.",
        alt="Validation accuracy over training, a line an arm.",
        drawn=[
            over_seeds(
                f"{arm.label}, {factors.get(arm.name, 1.0):g}×",
                COLOURS[arm.name],
                tuned[arm.name],
                VALIDATION,
                smooth=1,
            )
            for arm in present
        ],
        x=Axis("training steps", log=True, format=","),
        y=ACCURACY,
    )


def _ratios(runs: Mapping[str, Sequence[Run]], n: int) -> Figure:
    rows, words = [], []
    for curve, name in ROUGHNESS.items():
        effect = exponential(estimate(smoothing(runs["batch"], runs["none"], curve)))
        rows.append(Interval(name, COLOURS["batch"], effect))
        words.append(f"{name} {effect.median:.2f} ({effect.low:.2f} to {effect.high:.2f})")
    return intervals(
        name="ratios",
        title="How much rougher the surface is without norm",
        caption=f"Without norm over with batch norm, at one rate: median over {n} paired seeds "
        "with its 95 % interval. Right of the dotted line batch norm is smoother.",
        alt=f"Ratios without norm over batch norm: {', '.join(words)}.",
        rows=rows,
        x=Axis("no norm ÷ batch norm", log=True),
        level=1.0,
    )


def _along(arm: Arm, runs: Sequence[Run]) -> Line | None:
    first = next((run for run in runs if "loss_here" in run.curves), None)
    if first is None:
        return None
    steps, here = first.curves["loss_here"]
    low, high = (first.curves[name][1] for name in ("loss_low", "loss_high"))
    return Line(arm.label, COLOURS[arm.name], steps, here, low, high)


def _some_layers(runs: Sequence[Run]) -> list[int]:
    """Return at most three of the layers that were probed: the first, the middle, the last."""
    names = {name for run in runs for name in run.curves if name.startswith("ics_l2.")}
    numbers = sorted(int(name.partition(".")[2]) for name in names)
    return sorted({numbers[i] for i in (0, len(numbers) // 2, -1)}) if numbers else []
