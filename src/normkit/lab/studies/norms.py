"""Which normalization is best here?

Every norm of the family that fits the network, and the reparametrizations of its weights. Each is
trained at the configuration's rate and at the best of a grid for it. The rule, at the tuned rates:

- Normalization helps: some arm's test accuracy is above that without normalization. All arms are
  compared with it by paired t tests, corrected by Holm's method over the arms; the claim holds when
  at least one is better, and is reversed when every one is worse.
- One is best: the arm with the highest mean test accuracy is better than each of the others, by
  paired t tests corrected for all pairs of arms, since it was picked out after the fact. It holds
  when it beats every other; otherwise it is inconclusive, and the sentence names those that can't
  be told from it.
- One is fastest: likewise for the steps to the target (98 % of the median final accuracy without
  normalization, at its tuned rate), as log ratios; a run that never gets there counts as arriving
  at the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normkit.common.errors import LabError
from normkit.lab.report.figures import Axis, Interval, intervals, lines, over_seeds
from normkit.lab.results.measures import (
    VALIDATION,
    arrivals,
    count,
    interval,
    paired,
    percent,
    points,
    speedups,
    target_of,
    tested,
)
from normkit.lab.results.store import Run
from normkit.lab.results.verdict import Verdict, Word, compare, estimate, headline, settled_by
from normkit.lab.study import Evidence, Figure, Findings, Study
from normkit.lab.training.arms import Arm, renorm_schedule
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.lab.training.models import check
from normkit.lab.training.probe import Probe

ARMS = (
    Arm("none", "no norm"),
    Arm("batch", "batch norm", norm="batch"),
    Arm("ghost", "ghost batch norm (16)", norm="ghost:16"),
    Arm("renorm", "batch renorm", norm="renorm"),
    Arm("layer", "layer norm", norm="layer"),
    Arm("rms", "RMS norm", norm="rms"),
    Arm("group", "group norm", norm="group"),
    Arm("instance", "instance norm", norm="instance"),
    Arm("dyt", "dynamic tanh", norm="dyt"),
    Arm("frn", "filter response norm", norm="frn"),
    Arm("grn", "global response norm", norm="grn"),
    Arm("weight", "weight norm", norm="weight"),
    Arm("spectral", "spectral norm", norm="spectral"),
    Arm("standardized", "weight standardization", norm="weight-standardization"),
)
_OFF_SCALE = 20.0
# There are ten colours: the last arms share the first ones', and are dotted.
_DOTTED = [arm.name for arm in ARMS[10:]]
_COLOURS = {arm.name: (0, 1, 5, 3, 2, 8, 4, 9, 7, 6)[place % 10] for place, arm in enumerate(ARMS)}


def arms(config: Config, data: Data) -> list[Arm]:
    """Return no norm, and every norm that the network takes."""
    fitting = []
    for arm in ARMS:
        if arm.norm == "renorm":
            arm = replace(arm, arguments=renorm_schedule(config.steps))
        try:
            check(data, [(arm, config)])
        except (LabError, ValueError):
            if arm.norm == "none":
                raise
        else:
            fitting.append(arm)
    return fitting


def finish(at: Probe) -> dict[str, Any]:
    """Return the bytes that the forward of one batch saves for its backward, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in at.model.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x, y = at.batches[at.step]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(at.model(x), y)
    del loss
    return {"saved_bytes": sum(saved.values())}


