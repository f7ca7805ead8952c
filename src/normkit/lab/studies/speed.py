"""Does batch normalization reach the same accuracy in fewer steps, and bear larger rates?

Ioffe & Szegedy 2015, Figures 1 to 3. The rule, one for all data (its history: docs/lab.md):

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
- Control: a second set of runs without normalization, with other seeds, goes through the first
  rule as if it were a treatment. It must come out inconclusive.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from normkit.lab.config import Config
from normkit.lab.store import Run
from normkit.lab.studies import Figure, Findings, Study
from normkit.lab.train import Arm
from normkit.lab.verdict import (
    TARGET_SHARE,
    Estimate,
    Verdict,
    estimate,
    log_speedup,
    smoothed,
    steps_to,
    word,
)

ARMS = (
    Arm("none", "no norm"),
    Arm("batch", "batch norm", norm="batch"),
    Arm("batch-x5", "batch norm, 5× rate", norm="batch", rate=5.0),
    Arm("batch-x30", "batch norm, 30× rate", norm="batch", rate=30.0),
    Arm("none-x5", "no norm, 5× rate", rate=5.0),
    Arm("none-x30", "no norm, 30× rate", rate=30.0),
    Arm("none-again", "no norm, other seeds (A/A)", other_seeds=True),
)
MARGIN = 0.01
_ACCURACY = "validation_accuracy"
_MOST_POINTS = 400


def judge(config: Config, runs: Mapping[str, Sequence[Run]]) -> Findings:
    """Return the verdicts, table and figures for the runs of each arm (ended, by arm name)."""
    target = target_of(runs["none"])
    reached = {name: _steps(found, target) for name, found in runs.items()}
    arms = [arm for arm in ARMS if arm.name in runs]
    verdicts = []
    if "batch" in runs:
        verdicts.append(_fewer_steps(config, reached, target))
    if larger := _larger_rates(runs):
        verdicts.append(larger)
    if "none-again" in runs:
        verdicts.append(_control(config, reached))
    rows = [_row(config, arm, runs[arm.name], reached) for arm in arms]
    return Findings(
        headline=_headline(verdicts),
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
        figures=[_accuracy_figure(arms, runs, reached, target), _percentile_figure(runs)],
        notes=_notes(target, runs),
    )


STUDY = Study(
    name="speed",
    claim="Batch normalization reaches the same accuracy in fewer steps, and bears larger "
    "learning rates.",
    source="Ioffe & Szegedy 2015, Batch Normalization (arXiv:1502.03167), Figures 1 to 3",
    arms=ARMS,
    judge=judge,
)


def target_of(baseline: Sequence[Run]) -> float:
    """Return 98 % of the baseline's median smoothed final accuracy; a diverged run counts as 0."""
    finals = [
        smoothed(run.curves[_ACCURACY][1])[-1] if run.status == "finished" else 0.0
        for run in baseline
    ]
    return TARGET_SHARE * estimate(finals).median


def _steps(runs: Sequence[Run], target: float) -> dict[int, float]:
    # A target of 0 (the baseline diverged) is reached by nobody, rather than by everybody.
    return {
        run.seed: steps_to(target, *run.curves[_ACCURACY])
        if run.status == "finished" and target > 0
        else math.inf
        for run in runs
    }


def speedup(config: Config, reached: Mapping[str, Mapping[int, float]], arm: str) -> Estimate:
    """Return the log ratio of steps to the target, no norm over `arm`, paired by seed."""
    assert config.steps is not None
    base, other = reached["none"], reached[arm]
    return estimate(
        [log_speedup(base[seed], other[seed], config.steps) for seed in base if seed in other]
    )


