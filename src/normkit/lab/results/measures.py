"""What the studies read off a run, and how they say it: steps, accuracies, intervals."""

import math
from collections.abc import Callable, Mapping, Sequence

from normkit.lab.results.store import Run
from normkit.lab.results.verdict import (
    TARGET_SHARE,
    Estimate,
    estimate,
    log_speedup,
    smoothed,
    steps_to,
)

VALIDATION = "validation_accuracy"


def final(run: Run) -> float:
    """Return the smoothed final validation accuracy; a diverged run has 0."""
    if run.status != "finished":
        return 0.0
    return smoothed(run.curves[VALIDATION][1])[-1]


def tested(run: Run) -> float:
    """Return the accuracy on the test part; a diverged run has 0."""
    return run.test_accuracy or 0.0


def target_of(baseline: Sequence[Run]) -> float:
    """Return 98 % of the baseline's median smoothed final accuracy; a diverged run counts as 0."""
    return TARGET_SHARE * estimate([final(run) for run in baseline]).median


def arrivals(runs: Sequence[Run], target: float) -> dict[int, float]:
    """Return by seed the steps to the target; infinity for a run that never got there.

    A target of 0 (the baseline diverged) is reached by nobody, rather than by everybody.
    """
    return {
        run.seed: steps_to(target, *run.curves[VALIDATION])
        if run.status == "finished" and target > 0
        else math.inf
        for run in runs
    }


def speedups(base: Mapping[int, float], other: Mapping[int, float], horizon: float) -> list[float]:
    """Return the log ratios of steps to the target, base over other, paired by seed."""
    return [log_speedup(base[seed], other[seed], horizon) for seed in base if seed in other]


def paired(
    ours: Sequence[Run], theirs: Sequence[Run], measure: Callable[[Run], float] = tested
) -> list[float]:
    """Return what `ours` have more of a measure than `theirs`, paired by seed."""
    base = {run.seed: measure(run) for run in theirs}
    return [measure(run) - base[run.seed] for run in ours if run.seed in base]


def exponential(logs: Estimate) -> Estimate:
    """Return the estimate of a ratio from that of its logarithm."""
    return Estimate(_exp(logs.median), _exp(logs.low), _exp(logs.high), logs.n)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def count(value: float) -> str:
    """Return a number of steps in words."""
    return "never" if math.isinf(value) else f"{value:,.0f}"


def points(value: float) -> str:
    """Return a difference of fractions as percentage points, signed."""
    return f"{100 * value:+.1f}".replace("-", "−")


def percent(value: float) -> str:
    """Return a fraction as a percentage."""
    return f"{value:.1%}"


def times(value: float) -> str:
    """Return a log ratio as the ratio."""
    return f"{math.exp(value):.2f}"


def duration(seconds: float) -> str:
    """Return a time in minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def interval(effect: Estimate, show: Callable[[float], str]) -> str:
    """Return the interval of an estimate in words, or its range where it has none."""
    what = "range" if effect.is_range else "95\N{NO-BREAK SPACE}%:"
    return f"{what} {show(effect.low)} to {show(effect.high)}"


def said(effect: Estimate, show: Callable[[float], str], unit: str = "") -> str:
    """Return the median with its interval in words, `unit` behind the median."""
    return f"{show(effect.median)}{unit} ({interval(effect, show)})"
