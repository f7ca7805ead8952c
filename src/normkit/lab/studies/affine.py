"""Do the learned scale and shift of a norm matter?

Ioffe & Szegedy 2015, section 3: normalizing alone "may change what the layer can represent", as it
holds the inputs of a sigmoid to the nearly linear part; a learned scale and shift can undo it. Xu
et al. 2019 found that layer norm's often do nothing, or harm. They can only matter where the next
layer can't make up for them: between norm and activation. Behind the activation the next layer's
weights and bias take in any scale and shift, and the network represents the same without: that is
the control.

Batch norm with both, with the scale alone, the shift alone, and neither (the others stay 1 and 0),
where the configuration places it; and with both and neither behind the activation, for the networks
that can be built so. Each arm at its own rate and at the best of a grid, at which the rule looks:

- Effects, per seed, with over without: the difference in test accuracy, and the log ratio of the
  steps to the target, which is 98 % of the median final smoothed validation accuracy with both. A
  run that never reaches it counts as reaching it at the very end.
- Scale and shift matter (both over neither), the scale matters (both over the shift alone), the
  shift matters (both over the scale alone): each holds when either interval lies above its margin,
  one percentage point of accuracy or a factor of 1.5 in steps, and neither below its negative one;
  is reversed the other way round (learning them does harm); is "little difference" when both lie
  within the margins.
- Behind the activation they matter little: it holds when both intervals (both over neither, there)
  lie within the margins, is reversed when either lies beyond.
- Each claim is named beforehand. Each looks at two effects: at six seeds and where the truth is
  just at the margins it is called wrongly in at most 1 of 32 studies.

History: fixed before the first study.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from normkit.lab.report.contrast import REACHED, Contrast, contrast, contrast_figures, reached_cells
from normkit.lab.report.figures import Axis, lines, over_seeds
from normkit.lab.results.measures import VALIDATION, percent, tested
from normkit.lab.results.store import Run
from normkit.lab.results.verdict import Verdict, Word, estimate, headline
from normkit.lab.study import Evidence, Figure, Findings, Study
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.lab.training.models import norms
from normkit.lab.training.probe import Probe

ARMS = (
    Arm("both", "scale and shift", norm="batch"),
    Arm("scale", "scale alone", norm="batch", fixed=("bias",)),
    Arm("shift", "shift alone", norm="batch", fixed=("weight",)),
    Arm("neither", "neither", norm="batch", fixed=("weight", "bias")),
)
BEHIND = tuple(
    Arm(
        f"behind-{arm.name}",
        f"{arm.label}, norm after the activation",
        norm="batch",
        fixed=arm.fixed,
        options={"placement": "after"},
    )
    for arm in (ARMS[0], ARMS[-1])
)
COLOURS = {
    "both": 1,
    "scale": 2,
    "shift": 3,
    "neither": 5,
    "behind-both": 1,
    "behind-neither": 5,
}
CLAIMS = {
    "Scale and shift matter": ("both", "neither"),
    "The scale matters": ("both", "shift"),
    "The shift matters": ("both", "scale"),
    "Behind the activation they matter little": ("behind-both", "behind-neither"),
}
_SHOWN = {
    "Scale and shift matter": "both against neither",
    "The scale matters": "both against shift alone",
    "The shift matters": "both against scale alone",
    "Behind the activation they matter little": "after the activation: both against neither",
}


def arms(config: Config, data: Data) -> Sequence[Arm]:
    """Return the arms; those behind the activation where the network can be built so."""
    return ARMS if ":" in config.model or config.placement == "after" else ARMS + BEHIND


def finish(at: Probe) -> dict[str, Any]:
    """Return by norm the mean and the deviation of its learned scales and shifts."""
    return {
        name: {
            kind: [float(values.mean()), float(values.std(correction=0))]
            for kind in ("weight", "bias")
            for values in [getattr(norm, kind).detach().double()]
        }
        for name, norm in norms(at.model).items()
    }


def judge(evidence: Evidence) -> Findings:
    """Return the verdicts, table and figures."""
    pairs = {
        claim: contrast(evidence, *names)
        for claim, names in CLAIMS.items()
        if set(names) <= evidence.tuned.keys()
    }
    verdicts = [_verdict(evidence, claim, pair) for claim, pair in pairs.items()]
    n = evidence.config.seeds
    return Findings(
        headline=headline(verdicts),
        verdicts=verdicts,
        columns=[
            "Learned",
            *REACHED,
            "Scales at the end, by norm",
            "Shifts at the end, by norm",
            "Diverged",
        ],
        rows=[_row(evidence, arm) for arm in evidence.arms],
        figures=list(_figures(evidence, pairs)),
        notes=[
            "Every arm at its own rate and at the best of a grid around it, at which the claims "
            "are judged. What isn't learned stays 1 (scale) or 0 (shift).",
            "The target is 98 % of the median final smoothed validation accuracy with both, with "
            "the norm in the same place.",
            "Scales and shifts: mean ± deviation over a norm's units, medians over the seeds, at "
            "the best rates.",
            "Behind the activation the next layer can take in any scale and shift, so that there "
            "they change nothing that the network can represent.",
            f"Medians with their exact 95 % interval over {n} seeds, paired: same initial weights "
            "and batches. Claims named beforehand, each with a verdict of its own; differences "
            "within one percentage point and a factor of 1.5 are little.",
        ],
    )


STUDY = Study(
    name="affine",
    claim="The learned scale and shift of a norm matter.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3; against it, for layer norm: Xu et "
    "al. 2019, Understanding and Improving Layer Normalization (arXiv:1911.07013).",
    arms=arms,
    judge=judge,
    finish=finish,
    tuned=True,
    length=0.5,
    published="Without scale and shift a norm may take from what a layer can represent (Ioffe & "
    "Szegedy); layer norm's often do nothing, or harm (Xu et al.).",
)


def _verdict(evidence: Evidence, claim: str, pair: Contrast) -> Verdict:
    control = claim.startswith("Behind")
    outcome = pair.negligible() if control else pair.matters()
    labels = {arm.name: arm.label for arm in (*ARMS, *BEHIND)}
    parts = [
        f"{percent(estimate([tested(run) for run in evidence.tuned[name]]).median)} with "
        f"{labels[name].partition(',')[0]}"
        for name in CLAIMS[claim]
    ]
    where = "With the norm after the activation, test" if control else "Test"
    text = (
        f"{where} accuracy at the best rates is {' and '.join(parts)}. By seed, the first has "
        f"{pair.told()}."
    )
    if outcome == Word.INCONCLUSIVE:
        text += pair.settled_by()
    return Verdict(claim, outcome, text)


def _row(evidence: Evidence, arm: Arm) -> list[str]:
    tuned = evidence.tuned[arm.name]
    return [
        *reached_cells(evidence, arm, _base(arm.name)),
        _learned(tuned, "weight"),
        _learned(tuned, "bias"),
        f"{sum(run.status == 'diverged' for run in tuned)} of {len(tuned)}",
    ]


def _base(name: str) -> str:
    return "behind-both" if name.startswith("behind") else "both"


def _learned(runs: Sequence[Run], kind: str) -> str:
    found = [run.found for run in runs if run.found]
    if not found:
        return ""
    return ", ".join(
        "{:.2f} ± {:.2f}".format(
            *(estimate([each[norm][kind][i] for each in found]).median for i in (0, 1))
        ).replace("-", "−")
        for norm in found[0]
    )


def _figures(evidence: Evidence, pairs: Mapping[str, Contrast]) -> Iterator[Figure]:
    yield from contrast_figures(
        {_SHOWN[claim]: (COLOURS[CLAIMS[claim][1]], pair) for claim, pair in pairs.items()},
        "with and without learned scale and shift",
        "learning them",
    )
    drawn = [
        over_seeds(
            arm.label.replace("norm after the activation", "after act."),
            COLOURS[arm.name],
            evidence.tuned[arm.name],
            VALIDATION,
            "dot" if arm in BEHIND else "solid",
            smooth=1,
        )
        for arm in evidence.arms
    ]
    yield lines(
        name="accuracy",
        title="Validation accuracy over training",
        caption=f"Median of {evidence.config.seeds} seeds, smoothed over five evaluations, each "
        "arm at its best rate. Dotted: norm after the activation.",
        alt="Validation accuracy against training steps, a line for each arm.",
        drawn=[line and replace(line, low=None, high=None) for line in drawn],
        x=Axis("training steps", log=True, format=","),
    )
