"""Does it matter whether batch norm stands before or after the activation?

Ioffe & Szegedy 2015, section 3.2, put it before, since what comes from a linear layer "is more
likely to have a symmetric, non-sparse distribution"; Mishkin, Sergievskiy & Matas 2016 found it
slightly better after ReLU in one network and worse in another. One network for each activation and
place, each at its own rate and at the best of a grid, at which the rule looks:

- Effects, per seed, before over after with the same activation: the difference in test accuracy,
  and the log ratio of the steps to the target, which is 98 % of the median final smoothed
  validation accuracy of the network with the norm before. A run that never reaches it counts as
  reaching it at the very end.
- Little difference, with tanh and with ReLU: it holds when the intervals of both medians lie within
  the margins, one percentage point of accuracy and a factor of 1.5 in steps; it is reversed when
  either lies beyond its margin, whichever side. Not to have shown a difference is no little one.
- Before is better with sigmoid: it holds when either interval lies above its margin and neither
  below its negative one, is reversed the other way round, and is "little difference" when both lie
  within.
- Each claim is named beforehand. Each looks at two effects: at six seeds and where the truth is
  just at the margins it is called wrongly in at most 1 of 32 studies.

Probed along each run on the batch of the next step, in training mode, for each activation and layer
of weights: the share of saturated units, whose activation's slope is below a twentieth of its
largest (with ReLU: inactive ones), and the l2 norm of the gradient of the layer's weights.

History: fixed before the first study.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normkit.lab.report.contrast import REACHED, Contrast, contrast, contrast_figures, reached_cells
from normkit.lab.report.figures import ACCURACY, Axis, Line, over_seeds, panels
from normkit.lab.results.measures import VALIDATION, percent, tested
from normkit.lab.results.store import Run
from normkit.lab.results.verdict import Verdict, Word, estimate, headline
from normkit.lab.study import Evidence, Figure, Findings, NotApplicable, Study
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.lab.training.models import layers
from normkit.lab.training.probe import Probe

LABELS = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "ReLU"}
PLACES = {"before": 1, "after": 5}
ARMS = tuple(
    Arm(
        f"{activation}-{place}",
        f"{label}, norm {place}",
        norm="batch",
        options={"activation": activation, "placement": place},
    )
    for activation, label in LABELS.items()
    for place in PLACES
)
_SLOPES: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Sigmoid: lambda x: 4 * x.sigmoid() * (-x).sigmoid(),
    nn.Tanh: lambda x: 1 - x.tanh().square(),
    nn.ReLU: lambda x: (x > 0).to(x),
}
_FLAT = 0.05


def arms(config: Config, data: Data) -> Sequence[Arm]:
    """Return an arm for every activation and place; NotApplicable where they can't be set."""
    if ":" in config.model:
        raise NotApplicable(
            f"model {config.model!r}: where its norms stand and what its activations are is its "
            "own; --model mlp, cnn and resnet can be built either way"
        )
    if config.placement != "before":
        raise NotApplicable(
            f"--placement {config.placement}: this study places the norms itself; leave it out"
        )
    return ARMS


def probe(at: Probe) -> dict[str, float]:
    """Return "saturated.i" of activation i and "gradient.i" of the weights of layer i.

    On the next batch, in training mode. Holds one gradient.
    """
    inputs: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []

    def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
        inputs.append((_SLOPES[type(module)], given[0].detach()))

    for module in at.model.modules():
        if type(module) in _SLOPES:
            module.register_forward_pre_hook(keep)
    x, y = at.batches[at.step]
    loss = nn.functional.cross_entropy(at.model(x), y)
    weights: list[Any] = [layer.weight for layer in layers(at.model).values()]
    gradients = torch.autograd.grad(loss, weights)
    return {
        f"saturated.{i}": float((slope(each) < _FLAT).double().mean())
        for i, (slope, each) in enumerate(inputs, 1)
    } | {f"gradient.{i}": float(each.norm()) for i, each in enumerate(gradients, 1)}


def judge(evidence: Evidence) -> Findings:
    """Return the verdicts, table and figures."""
    tuned = evidence.tuned
    pairs = {
        activation: contrast(evidence, f"{activation}-before", f"{activation}-after")
        for activation in LABELS
        if {f"{activation}-{place}" for place in PLACES} <= tuned.keys()
    }
    verdicts = [_verdict(evidence, activation, pair) for activation, pair in pairs.items()]
    n = evidence.config.seeds
    return Findings(
        headline=headline(verdicts),
        verdicts=verdicts,
        columns=[
            "Arm",
            *REACHED,
            "Saturated at the end, by activation",
            "Gradient norm at the end, by layer",
            "Diverged",
        ],
        rows=[_row(evidence, arm) for arm in evidence.arms],
        figures=list(_figures(evidence, pairs)),
        notes=[
            "Every arm at its own rate and at the best of a grid around it, at which the claims "
            "are judged.",
            "The target is 98 % of the median final smoothed validation accuracy with the same "
            "activation and the norm before it.",
            "Saturated: units whose activation's slope is below a twentieth of its largest, over "
            "the samples of the next batch in training mode; with ReLU those that are inactive. "
            "Gradient norm: l2, of a layer's weights, on the same batch. Medians over the seeds, "
            "the last of ten looks, at the best rates.",
            f"Medians with their exact 95 % interval over {n} seeds, paired: same initial weights "
            "and batches before and after. Three claims named beforehand; “little difference” "
            "asks that both intervals lie within one percentage point and a factor of 1.5.",
            *(
                ["In a resnet the norms in front of a sum stay where they are."]
                if evidence.config.model == "resnet"
                else []
            ),
        ],
    )


