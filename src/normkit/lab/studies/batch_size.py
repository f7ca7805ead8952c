"""Does batch normalization need a large batch, and do group norm and batch renorm do without?

Wu & He 2018, Figure 1: the error over the batch size, at equal numbers of samples. The rule:

- Every arm sees as many samples; its rate is the configuration's times batch size over the
  configuration's batch size (the linear scaling that the paper uses), and once more the best of
  0.3, 1 and 3 times that.
- The small batch is the smallest of the grid, the large one 32. For each norm and seed: how far
  test accuracy falls from the large to the small batch, each at its tuned rate.
- Batch norm needs the batch: its fall is more than one percentage point (the interval of the median
  lies above; reversed when it lies below).
- Group norm does not, and batch renorm does not: the interval of the fall lies below one point;
  reversed when it lies above.
- Each claim is about one effect named beforehand, and has a verdict of its own.

Measured besides, at the end of a run, in each norm's input over the training part: how far the mean
and the variance of a batch lie from those of all the data. Per unit in standard deviations for the
mean and as a share of the variance for the variance, root mean square over units and 32 batches.
The inputs are those of evaluation, over at most 1,000 samples: the layers before normalize by their
running averages.

Batches of 2 take 30 times as many steps as the configuration's for as many samples, so this is a
short study: 6 % of the network's default number of samples, and a grid of three rates. `--steps`
gives more samples, `--arms '*-2,*-8,*-32'` fewer batch sizes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normkit.lab.report.figures import Axis, Interval, Line, intervals, panels
from normkit.lab.results.measures import interval, paired, percent, points, tested
from normkit.lab.results.store import Run
from normkit.lab.results.verdict import (
    Estimate,
    Verdict,
    Word,
    estimate,
    headline,
    settled_by,
    word,
)
from normkit.lab.study import Evidence, Figure, Findings, NotApplicable, Study
from normkit.lab.training.arms import Arm, renorm_schedule
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.lab.training.models import norms
from normkit.lab.training.probe import Probe

SIZES = (2, 4, 8, 32, 128)
LARGE = 32
_GHOST = 8
NORMS = {
    "batch": "batch norm",
    "ghost": f"ghost batch norm ({_GHOST} samples)",
    "renorm": "batch renorm",
    "group": "group norm",
}
MARGIN = 0.01
_BATCHES = 32
_SAMPLES = 1_000
_GRID = (0.3, 1.0, 3.0)
_MEASURES = ("mean", "variance")
_COLOURS = {"batch": 1, "ghost": 5, "renorm": 3, "group": 2}


def arms(config: Config, data: Data) -> list[Arm]:
    """Return an arm for every norm and every batch size that the training part can fill."""
    sizes = [size for size in SIZES if size <= len(data.train[0])]
    if LARGE not in sizes:
        raise NotApplicable(
            f"{len(data.train[0])} training samples don't fill a batch of {LARGE}, with which the "
            "small batches are compared"
        )
    first = [LARGE, *(size for size in sizes if size != LARGE)]
    return [
        Arm(
            f"{norm}-{size}",
            f"{label}, batches of {size}",
            norm=f"ghost:{_GHOST}" if norm == "ghost" else norm,
            rate=size / config.batch_size,
            arguments=renorm_schedule(_samples(config) // size) if norm == "renorm" else {},
            options={"batch_size": size},
        )
        for norm, label in NORMS.items()
        for size in first
        if _arm(norm, size) == f"{norm}-{size}"
    ]


def _arm(norm: str, size: int) -> str:
    """Return the arm of a norm and a batch size: a batch of one ghost is batch norm's."""
    return f"batch-{size}" if norm == "ghost" and size <= _GHOST else f"{norm}-{size}"


def finish(at: Probe) -> dict[str, Any]:
    """Return by norm how far batches of the arm's size are from the data: mean and variance."""
    inputs = _inputs(at)
    generator = torch.Generator().manual_seed(at.seed)
    return {
        name: dict(
            zip(("mean", "variance"), errors(x, at.config.batch_size, generator), strict=True)
        )
        for name, x in inputs.items()
    }


def errors(x: Tensor, size: int, generator: torch.Generator) -> tuple[float, float]:
    """Return how far the mean and the variance of batches are from those of `x`, (N, C, *).

    Root mean square over channels and batches of (m_B - m) / sqrt(v) and of v_B / v - 1, with
    biased variances, batches of `size` samples drawn without replacement. Channels that don't vary
    are left out.
    """
    values = x.double().flatten(2) if x.ndim > 2 else x.double().unsqueeze(2)
    variance, mean = torch.var_mean(values, (0, 2), correction=0)
    varies = variance > 1e-12 * (mean.square() + 1e-12)
    means, variances = [], []
    for _ in range(_BATCHES):
        batch = values[torch.randperm(len(values), generator=generator)[:size]]
        v, m = torch.var_mean(batch, (0, 2), correction=0)
        means.append(((m - mean) / variance.sqrt())[varies])
        variances.append((v / variance - 1)[varies])

    def root_mean_square(found: list[Tensor]) -> float:
        return float(torch.stack(found).square().mean().sqrt()) if bool(varies.any()) else 0.0

    return root_mean_square(means), root_mean_square(variances)