def _fewer_steps(
    config: Config, reached: Mapping[str, Mapping[int, float]], target: float
) -> Verdict:
    effect = speedup(config, reached, "batch")
    with_norm, without = (estimate(list(reached[arm].values())) for arm in ("batch", "none"))
    missing = [
        f"{count} of {len(reached[arm])} runs {label} never got there"
        for arm, label in (("none", "without"), ("batch", "with batch norm"))
        if (count := sum(math.isinf(v) for v in reached[arm].values()))
    ]
    tail = f"; {' and '.join(missing)}" if missing else ""
    text = (
        f"To {target:.1%} validation accuracy batch norm took a median of "
        f"{_count(with_norm.median)} steps, no norm {_count(without.median)}: "
        f"{_ratio(effect)} as many steps without{tail}."
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
            f"At {factor} times the rate test accuracy changes by {_points(-with_norm.median)} "
            f"points with batch norm and by {_points(-without.median)} without: "
            f"{_points(effect.median)} in its favour ({_interval(effect, _points)})."
        )
    decided = words - {"inconclusive"}
    outcome = decided.pop() if len(decided) == 1 else "inconclusive"
    return Verdict("Larger rates", outcome, " ".join(sentences))


def _borne(effect: Estimate, with_norm: Estimate, without: Estimate) -> str:
    """Return the verdict at one raised rate; who wins by breaking less has not borne the rate."""
    found = word(effect, MARGIN)
    winner = {"holds": with_norm, "reversed": without}.get(found)
    return "inconclusive" if winner is not None and winner.low > MARGIN else found


def accuracy_falls(base: Sequence[Run], raised: Sequence[Run]) -> dict[int, float]:
    """Return by seed how far test accuracy (a fraction) falls from the base to the raised rate."""
    before = {run.seed: run.test_accuracy or 0.0 for run in base}
    return {
        run.seed: before[run.seed] - (run.test_accuracy or 0.0)
        for run in raised
        if run.seed in before
    }


def _control(config: Config, reached: Mapping[str, Mapping[int, float]]) -> Verdict:
    effect = speedup(config, reached, "none-again")
    found = word(effect)
    text = f"The same network with other seeds: {_ratio(effect)} as many steps"
    if found in ("holds", "reversed"):
        text += (
            ", though there is no effect to find. By the rule this happens in at most 1 of 20 "
            "studies; read the other verdicts with that doubt, or add seeds."
        )
    elif found == "inconclusive":
        text += ", as it must be where there is no effect."
    else:
        text += "."
    return Verdict("Control (A/A)", found, text)


def _headline(verdicts: Sequence[Verdict]) -> str:
    said = [f"{v.claim.lower()}: {v.word}" for v in verdicts if not v.claim.startswith("Control")]
    return ("; ".join(said) or "no comparison was run") + ", on this data"


def _row(
    config: Config, arm: Arm, runs: Sequence[Run], reached: Mapping[str, Mapping[int, float]]
) -> list[str]:
    steps = estimate(list(reached[arm.name].values()))
    accuracy = estimate([run.test_accuracy or 0.0 for run in runs])
    pace = estimate([1e3 * run.seconds / max(run.step, 1) for run in runs])
    got = sum(math.isfinite(v) for v in reached[arm.name].values())
    effect = speedup(config, reached, arm.name)
    return [
        arm.label,
        f"{_count(steps.median)} ({_interval(steps, _count)})",
        f"{got} of {len(runs)}",
        str(sum(run.status == "diverged" for run in runs)),
        "" if arm.name == "none" else _ratio(effect),
        f"{accuracy.median:.1%} ({_interval(accuracy, '{:.1%}'.format)})",
        f"{pace.median:.2f}",
        "" if arm.name == "none" else word(effect),
    ]


