"""What one arm has over another in accuracy and in steps, and whether it is much or little."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from normkit.lab.report.figures import Axis, Interval, intervals
from normkit.lab.results.measures import (
    arrivals,
    count,
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
from normkit.lab.results.verdict import (
    Estimate,
    Word,
    all_of,
    any_of,
    estimate,
    matters,
    negligible,
    seeds_to_place,
    settling,
)
from normkit.lab.study import Evidence, Figure
from normkit.lab.training.arms import Arm

ACCURACY_MARGIN = 0.01
"""A difference in test accuracy that is little: less than one percentage point."""
STEPS_MARGIN = math.log(1.5)
"""A ratio of steps that is little: less than 1.5, as its logarithm."""


@dataclass(frozen=True)
class Contrast:
    """What one arm has over another, by seed: test accuracy, and log ratios of steps to a target.

    Positive is better: a higher accuracy, fewer steps.
    """

    accuracy: Sequence[float]
    steps: Sequence[float]

    def matters(self) -> Word:
        """Return the verdict on a claim that the one is better: in either, and worse in neither."""
        return any_of(
            [
                matters(estimate(self.accuracy), ACCURACY_MARGIN),
                matters(estimate(self.steps), STEPS_MARGIN),
            ]
        )

    def negligible(self) -> Word:
        """Return the verdict on a claim that the two differ little: in both within the margins.

        It is reversed where either lies beyond its margin.
        """
        words = [
            negligible(estimate(self.accuracy), ACCURACY_MARGIN),
            negligible(estimate(self.steps), STEPS_MARGIN),
        ]
        return Word.REVERSED if Word.REVERSED in words else all_of(words)

    def told(self) -> str:
        """Return both effects in words."""
        return (
            f"{said(estimate(self.accuracy), points, ' points')} of test accuracy over the other, "
            f"which takes {said(estimate(self.steps), times, '×')} its steps to the target"
        )

    def settled_by(self) -> str:
        """Return how many seeds would settle it, as the end of an inconclusive verdict."""
        open_ = [
            seeds_to_place(values, margin)
            for values, margin in (
                (self.accuracy, ACCURACY_MARGIN),
                (self.steps, STEPS_MARGIN),
            )
            if matters(estimate(values), margin) == Word.INCONCLUSIVE
        ]
        known = [n for n in open_ if n is not None]
        return settling(max(known) if known and len(known) == len(open_) else None)


def contrast(evidence: Evidence, ours: str, theirs: str) -> Contrast:
    """Return what arm `ours` has over `theirs` at the best rates.

    The target is 98 % of the median final smoothed validation accuracy of `ours`.
    """
    tuned, steps = evidence.tuned, evidence.config.steps
    assert steps is not None
    target = target_of(tuned[ours])
    slower, quicker = (arrivals(tuned[name], target) for name in (theirs, ours))
    return Contrast(paired(tuned[ours], tuned[theirs]), speedups(slower, quicker, steps))


REACHED = (
    "Test accuracy, own rate",
    "Best factor",
    "Test accuracy, best rate",
    "Steps to the target",
)
"""The columns of `reached_cells` behind the arm's own."""


def reached_cells(evidence: Evidence, arm: Arm, base: str) -> list[str]:
    """Return an arm's row of a table: its label and REACHED; the target is that of arm `base`."""
    runs, tuned = evidence.runs[arm.name], evidence.tuned[arm.name]
    target = target_of(evidence.tuned.get(base, tuned))
    return [
        arm.label,
        said(estimate([tested(run) for run in runs]), percent),
        f"{evidence.factors[arm.name]:g}×",
        said(estimate([tested(run) for run in tuned]), percent),
        said(estimate(list(arrivals(tuned, target).values())), count),
    ]


def contrast_figures(
    shown: Mapping[str, tuple[int, Contrast]], what: str, better: str
) -> list[Figure]:
    """Return the effects as two figures: accuracy and steps, by label, with a colour for each.

    `what` names the comparison, `better` what lies to the right.
    """
    n = max((len(each.accuracy) for _, each in shown.values()), default=0)
    accuracy = {label: estimate(each.accuracy) for label, (_, each) in shown.items()}
    ratios = {label: exponential(estimate(each.steps)) for label, (_, each) in shown.items()}
    share = {
        label: Estimate(100 * e.median, 100 * e.low, 100 * e.high, e.n)
        for label, e in accuracy.items()
    }
    interval = f"Median and 95 % interval of {n} paired seeds, each arm at its best rate."
    return [
        intervals(
            name="gains",
            title=f"Test accuracy: {what}",
            caption=f"{interval} Right of zero {better} is better; between the outer dotted lines, "
            "within one percentage point, the difference counts as little.",
            alt="; ".join(f"{label}: {e.median:+.1f} points" for label, e in share.items()),
            rows=[Interval(label, shown[label][0], e) for label, e in share.items()],
            x=Axis("percentage points"),
            level=(-100 * ACCURACY_MARGIN, 0.0, 100 * ACCURACY_MARGIN),
        ),
        intervals(
            name="paces",
            title=f"Steps to the target: {what}",
            caption=f"{interval} Right of 1 {better} takes fewer steps; between the outer dotted "
            "lines, within a factor of 1.5, the difference counts as little.",
            alt="; ".join(f"{label}: {e.median:.2f} times" for label, e in ratios.items()),
            rows=[Interval(label, shown[label][0], e) for label, e in ratios.items()],
            x=Axis("ratio of steps to the target", log=True),
            level=(math.exp(-STEPS_MARGIN), 1.0, math.exp(STEPS_MARGIN)),
        ),
    ]
