"""The statistics of a study: steps to a target, paired comparisons, and the rule of a verdict.

Paired by seed, exact and free of distributions: the interval of a median is the one of the sign
test (its ends are order statistics, by the binomial distribution). Six pairs are the fewest that
reach 95 %: the interval from the smallest to the largest then covers 1 - 2 / 2**6 = 96.9 %; three
would cover 75 %. Where there is no effect, a comparison is therefore called conclusive in at most
1 of 20 studies (1 of 32 at six seeds), whatever the distribution of the steps.

Many comparisons. A claim that needs several effects at once ("every", "both") holds when all of
them do (`all_of`) and needs no correction: it is wrong at most as often as one of them. Where any
of several may be picked out, as in a table of arms, no sign test at six seeds could survive a
correction; there the paired t test stands in, corrected by Holm's method over the table
(`compare`). It takes the differences for roughly normal, which the tests try with skewed and
heavy-tailed ones.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95
FEWEST = 6
TOO_FEW = (
    f"Fewer than {FEWEST} seeds give ranges, no intervals and no verdict: give --seeds {FEWEST} or "
    "more, what is trained is kept."
)
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


class Word(StrEnum):
    """What became of a claim; LITTLE_DIFFERENCE where it says that an effect is large."""

    HOLDS = "holds"
    REVERSED = "reversed"
    INCONCLUSIVE = "inconclusive"
    RANGE_ONLY = "range only"
    LITTLE_DIFFERENCE = "little difference"


@dataclass(frozen=True)
class Verdict:
    """One claim's outcome in a word, and the sentence with the numbers that decide it."""

    claim: str
    word: Word
    because: str


def headline(verdicts: Sequence[Verdict], nothing: str = "no comparison was run") -> str:
    """Return the verdicts in one line; `nothing` where there are none."""
    said = [f"{verdict.claim.lower()}: {verdict.word}" for verdict in verdicts]
    return "; ".join(said) or nothing


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
    low, high = _ends(n)
    return Estimate(median, float(ordered[low]), float(ordered[high]), n)


@functools.cache
def _ends(n: int) -> tuple[int, int]:
    """The places of the interval's ends among n ordered values: they depend on n alone."""
    interval = stats.quantile_test(np.arange(n), p=0.5).confidence_interval(CONFIDENCE)
    return int(interval.low), int(interval.high)


def word(effect: Estimate, margin: float = 0.0) -> Word:
    """Return the verdict on an effect that the claim says is positive.

    "holds" when its whole interval lies above `margin`, "reversed" when it lies below `-margin`,
    "range only" for fewer than six pairs, else "inconclusive".
    """
    if effect.is_range:
        return Word.RANGE_ONLY
    if effect.low > margin:
        return Word.HOLDS
    if effect.high < -margin:
        return Word.REVERSED
    return Word.INCONCLUSIVE


def negligible(effect: Estimate, margin: float) -> Word:
    """Return the verdict on an effect that the claim says is small.

    "holds" when its whole interval lies within `margin` of zero, "reversed" when it lies beyond,
    "range only" for fewer than six pairs, else "inconclusive".
    """
    if effect.is_range:
        return Word.RANGE_ONLY
    if -margin < effect.low and effect.high < margin:
        return Word.HOLDS
    if effect.low > margin or effect.high < -margin:
        return Word.REVERSED
    return Word.INCONCLUSIVE


def matters(effect: Estimate, margin: float) -> Word:
    """Return the verdict on an effect that the claim says is positive and not small.

    "holds" when its whole interval lies above `margin`, "reversed" when it lies below `-margin`,
    "little difference" when it lies between, "range only" for fewer than six pairs, else
    "inconclusive".
    """
    if negligible(effect, margin) == Word.HOLDS:
        return Word.LITTLE_DIFFERENCE
    return word(effect, margin)


def all_of(words: Sequence[Word]) -> Word:
    """Return the verdict on a claim of several parts: the word that all of them have.

    Parts of different words are "inconclusive", "range only" with too few seeds.
    """
    if Word.RANGE_ONLY in words:
        return Word.RANGE_ONLY
    return words[0] if len(set(words)) == 1 else Word.INCONCLUSIVE