def _notes(target: float, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    n = len(runs["none"])
    notes = [
        f"The target is 98 % of the median final smoothed validation accuracy without norm: "
        f"{target:.2%}. Runs are smoothed by the mean of five evaluations.",
        "Medians with their exact 95 % interval (the sign test's), over "
        f"{n} seeds; runs are paired by seed: same initial weights, same batches.",
        "A run that never reached the target counts as reaching it at the last step in a speed-up, "
        "and as “never” in a median of steps. A diverged run has accuracy 0.",
    ]
    if n < 6:
        notes.append(
            f"Only {n} paired seeds: ranges, no intervals and no verdict. Give --seeds 6 or more."
        )
    return notes


def _count(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:,.0f}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _interval(effect: Estimate, show: Any) -> str:
    what = "range" if effect.is_range else "95 %:"
    return f"{what} {show(effect.low)} to {show(effect.high)}"


def _ratio(effect: Estimate) -> str:
    def times(value: float) -> str:
        return f"{math.exp(value):.2f}"

    return f"{times(effect.median)}× ({_interval(effect, times)})"


def _accuracy_figure(
    arms: Sequence[Arm],
    runs: Mapping[str, Sequence[Run]],
    reached: Mapping[str, Mapping[int, float]],
    target: float,
) -> Figure:
    traces: list[dict[str, Any]] = []
    dots = []
    for arm in arms:
        steps, values = _stacked(runs[arm.name], _ACCURACY)
        if not len(steps):
            continue
        middle, low, high = np.median(values, 0), values.min(0), values.max(0)
        colour = f"@{arm.name}"
        traces.append(
            {
                "type": "scatter",
                "name": f"{arm.label}, all seeds",
                "legendgroup": arm.name,
                "showlegend": False,
                "hoverinfo": "skip",
                "x": [*steps, *steps[::-1]],
                "y": [*_short(high), *_short(low)[::-1]],
                "mode": "none",
                "fill": "toself",
                "fillcolor": f"{colour}-band",
                "meta": "band",
            }
        )
        traces.append(
            {
                "type": "scatter",
                "name": arm.label,
                "legendgroup": arm.name,
                "x": steps,
                "y": _short(middle),
                "mode": "lines",
                "line": {
                    "color": colour,
                    "width": 2.4,
                    "dash": "dot" if arm.other_seeds else "dash" if arm.rate > 5 else "solid",
                },
                "hovertemplate": "step %{x:,}: %{y:.1%}<extra>" + arm.label + "</extra>",
                "meta": "line",
            }
        )
        first = estimate(list(reached[arm.name].values())).median
        if math.isfinite(first):
            dots.append((arm, first))
    for arm, first in dots:
        traces.append(
            {
                "type": "scatter",
                "name": f"{arm.label} reaches the target",
                "legendgroup": arm.name,
                "showlegend": False,
                "x": [first],
                "y": [target],
                "mode": "markers",
                "marker": {
                    "color": f"@{arm.name}",
                    "size": 12,
                    "line": {"color": "@page", "width": 2},
                },
                "hovertemplate": "target after %{x:,} steps<extra>" + arm.label + "</extra>",
                "meta": "dot",
            }
        )
    first_step = min((min(t["x"]) for t in traces if t["meta"] == "line"), default=1)
    last_step = max((max(t["x"]) for t in traces if t["meta"] == "line"), default=1)
    said = ", ".join(f"{arm.label} after {_count(first)} steps" for arm, first in dots)
    return Figure(
        name="accuracy",
        title="Same accuracy, fewer steps",
        caption="Validation accuracy, smoothed, against training steps (logarithmic). Lines: "
        "median over seeds; bands: lowest to highest seed. A dot: the median step at which "
        "an arm's runs first reach the target.",
        alt=f"Validation accuracy against steps. The target of {target:.1%} is reached by "
        f"{said or 'no arm'}.",
        traces=traces,
        layout={
            "xaxis": {
                "title": {"text": "training steps"},
                "type": "log",
                "range": [math.log10(first_step), math.log10(max(last_step, first_step + 1))],
                "tickvals": _ticks(first_step, last_step),
            },
            "yaxis": {"title": {"text": "validation accuracy"}, "tickformat": ".0%"},
            "shapes": [
                {
                    "type": "line",
                    "xref": "paper",
                    "x0": 0,
                    "x1": 1,
                    "y0": target,
                    "y1": target,
                    "line": {"color": "@muted", "width": 1, "dash": "dot"},
                    "layer": "below",
                }
            ],
            "annotations": [
                {
                    "xref": "paper",
                    "x": 0,
                    "y": target,
                    "xanchor": "left",
                    "yanchor": "bottom",
                    "showarrow": False,
                    "text": f"target {target:.1%}",
                    "font": {"color": "@muted", "size": 12},
                }
            ],
        },
    )


def _percentile_figure(runs: Mapping[str, Sequence[Run]]) -> Figure:
    traces: list[dict[str, Any]] = []
    panels = [("none", "no norm", ""), ("batch", "batch norm", "2")]
    shown = [panel for panel in panels if panel[0] in runs]
    for name, label, axis in shown:
        first = [run for run in runs[name] if "p50" in run.curves][:1]
        for run in first:
            for percent, dash in ((85, "dash"), (50, "solid"), (15, "dot")):
                steps, values = _thinned(*run.curves[f"p{percent}"])
                traces.append(
                    {
                        "type": "scatter",
                        "name": f"{label}, {percent}th",
                        "showlegend": False,
                        "x": steps,
                        "y": _short(values),
                        "xaxis": f"x{axis}",
                        "yaxis": "y",
                        "mode": "lines",
                        "line": {
                            "color": f"@{name}",
                            "width": 2.4 if percent == 50 else 1.6,
                            "dash": dash,
                        },
                        "hovertemplate": f"step %{{x:,}}: %{{y:.2f}}<extra>{label}, "
                        f"{percent}th percentile</extra>",
                        "meta": "line",
                    }
                )
    gap = 0.04
    width = (1 - gap * (len(shown) - 1)) / len(shown)
    layout: dict[str, Any] = {
        "yaxis": {"title": {"text": "input to the last activation"}},
        "showlegend": False,
        "annotations": [],
    }
    for place, (_, label, axis) in enumerate(shown):
        left = place * (width + gap)
        layout[f"xaxis{axis}"] = {
            "title": {"text": "training steps"},
            "domain": [left, left + width],
            "nticks": 5,
        }
        layout["annotations"].append(
            {
                "xref": "paper",
                "yref": "paper",
                "x": left,
                "y": 1.02,
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "text": f"<b>{label}</b>",
                "font": {"color": "@ink", "size": 14},
            }
        )
    return Figure(
        name="percentiles",
        title="What the last hidden layer sees",
        caption="The 15th (dotted), 50th (solid) and 85th (dashed) percentile, over the validation "
        "samples, of what the first unit of the last hidden layer feeds its activation. First "
        "seed; the unit was fixed beforehand.",
        alt="Three percentiles of one unit's input over training, without and with batch norm.",
        traces=traces,
        layout=layout,
    )


def _stacked(runs: Sequence[Run], name: str) -> tuple[list[int], Any]:
    """Return the steps that all ended runs share, and their smoothed values as (run, step)."""
    curves = [run.curves[name] for run in runs if name in run.curves and run.status == "finished"]
    if not curves:
        curves = [run.curves[name] for run in runs if name in run.curves]
    if not curves:
        return [], np.empty((0, 0))
    length = min(len(steps) for steps, _ in curves)
    pick = _kept(length)
    values = np.array([smoothed(values)[:length] for _, values in curves])[:, pick]
    return [curves[0][0][i] for i in pick], values


def _thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    pick = _kept(len(steps))
    return [steps[i] for i in pick], [values[i] for i in pick]


def _kept(length: int) -> list[int]:
    """Return which of `length` points to draw: all, or as many as the eye tells apart."""
    return sorted({round(i) for i in np.linspace(0, length - 1, min(length, _MOST_POINTS))})


def _short(values: Any) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _ticks(first: float, last: float) -> list[float]:
    ticks = [m * 10**e for e in range(8) for m in (1, 2, 5)]
    return [tick for tick in ticks if first <= tick <= last]
