"""The statistics of a study: steps to a target, paired comparisons, and the rule of a verdict.

Paired by seed, exact and free of distributions: the interval of a median is the one of the sign
test (its ends are order statistics, by the binomial distribution). Six pairs are the fewest that
reach 95 %: the interval from the smallest to the largest then covers 1 - 2 / 2**6 = 96.9 %; three
would cover 75 %. Where there is no effect, a comparison is therefore called conclusive in at most
1 of 20 studies (1 of 32 at six seeds), whatever the distribution of the steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95
FEWEST = 6
WINDOW = 5
"""Evaluations in the trailing mean that smooths an accuracy curve; fewer at its start."""
TARGET_SHARE = 0.98


@dataclass(frozen=True)
class Estimate:
    """A median of `n` values with its interval, or their whole range where `n` is below six."""

    median: float
    low: float
    high: float
    n: int

    @property
    def is_range(self) -> bool:
        """Say whether low and high are the range, for want of enough values for an interval."""
        return self.n < FEWEST


@dataclass(frozen=True)
class Verdict:
    """One claim's outcome in a word, and the sentence with the numbers that decide it.

    `word` is "holds", "reversed", "inconclusive" or "range only".
    """

    claim: str
    word: str
    because: str


def estimate(values: Sequence[float]) -> Estimate:
    """Return the median and its exact interval (at least 95 %); infinity is a value like any.

    Raises ValueError without values.
    """
    if not len(values):
        raise ValueError("no values to estimate a median from")
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    # numpy's median of (inf, inf) is NaN: the mean of the two in the middle, spelled out.
    a, b = float(ordered[(n - 1) // 2]), float(ordered[n // 2])
    median = a if a == b else (a + b) / 2
    if n < FEWEST:
        return Estimate(median, float(ordered[0]), float(ordered[-1]), n)
    interval = stats.quantile_test(ordered, p=0.5).confidence_interval(CONFIDENCE)
    return Estimate(median, float(interval.low), float(interval.high), n)


def word(effect: Estimate, margin: float = 0.0) -> str:
    """Return the verdict on an effect that the claim says is positive.

    "holds" when its whole interval lies above `margin`, "reversed" when it lies below `-margin`,
    "range only" for fewer than six pairs, else "inconclusive".
    """
    if effect.is_range:
        return "range only"
    if effect.low > margin:
        return "holds"
    if effect.high < -margin:
        return "reversed"
    return "inconclusive"


def smoothed(accuracy: Sequence[float]) -> list[float]:
    """Return the mean of each value and up to four before it."""
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(np.asarray(accuracy, np.float64)))])
    last = np.arange(1, len(accuracy) + 1)
    first = np.maximum(last - WINDOW, 0)
    return [float(v) for v in (total[last] - total[first]) / (last - first)]


def steps_to(target: float, steps: Sequence[int], accuracy: Sequence[float]) -> float:
    """Return the first step at which the smoothed accuracy reaches `target`; infinity if never."""
    for step, value in zip(steps, smoothed(accuracy), strict=True):
        if value >= target:
            return float(step)
    return math.inf


def log_speedup(baseline: float, other: float, horizon: float) -> float:
    """Return log(baseline / other) of two numbers of steps to the target.

    A run that never reached it (infinity) counts as having reached it at `horizon`, the end of
    the training. That pulls the ratio towards 1, never away from it: of two runs the one that
    arrived stays ahead, and two that never arrived are a tie.
    """
    return math.log(min(baseline, horizon) / min(other, horizon))