def judge(evidence: Evidence) -> Findings:
    """Return the verdicts, table and figures."""
    tuned = evidence.tuned
    target = target_of(tuned["none"])
    reached = {name: arrivals(runs, target) for name, runs in tuned.items()}
    others = [arm for arm in evidence.arms if arm.name != "none"]
    gains = {arm.name: paired(tuned[arm.name], tuned["none"]) for arm in others}
    compared = compare(gains)
    labels = {arm.name: arm.label for arm in evidence.arms}
    verdicts = []
    if others:
        verdicts = [
            _helps(compared, labels),
            _best(
                "One norm is best",
                {name: [tested(run) for run in runs] for name, runs in tuned.items()},
                labels,
                "the highest test accuracy",
            ),
            _best(
                "One norm is fastest",
                _quickness(evidence.config, reached),
                labels,
                f"the fewest steps to {percent(target)}",
            ),
        ]
    absent = [arm.label for arm in ARMS if arm.name not in labels]
    return Findings(
        headline=headline(verdicts, "nothing compared"),
        verdicts=verdicts,
        columns=[
            "Arm",
            "Test accuracy, own rate",
            "Best factor",
            "Test accuracy, tuned rate",
            "Gain over no norm, points",
            "Better than no norm",
            f"Steps to {percent(target)}",
            "ms per step",
            "KB saved for backward",
        ],
        rows=[
            _row(evidence, arm, reached, compared[arm.name].word if arm in others else "")
            for arm in evidence.arms
        ],
        figures=[_gain_figure(evidence, gains), _curve_figure(evidence, target)],
        notes=[
            "“Better than no norm”: paired t tests over the seeds at 5 %, corrected by Holm's "
            "method over the arms of the table; holds means better, reversed worse. Intervals are "
            "the exact 95 % ones of the median, each for itself.",
            "“Best” and “fastest” are picked out after the fact: their comparisons are corrected "
            "for all pairs of arms.",
            "Milliseconds per step are of the forward, backward and optimizer, beside whatever "
            "else the machine did; only their ratios mean something. Bytes are what one batch's "
            "forward keeps for its backward, without the weights.",
            "Batch renorm's limits open over the same shares of the training as in Ioffe 2017. "
            "Weights are reparametrized in every layer but the last, and start as without.",
            *([f"Doesn't fit this network: {', '.join(absent)}."] if absent else []),
        ],
    )


STUDY = Study(
    name="norms",
    claim="One normalization is the best for this network and data.",
    source="Luo et al. 2018 (arXiv:1806.10779), Table 1, and Salimans & Kingma 2016 "
    "(arXiv:1602.07868), Table 2, compare norms; which is best here is for this study to find",
    arms=arms,
    judge=judge,
    finish=finish,
    tuned=True,
    length=0.2,
    published="ResNet-50's ImageNet accuracy at 32 images a worker: switchable norm 76.9, batch "
    "norm 76.4, group norm 75.9 % (Luo). CIFAR-10 error: no norm 8.43, weight norm 8.46, batch "
    "norm 8.05 % (Salimans & Kingma).",
)


def _helps(compared: Mapping[str, Any], labels: Mapping[str, str]) -> Verdict:
    words = {name: found.word for name, found in compared.items()}
    better = [labels[name] for name, found in words.items() if found == Word.HOLDS]
    worse = [labels[name] for name, found in words.items() if found == Word.REVERSED]
    if Word.RANGE_ONLY in words.values():
        called = Word.RANGE_ONLY
    else:
        every = len(worse) == len(words)
        called = Word.HOLDS if better else Word.REVERSED if every else Word.INCONCLUSIVE
    text = (
        f"Better than no norm in test accuracy: {', '.join(better) or 'none'}; worse: "
        f"{', '.join(worse) or 'none'}; of {len(words)} compared."
    )
    return Verdict("Normalization helps", called, text)


def _best(
    claim: str, merits: Mapping[str, Sequence[float]], labels: Mapping[str, str], having: str
) -> Verdict:
    """Return whether the arm of the highest mean merit beats every other, all pairs considered."""
    first = max(merits, key=lambda name: sum(merits[name]) / len(merits[name]))
    names = list(merits)
    family = {
        f"{a}/{b}": [x - y for x, y in zip(merits[a], merits[b], strict=True)]
        for place, a in enumerate(names)
        for b in names[place + 1 :]
    }
    found = compare(family)
    unbeaten, values = [], []
    for other in names:
        if other == first:
            continue
        ahead = f"{first}/{other}" in found
        word = found[f"{first}/{other}" if ahead else f"{other}/{first}"].word
        if word == Word.RANGE_ONLY:
            return Verdict(claim, word, f"{labels[first].capitalize()} has {having} on average.")
        if word != (Word.HOLDS if ahead else Word.REVERSED):
            unbeaten.append(labels[other])
            values = [x - y for x, y in zip(merits[first], merits[other], strict=True)]
    text = f"{labels[first].capitalize()} has {having} on average"
    if not unbeaten:
        return Verdict(claim, Word.HOLDS, f"{text}, and is told apart from every other arm.")
    tail = settled_by(values) if len(unbeaten) == 1 else ""
    text += f", but can't be told apart from {', '.join(unbeaten)}.{tail}"
    return Verdict(claim, Word.INCONCLUSIVE, text)


