"""Does batch normalization reach the same accuracy in fewer steps, and bear larger rates?

Ioffe & Szegedy 2015, Figures 1 to 3 and section 4.2.2. The rule, one for all data (its history:
docs/lab.md):

- Target: 98 % of the median, over the seeds, of the final smoothed validation accuracy without
  normalization. A curve is smoothed by the mean of the last five evaluations.
- Fewer steps: per seed the log ratio of the steps to the target, without over with batch norm. A
  run that never reaches it, or diverges, counts as reaching it at the very end. The claim holds
  when the 95 % interval of the median ratio lies above 1, is reversed when it lies below 1.
- Larger rates: per seed and raised rate (5x, 30x), how far test accuracy falls from the base rate
  to the raised one, without minus with batch norm (a diverged run has accuracy 0). It holds at that
  rate when the interval of the median lies above one percentage point, and batch norm's own fall is
  not shown to be more than one point; reversed likewise. It holds when it does at either rate and
  is reversed at neither. Two looks: without an effect it is conclusive in at most 1 of 10 studies
  (1 of 16 at six seeds), and the margin of a point makes that rarer still. The arm without norm at
  30x is not in the paper; without it nothing could be said of what batch norm bears at 30x.
- Sigmoids: per seed the test accuracy (a diverged run has 0) of the network with sigmoids, batch
  norm and 5 times the rate, less that of the network with sigmoids and no norm, at the rate and at
  5 times it. The claim holds when at both the interval of the median lies above one point, and the
  first network trains: it is not shown to be more than five points behind the network of
  the study's own activation without norm. It is reversed when both intervals lie below minus one.
  Where the study's own activation is the sigmoid, its arms are these; a model of the user's keeps
  the activations it has, and nothing is said. (In the paper Inception with sigmoids and batch norm
  came within 2.4 points of the one with ReLUs, without batch norm it stayed at chance.)
- Control: a second set of runs without normalization, with other seeds, goes through the first
  rule as if it were a treatment. It must come out inconclusive.
"""

import math
from collections.abc import Mapping, Sequence