@torch.no_grad()
def _inputs(at: Probe) -> dict[str, Tensor]:
    """Return each norm's input in evaluation, over at most 1,000 training samples."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[name] = inputs[0].detach().cpu()

        return hook

    for name, norm in norms(at.model).items():
        norm.register_forward_pre_hook(keep(name))
    at.model.eval()
    at.model(at.data.train[0][:_SAMPLES])
    return seen


def judge(evidence: Evidence) -> Findings:
    """Return the verdicts, table and figures."""
    arms = evidence.arms
    sizes = sorted({int(arm.name.rpartition("-")[2]) for arm in arms})
    small = sizes[0]
    verdicts = []
    falls: dict[str, Estimate] = {}
    for norm, label in NORMS.items():
        found = [evidence.tuned.get(_arm(norm, size)) for size in (LARGE, small)]
        if small == LARGE or not all(found):
            continue
        large_runs, small_runs = (runs for runs in found if runs)
        values = paired(large_runs, small_runs)
        fall = falls[norm] = estimate(values)
        if norm == "ghost":
            continue
        fixed = estimate(paired(evidence.runs[f"{norm}-{LARGE}"], evidence.runs[f"{norm}-{small}"]))
        needs = norm == "batch"
        beyond = [value - MARGIN if needs else MARGIN - value for value in values]
        outcome = word(estimate(beyond))
        text = (
            f"From batches of {LARGE} to batches of {small}, test accuracy with {label} changes by "
            f"{points(-fall.median)} points ({interval(_negative(fall), points)}) at tuned rates, "
            f"by {points(-fixed.median)} at the linearly scaled ones."
        )
        if outcome == Word.INCONCLUSIVE:
            text += settled_by(beyond)
        claim = f"{label.capitalize()} {'needs' if needs else 'does without'} a large batch"
        verdicts.append(Verdict(claim, outcome, text))
    return Findings(
        headline=headline(verdicts),
        verdicts=verdicts,
        columns=[
            "Arm",
            "Steps",
            "Test accuracy, scaled rate",
            "Best factor",
            "Test accuracy, tuned rate",
            "Error of batch means, by layer",
            "Error of batch variances, by layer",
        ],
        rows=[_row(evidence, arm) for arm in arms],
        figures=[
            _error_figure(evidence, sizes),
            _fall_figure(falls, small),
            *_noise_figure(evidence, sizes),
        ],
        notes=[
            f"Every arm saw as many samples ({_samples(evidence.config):,}), in batches of its "
            "size. The scaled rate is the configuration's rate times batch size over "
            f"{evidence.config.batch_size}; the tuned one is the best of a grid around it.",
            f"Group norm has at most eight groups. Ghost batch norm with batches of up to {_GHOST} "
            "is batch norm: those runs stand for both. Batch renorm's limits open over the same "
            "shares of the training as in Ioffe 2017; its momentum is 0.01, or 20 over the number "
            "of steps where that is more, at most 0.1.",
            "Error of batch means: (batch mean − mean of the data) in standard deviations of the "
            "unit; of variances: batch variance over the data's, less 1; root mean square over "
            f"units and {_BATCHES} batches, median over the seeds. For independent samples and one "
            "value per sample the first is 1/√n but for the finite data.",
            f"Medians with their exact 95 % interval over {evidence.config.seeds} seeds, paired. "
            "Three claims named beforehand, each with its own chance of at most 1 in 20 of being "
            "called wrongly; none is picked out of many.",
        ],
    )


STUDY = Study(
    name="batch-size",
    claim="Batch normalization needs a batch large enough to stand for the data; group norm and "
    "batch renorm don't.",
    source="Wu & He 2018, Group Normalization (arXiv:1803.08494), Figure 1; Ioffe 2017, Batch "
    "Renormalization (arXiv:1702.03275)",
    arms=arms,
    judge=judge,
    finish=finish,
    tuned=True,
    grid=_GRID,
    published="ResNet-50's ImageNet error at 32, 16, 8, 4, 2 images a worker: batch norm 23.6, "
    "23.7, 24.8, 27.3, 34.7 %, group norm 24.1, 24.2, 24.0, 24.2, 24.1 % (Wu & He). Inception at "
    "4: batch renorm 76.5 %, batch norm 74.2 % accuracy (Ioffe).",
    length=0.06,
)


def _negative(effect: Estimate) -> Estimate:
    return Estimate(-effect.median, -effect.high, -effect.low, effect.n)


def _samples(config: Config) -> int:
    return int(config.steps or 0) * config.batch_size


def _row(evidence: Evidence, arm: Arm) -> list[str]:
    runs, tuned = evidence.runs[arm.name], evidence.tuned[arm.name]
    found = [run.found for run in runs if run.found]

    def by_layer(measure: str) -> str:
        if not found:
            return ""
        medians = [estimate([each[layer][measure] for each in found]).median for layer in found[0]]
        return ", ".join(f"{value:.2f}" for value in medians)

    return [
        arm.label,
        f"{runs[0].step:,}",
        _accuracy(runs),
        f"{evidence.factors[arm.name]:g}×",
        _accuracy(tuned),
        by_layer("mean"),
        by_layer("variance"),
    ]


def _accuracy(runs: Sequence[Run]) -> str:
    effect = estimate([tested(run) for run in runs])
    return f"{percent(effect.median)} ({interval(effect, percent)})"


def _error_figure(evidence: Evidence, sizes: Sequence[int]) -> Figure:
    shown = []
    for heading, source in (
        ("rate tuned for each arm", evidence.tuned),
        ("rate scaled with the batch", evidence.runs),
    ):
        drawn = []
        for norm, label in NORMS.items():
            present = [size for size in sizes if source.get(_arm(norm, size))]
            found = [
                estimate([1 - tested(run) for run in source[_arm(norm, size)]]) for size in present
            ]
            drawn.append(
                Line(
                    label,
                    _COLOURS[norm],
                    present,
                    [effect.median for effect in found],
                    [effect.low for effect in found],
                    [effect.high for effect in found],
                    markers=True,
                )
            )
        shown.append((heading, drawn))
    return panels(
        name="error",
        title="Test error over the batch size",
        caption="Median over the seeds and its 95 % interval, at equal numbers of training "
        f"samples; N = {evidence.config.seeds} seeds. The paper's Figure 1, on this data.",
        alt="Test error against the batch size, one line for each norm, at tuned and at linearly "
        "scaled learning rates.",
        shown=shown,
        x=Axis("samples in a batch", log=True, format=","),
        y=Axis("test error", format=".1%"),
    )


def _fall_figure(falls: dict[str, Estimate], small: int) -> Figure:
    rows = [
        Interval(
            NORMS[norm],
            _COLOURS[norm],
            Estimate(100 * fall.median, 100 * fall.low, 100 * fall.high, fall.n),
        )
        for norm, fall in falls.items()
    ]
    return intervals(
        name="falls",
        title=f"What batches of {small} cost against batches of {LARGE}",
        caption="How far test accuracy falls, paired by seed, each arm at its tuned rate: median "
        "and 95 % interval. The dotted line is the margin of one percentage point.",
        alt="; ".join(f"{row.label}: {row.effect.median:.1f} points" for row in rows),
        rows=rows,
        x=Axis("fall of test accuracy, percentage points"),
        level=100 * MARGIN,
    )


def _noise_figure(evidence: Evidence, sizes: Sequence[int]) -> list[Figure]:
    by_size = {
        size: [run.found for run in evidence.runs.get(f"batch-{size}", ()) if run.found]
        for size in sizes
    }
    present = [size for size in sizes if by_size[size]]
    if not present:
        return []
    shown = []
    for heading, measure in zip(("batch means", "batch variances"), _MEASURES, strict=True):
        drawn = []
        for place, layer in enumerate(by_size[present[0]][0]):
            found = [estimate([each[layer][measure] for each in by_size[size]]) for size in present]
            drawn.append(
                Line(
                    f"norm {place + 1}",
                    (1, 2, 4, 3, 5, 7, 8, 9)[place % 8],
                    present,
                    [effect.median for effect in found],
                    markers=True,
                )
            )
        drawn.append(
            Line("1/√n", 6, present, [1 / math.sqrt(size) for size in present], dash="dot")
        )
        shown.append((heading, drawn[:9]))
    return [
        panels(
            name="noise",
            title="How well a batch stands for the data",
            caption="Error of a batch's mean (in standard deviations of the unit) and of its "
            "variance (as a share of it) against all training data, root mean square over units "
            f"and {_BATCHES} batches, in the networks with batch norm; median over the seeds. "
            "Dotted: 1/√n, the error of a mean of n independent values.",
            alt="The error of batch means and variances falls with the batch size, by layer.",
            shown=shown,
            x=Axis("samples in a batch", log=True, format=","),
            y=Axis("relative error", log=True),
        )
    ]