def any_of(words: Sequence[Word]) -> Word:
    """Return the verdict on a claim for which one of several effects is enough, by `matters`.

    "holds" or "reversed" where some are and none is the other; "little difference" where all are.
    """
    if Word.RANGE_ONLY in words:
        return Word.RANGE_ONLY
    decided = {word for word in words if word in (Word.HOLDS, Word.REVERSED)}
    if len(decided) == 1:
        return decided.pop()
    return Word.LITTLE_DIFFERENCE if set(words) == {Word.LITTLE_DIFFERENCE} else Word.INCONCLUSIVE


def seeds_to_settle(values: Sequence[float], margin: float = 0.0) -> int | None:
    """Return how many seeds would give an interval on one side of `margin`, or of its negative.

    Supposes that further seeds fall on the same side as often as these do, (k + 1/2) / (n + 1) for
    k of n on the fuller side, and asks for 80 % power of the sign test. None for more than 1,000.
    """
    n = len(values)
    above, below = sum(v > margin for v in values), sum(v < -margin for v in values)
    share = (max(above, below) + 0.5) / (n + 1)
    counts = np.arange(max(n + 1, FEWEST), 1001)
    # The fewest on one side that the two-sided sign test calls conclusive.
    needed = stats.binom.isf((1 - CONFIDENCE) / 2, counts, 0.5) + 1
    enough = counts[stats.binom.sf(needed - 1, counts, share) >= 0.8]
    return int(enough[0]) if len(enough) else None


def seeds_to_place(values: Sequence[float], margin: float) -> int | None:
    """Return how many seeds would tell an effect's side of `margin` and of its negative alike.

    That is what `matters` and `negligible` ask. Supposes as `seeds_to_settle` does.
    """
    found = [seeds_to_settle([value - edge for value in values]) for edge in (margin, -margin)]
    known = [n for n in found if n is not None]
    return max(known) if len(known) == len(found) else None


def settled_by(values: Sequence[float], margin: float = 0.0) -> str:
    """Return `seeds_to_settle` as the end of an inconclusive verdict's sentence."""
    return settling(seeds_to_settle(values, margin))


def settling(n: int | None) -> str:
    """Return a number of seeds that would settle it as the end of a verdict's sentence."""
    if n is None:
        return " Effects like these would not be settled by 1,000 seeds."
    return f" If further seeds fall like these, about {n} would settle it."


@dataclass(frozen=True)
class Comparison:
    """One of a family of paired comparisons: the verdict's word, and its p value after Holm."""

    word: Word
    p: float
    effect: Estimate


def compare(family: Mapping[str, Sequence[float]], margin: float = 0.0) -> dict[str, Comparison]:
    """Return the verdict on each of a family of paired effects, of which any may be picked out.

    Each is "holds" where its mean is above `margin` by a paired t test at 5 %, two-sided and
    corrected by Holm over the family, "reversed" where it is below `-margin` likewise. Effects must
    be finite. Effects that are all the same have a p value of 0, or 1 within the margin.
    """
    raw = {name: _t_test(values, margin) for name, values in family.items()}
    corrected: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(raw, key=lambda name: raw[name])):
        largest = max(largest, min(1.0, raw[name] * (len(raw) - place)))
        corrected[name] = largest
    return {
        name: Comparison(_called(values, corrected[name]), corrected[name], estimate(values))
        for name, values in family.items()
    }


def _t_test(values: Sequence[float], margin: float) -> float:
    array = np.asarray(values, dtype=np.float64)
    beyond = abs(float(array.mean())) - margin
    if len(array) < 2 or beyond <= 0:
        return 1.0
    deviation = float(array.std(ddof=1))
    if deviation <= 1e-12 * abs(float(array.mean())):
        return 0.0
    return float(2 * stats.t.sf(beyond / (deviation / len(array) ** 0.5), len(array) - 1))


def _called(values: Sequence[float], p: float) -> Word:
    if len(values) < FEWEST:
        return Word.RANGE_ONLY
    if p > 1 - CONFIDENCE:
        return Word.INCONCLUSIVE
    return Word.HOLDS if np.mean(values) > 0 else Word.REVERSED


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