def _quickness(
    config: Config, reached: Mapping[str, Mapping[int, float]]
) -> dict[str, list[float]]:
    """Return by arm and seed the log of horizon over steps to the target."""
    assert config.steps is not None
    end = float(config.steps)
    return {
        name: speedups(dict.fromkeys(steps, end), steps, end) for name, steps in reached.items()
    }


def _row(
    evidence: Evidence, arm: Arm, reached: Mapping[str, Mapping[int, float]], better: str
) -> list[str]:
    runs, tuned = evidence.runs[arm.name], evidence.tuned[arm.name]
    gain = estimate(paired(tuned, evidence.tuned["none"]))
    steps = estimate(list(reached[arm.name].values()))
    saved = [run.found["saved_bytes"] for run in tuned if run.found]
    return [
        arm.label,
        _accuracy(runs),
        f"{evidence.factors[arm.name]:g}×",
        _accuracy(tuned),
        f"{points(gain.median)} ({interval(gain, points)})" if better else "",
        better,
        f"{count(steps.median)} ({interval(steps, count)})",
        f"{estimate([1e3 * run.seconds / max(run.step, 1) for run in tuned]).median:.2f}",
        f"{estimate(saved).median / 1e3:,.0f}" if saved else "",
    ]


def _accuracy(runs: Sequence[Run]) -> str:
    effect = estimate([tested(run) for run in runs])
    return f"{percent(effect.median)} ({interval(effect, percent)})"


def _gain_figure(evidence: Evidence, gains: Mapping[str, Sequence[float]]) -> Figure:
    labels = {arm.name: arm.label for arm in evidence.arms}
    rows = sorted(
        (
            Interval(labels[name], _COLOURS[name], estimate([100 * v for v in values]))
            for name, values in gains.items()
        ),
        key=lambda row: -row.effect.median,
    )
    # One arm that doesn't train would press all others into a point.
    off = [row for row in rows if row.effect.high < -_OFF_SCALE or row.effect.low > _OFF_SCALE]
    beyond = "; ".join(f"{row.label} ({row.effect.median:+.1f})" for row in off)
    return intervals(
        name="gains",
        title="Test accuracy against no norm",
        caption="Gain over the network without normalization, paired by seed, each arm at its "
        f"tuned rate: median and 95 % interval of {evidence.config.seeds} seeds."
        + (f" Off the scale: {beyond}." if off else ""),
        alt="; ".join(f"{row.label}: {row.effect.median:+.1f} points" for row in rows),
        rows=[row for row in rows if row not in off],
        x=Axis("gain in test accuracy, percentage points"),
        level=0.0,
    )


def _curve_figure(evidence: Evidence, target: float) -> Figure:
    drawn = [
        over_seeds(
            arm.label,
            _COLOURS[arm.name],
            evidence.tuned[arm.name],
            VALIDATION,
            "dot" if arm.name in _DOTTED else "solid",
            smooth=1,
        )
        for arm in evidence.arms
    ]
    bare = [line and replace(line, low=None, high=None) for line in drawn]
    return lines(
        name="accuracy",
        title="Validation accuracy over training",
        caption=f"Median of {evidence.config.seeds} seeds, smoothed over five evaluations, each "
        "arm at its tuned rate.",
        alt="Validation accuracy against training steps, a line for each norm.",
        drawn=bare,
        x=Axis("training steps", log=True, format=","),
        level=(target, f"target {percent(target)}"),
    )