from normkit.lab.report import distributions
from normkit.lab.report.figures import Axis, Line, Mark, kept, lines, over_seeds, panels, short
from normkit.lab.results.measures import (
    VALIDATION,
    arrivals,
    count,
    interval,
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
from normkit.lab.results.verdict import Estimate, Verdict, Word, all_of, estimate, headline, word
from normkit.lab.study import Evidence, Figure, Findings, Study
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data

ARMS = (
    Arm("none", "no norm"),
    Arm("batch", "batch norm", norm="batch"),
    Arm("batch-x5", "batch norm, 5× rate", norm="batch", rate=5.0),
    Arm("batch-x30", "batch norm, 30× rate", norm="batch", rate=30.0),
    Arm("none-x5", "no norm, 5× rate", rate=5.0),
    Arm("none-x30", "no norm, 30× rate", rate=30.0),
    Arm("none-again", "no norm, other seeds (A/A)", other_seeds=True),
)
SIGMOID_ARMS = tuple(
    Arm(f"{name}-sigmoid", label, norm, rate, options={"activation": "sigmoid"})
    for name, label, norm, rate in (
        ("batch-x5", "sigmoid, batch norm, 5× rate", "batch", 5.0),
        ("none", "sigmoid, no norm", "none", 1.0),
        ("none-x5", "sigmoid, no norm, 5× rate", "none", 5.0),
    )
)
COLOURS = {arm.name: place for place, arm in enumerate((*ARMS, *SIGMOID_ARMS))}
MARGIN = 0.01
BEHIND = 0.05


def arms(config: Config, data: Data) -> Sequence[Arm]:
    """Return the arms, with those that have sigmoids where the others have something else."""
    can_change = ":" not in config.model and config.activation != "sigmoid"
    return (*ARMS, *SIGMOID_ARMS) if can_change else ARMS


def judge(evidence: Evidence) -> Findings:
    """Return the verdicts, table and figures."""
    config, runs = evidence.config, evidence.runs
    target = target_of(runs["none"])
    reached = {name: arrivals(found, target) for name, found in runs.items()}
    verdicts = []
    if "batch" in runs:
        verdicts.append(_fewer_steps(config, reached, target))
    if larger := _larger_rates(runs):
        verdicts.append(larger)
    if sigmoids := _sigmoids(config, runs):
        verdicts.append(sigmoids)
    if "none-again" in runs:
        verdicts.append(_control(config, reached))
    rows = [_row(config, arm, runs[arm.name], reached) for arm in evidence.arms]
    return Findings(
        headline=headline([v for v in verdicts if not v.claim.startswith("Control")])
        + ", on this data",
        verdicts=verdicts,
        columns=[
            "Arm",
            f"Steps to {target:.1%}",
            "Reached",
            "Diverged",
            "Speed-up over no norm",
            "Test accuracy",
            "ms per step",
            "Verdict on steps",
        ],
        rows=rows,
        figures=_figures(evidence, reached, target),
        notes=_notes(config, target, runs),
    )


STUDY = Study(
    name="speed",
    claim="Batch normalization reaches the same accuracy in fewer steps, bears larger learning "
    "rates, and trains networks of sigmoids.",
    source="Ioffe & Szegedy 2015, Batch Normalization (arXiv:1502.03167), Figures 1 to 3 and "
    "section 4.2.2",
    arms=arms,
    judge=judge,
    probe=distributions.look,
    published="Inception on ImageNet came to 72.2 % in 31.0M steps, with batch norm in 13.3M, at 5 "
    "times the rate in 2.1M, at 30 times in 2.7M (and ended at 72.2, 72.7, 73.0, 74.8 %); with "
    "sigmoids, batch norm and 5 times the rate it ended at 69.8 %, with sigmoids alone at chance.",
)


def _speedup(config: Config, reached: Mapping[str, Mapping[int, float]], arm: str) -> Estimate:
    assert config.steps is not None
    return estimate(speedups(reached["none"], reached[arm], config.steps))


def _fewer_steps(
    config: Config, reached: Mapping[str, Mapping[int, float]], target: float
) -> Verdict:
    effect = _speedup(config, reached, "batch")
    with_norm, without = (estimate(list(reached[arm].values())) for arm in ("batch", "none"))
    missing = [
        f"{lost} of {len(reached[arm])} runs {label} never got there"
        for arm, label in (("none", "without"), ("batch", "with batch norm"))
        if (lost := sum(math.isinf(v) for v in reached[arm].values()))
    ]
    tail = f"; {' and '.join(missing)}" if missing else ""
    text = (
        f"To {target:.1%} validation accuracy batch norm took a median of "
        f"{count(with_norm.median)} steps, no norm {count(without.median)}: "
        f"{said(effect, times, '×')} as many steps without{tail}."
    )
    return Verdict("Fewer steps", word(effect), text)


def _larger_rates(runs: Mapping[str, Sequence[Run]]) -> Verdict | None:
    factors = [f for f in (30, 5) if {"batch", f"none-x{f}", f"batch-x{f}"} <= runs.keys()]
    if not factors:
        return None
    words, sentences = set(), []
    for factor in factors:
        batch = accuracy_falls(runs["batch"], runs[f"batch-x{factor}"])
        none = accuracy_falls(runs["none"], runs[f"none-x{factor}"])
        effect = estimate([none[seed] - batch[seed] for seed in none if seed in batch])
        with_norm, without = estimate(list(batch.values())), estimate(list(none.values()))
        words.add(_borne(effect, with_norm, without))
        sentences.append(
            f"At {factor} times the rate test accuracy changes by {points(-with_norm.median)} "
            f"points with batch norm and by {points(-without.median)} without: "
            f"{points(effect.median)} in its favour ({interval(effect, points)})."
        )
    decided = words - {Word.INCONCLUSIVE}
    outcome = decided.pop() if len(decided) == 1 else Word.INCONCLUSIVE
    return Verdict("Larger rates", outcome, " ".join(sentences))


def _borne(effect: Estimate, with_norm: Estimate, without: Estimate) -> Word:
    """Return the verdict at one raised rate; who wins by breaking less has not borne the rate."""
    found = word(effect, MARGIN)
    winner = {Word.HOLDS: with_norm, Word.REVERSED: without}.get(found)
    return Word.INCONCLUSIVE if winner is not None and winner.low > MARGIN else found


def accuracy_falls(base: Sequence[Run], raised: Sequence[Run]) -> dict[int, float]:
    """Return by seed how far test accuracy (a fraction) falls from the base to the raised rate."""
    before = {run.seed: tested(run) for run in base}
    return {run.seed: before[run.seed] - (tested(run)) for run in raised if run.seed in before}


def _sigmoids(config: Config, runs: Mapping[str, Sequence[Run]]) -> Verdict | None:
    tail = "" if config.activation == "sigmoid" else "-sigmoid"
    ours, *theirs = (f"{name}{tail}" for name in ("batch-x5", "none", "none-x5"))
    if ":" in config.model or not {"none", ours, *theirs} <= runs.keys():
        return None
    ahead = [estimate(paired(runs[ours], runs[other])) for other in theirs]
    behind = estimate(paired(runs["none"], runs[ours]))
    outcome = all_of([word(effect, MARGIN) for effect in ahead])
    if outcome == Word.HOLDS and behind.low > BEHIND:
        outcome = Word.INCONCLUSIVE
    with_norm, *without = (estimate([tested(run) for run in runs[arm]]) for arm in (ours, *theirs))
    text = (
        f"With sigmoids and 5 times the rate, batch norm reaches {said(with_norm, percent)} test "
        f"accuracy, {points(-behind.median)} points from {config.activation} without norm. "
        f"Sigmoids without norm reach {percent(without[0].median)} at the rate and "
        f"{percent(without[1].median)} at 5 times it: batch norm is ahead by "
        f"{said(ahead[0], points)} and {said(ahead[1], points)} points."
    )
    return Verdict("Sigmoids need batch norm", outcome, text)


def _control(config: Config, reached: Mapping[str, Mapping[int, float]]) -> Verdict:
    effect = _speedup(config, reached, "none-again")
    found = word(effect)
    text = f"The same network with other seeds: {said(effect, times, '×')} as many steps"
    if found in (Word.HOLDS, Word.REVERSED):
        text += (
            ", though there is no effect to find. By the rule this happens in at most 1 of 20 "
            "studies; read the other verdicts with that doubt, or add seeds."
        )
    elif found == Word.INCONCLUSIVE:
        text += ", as it must be where there is no effect."
    else:
        text += "."
    return Verdict("Control (A/A)", found, text)


def _row(
    config: Config, arm: Arm, runs: Sequence[Run], reached: Mapping[str, Mapping[int, float]]
) -> list[str]:
    steps = estimate(list(reached[arm.name].values()))
    accuracy = estimate([tested(run) for run in runs])
    pace = estimate([1e3 * run.seconds / max(run.step, 1) for run in runs])
    got = sum(math.isfinite(v) for v in reached[arm.name].values())
    effect = _speedup(config, reached, arm.name)
    return [
        arm.label,
        f"{count(steps.median)} ({interval(steps, count)})",
        f"{got} of {len(runs)}",
        str(sum(run.status == "diverged" for run in runs)),
        "" if arm.name == "none" else said(effect, times, "×"),
        f"{accuracy.median:.1%} ({interval(accuracy, percent)})",
        f"{pace.median:.2f}",
        "" if arm.name == "none" else word(effect),
    ]


def _notes(config: Config, target: float, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    n = len(runs["none"])
    notes = [
        f"The target is 98 % of the median final smoothed validation accuracy without norm: "
        f"{target:.2%}. Runs are smoothed by the mean of five evaluations.",
        "Medians with their exact 95 % interval (the sign test's), over "
        f"{n} seeds; runs are paired by seed: same initial weights, same batches.",
        "A run that never reached the target counts as reaching it at the last step in a speed-up, "
        "and as “never” in a median of steps. A diverged run has accuracy 0.",
    ]
    if ":" in config.model:
        notes.append(
            "Nothing is said of sigmoids: the activations of a model of your own can't be changed "
            "from here."
        )
    return notes


def _figures(
    evidence: Evidence, reached: Mapping[str, Mapping[int, float]], target: float
) -> list[Figure]:
    runs = evidence.runs
    own = [arm for arm in evidence.arms if arm not in SIGMOID_ARMS]
    figures = [
        _accuracy_figure(
            "accuracy", "Validation accuracy over training", own, runs, reached, target
        )
    ]
    if sigmoids := [arm for arm in evidence.arms if arm in SIGMOID_ARMS]:
        beside = [arm for arm in own if arm.name in ("none", "batch-x5")]
        title = f"With sigmoids in place of {evidence.config.activation}"
        figures.append(
            _accuracy_figure("sigmoids", title, [*beside, *sigmoids], runs, reached, target)
        )
    figures.append(_percentile_figure(runs))
    labels = {arm.name: (arm.label, COLOURS[arm.name]) for arm in evidence.arms}
    for name, title, shown in (
        ("distributions", "What every layer sees", ("none", "batch")),
        (
            "sigmoid-distributions",
            "What every layer sees, with sigmoids",
            ("none-sigmoid", "batch-x5-sigmoid"),
        ),
    ):
        named = {arm: labels[arm] for arm in shown if arm in labels}
        if figure := distributions.figure(name, title, runs, named):
            figures.append(figure)
    return figures


def _accuracy_figure(
    name: str,
    title: str,
    arms: Sequence[Arm],
    runs: Mapping[str, Sequence[Run]],
    reached: Mapping[str, Mapping[int, float]],
    target: float,
) -> Figure:
    drawn, marks, said = [], [], []
    for arm in arms:
        dash = "dot" if arm.other_seeds else "dash" if arm.rate > 5 else "solid"
        colour = COLOURS[arm.name]
        drawn.append(over_seeds(arm.label, colour, runs[arm.name], VALIDATION, dash, smooth=1))
        first = estimate(list(reached[arm.name].values())).median
        if math.isfinite(first):
            marks.append(
                Mark(
                    f"{arm.label} reaches the target",
                    colour,
                    first,
                    target,
                    "target after %{x:,} steps",
                )
            )
            said.append(f"{arm.label} after a median of {first:,.0f} steps")
    return lines(
        name=name,
        title=title,
        caption=f"Median over {len(runs['none'])} seeds, smoothed over five evaluations; the band "
        f"spans all of them. A dot is the median of the steps after which an arm reaches "
        f"{target:.1%}. Validation accuracy is on the same samples in every arm.",
        alt=f"Validation accuracy against training steps. {target:.1%} is reached by "
        f"{', '.join(said) or 'no arm'}.",
        drawn=drawn,
        x=Axis("training steps", log=True, format=","),
        level=(target, f"target {target:.1%}"),
        marks=marks,
    )


def _percentile_figure(runs: Mapping[str, Sequence[Run]]) -> Figure:
    shown = []
    for name, label in (("none", "no norm"), ("batch", "batch norm")):
        first = [run for run in runs.get(name, ()) if "p50" in run.curves][:1]
        drawn = []
        for run in first:
            for share, dash in ((85, "dash"), (50, "solid"), (15, "dot")):
                steps, values = run.curves[f"p{share}"]
                pick = kept(len(steps))
                drawn.append(
                    Line(
                        f"{share}th percentile",
                        COLOURS["batch"],
                        [steps[i] for i in pick],
                        short(values[i] for i in pick),
                        dash=dash,
                    )
                )
        if drawn:
            shown.append((label, drawn))
    return panels(
        name="percentiles",
        title="What the last hidden layer sees",
        caption="The 15th (dotted), 50th (solid) and 85th (dashed) percentile, over the validation "
        "samples, of what the first unit of the last hidden layer feeds its activation. First "
        "seed; the unit was fixed beforehand.",
        alt="Three percentiles of one unit's input over training, without and with batch norm.",
        shown=shown,
        y=Axis("input to the last activation"),
    )