STUDY = Study(
    name="placement",
    claim="Before or after the activation makes little difference, except with sigmoid, where "
    "before is better.",
    source="Ioffe & Szegedy 2015 (arXiv:1502.03167), section 3.2, for before; Mishkin, Sergievskiy "
    "& Matas 2016 (arXiv:1606.02228), section 3.2, for both with ReLU",
    arms=arms,
    judge=judge,
    probe=probe,
    tuned=True,
    length=0.5,
    published="Before, since a linear layer's output is more symmetric (Ioffe & Szegedy); "
    "slightly better after ReLU in one network, worse in another (Mishkin et al.).",
)


def _verdict(evidence: Evidence, activation: str, pair: Contrast) -> Verdict:
    sigmoid = activation == "sigmoid"
    outcome = pair.matters() if sigmoid else pair.negligible()
    before, after = (
        estimate([tested(run) for run in evidence.tuned[f"{activation}-{place}"]]).median
        for place in PLACES
    )
    text = (
        f"At the best rates test accuracy is {percent(before)} with the norm before and "
        f"{percent(after)} with it after {LABELS[activation]}. By seed, before has {pair.told()}."
    )
    if outcome == Word.INCONCLUSIVE:
        text += pair.settled_by()
    claim = "Before is better with" if sigmoid else "Little difference with"
    return Verdict(f"{claim} {LABELS[activation]}", outcome, text)


def _row(evidence: Evidence, arm: Arm) -> list[str]:
    tuned = evidence.tuned[arm.name]
    return [
        *reached_cells(evidence, arm, f"{arm.options['activation']}-before"),
        ", ".join(f"{value:.0%}" for value in _last(tuned, "saturated")),
        ", ".join(f"{value:.2g}" for value in _last(tuned, "gradient")),
        f"{sum(run.status == 'diverged' for run in tuned)} of {len(tuned)}",
    ]


def _last(runs: Sequence[Run], kind: str) -> list[float]:
    """Return by layer the median over the seeds of a probe's last value."""
    return [
        estimate([run.curves[name][1][-1] for run in runs if name in run.curves]).median
        for name in _curves(runs, kind)
    ]


def _curves(runs: Sequence[Run], kind: str) -> list[str]:
    names = {name for run in runs for name in run.curves if name.startswith(f"{kind}.")}
    return sorted(names, key=lambda name: int(name.partition(".")[2]))


def _figures(evidence: Evidence, pairs: dict[str, Contrast]) -> Iterator[Figure]:
    n = evidence.config.seeds
    tuned = evidence.tuned
    yield panels(
        name="accuracy",
        title="Validation accuracy with the norm before and after the activation",
        caption=f"Median of {n} seeds, smoothed over five evaluations, each arm at its best rate; "
        "the band spans all seeds.",
        alt="Validation accuracy over training, a panel for each activation, a line each for the "
        "norm before and after it.",
        shown=[
            (
                LABELS[activation],
                [
                    over_seeds(
                        f"norm {place}",
                        colour,
                        tuned[f"{activation}-{place}"],
                        VALIDATION,
                        smooth=1,
                    )
                    for place, colour in PLACES.items()
                ],
            )
            for activation in pairs
        ],
        x=Axis("training steps", log=True, format=","),
        y=ACCURACY,
    )
    colours = {"sigmoid": 0, "tanh": 2, "relu": 3}
    yield from contrast_figures(
        {LABELS[name]: (colours[name], pair) for name, pair in pairs.items()},
        "norm before against norm after the activation",
        "the norm before",
    )
    for kind, title, axis, caption in (
        (
            "saturated",
            "Share of saturated units",
            Axis("saturated units", format=".0%"),
            "Share of units whose activation is nearly flat: its slope below a twentieth of the "
            "largest; with ReLU, those that are inactive.",
        ),
        (
            "gradient",
            "Size of the gradient",
            Axis("l2 norm of the gradient", log=True),
            "The l2 norm of the gradient of a layer's weights on the next batch.",
        ),
    ):
        yield panels(
            name=kind,
            title=title,
            caption=f"{caption} Solid: the first layer, dotted: the last that has an activation. "
            f"Median of {n} seeds, each arm at its best rate.",
            alt=f"{title} over training, a panel for each activation: first and last layer, norm "
            "before and after.",
            shown=[
                (LABELS[activation], list(_layer_lines(evidence, activation, kind)))
                for activation in pairs
            ],
            y=axis,
        )


def _layer_lines(evidence: Evidence, activation: str, kind: str) -> Iterator[Line | None]:
    for place, colour in PLACES.items():
        runs = evidence.tuned[f"{activation}-{place}"]
        names = _curves(runs, "saturated") or [""]
        for name, layer, dash in ((names[0], "first", "solid"), (names[-1], "last", "dot")):
            curve = name.replace("saturated", kind)
            line = over_seeds(f"norm {place}, {layer} layer", colour, runs, curve, dash)
            yield line and replace(line, low=None, high=None)
