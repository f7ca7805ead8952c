"""How the values of every layer are distributed before and after its norm, along a training.

A study that looks with `look` has the percentiles as curves of its runs, and draws them with
`figure`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normkit.lab.report.figures import Axis, Line, grid, short
from normkit.lab.results.store import Run
from normkit.lab.study import Figure
from normkit.lab.training.models import activations, layers, norms
from normkit.lab.training.probe import Probe

PERCENTS = (5, 15, 50, 85, 95)
_SAMPLES = 100
_MOST_LAYERS = 5


@torch.no_grad()
def look(at: Probe) -> dict[str, float]:
    """Return percentiles of the values that go into and come out of every norm, in evaluation.

    Over the first 100 validation samples, all units and all places of an image together; the
    percentile p of n sorted values is the one at round(p / 100 * (n - 1)), from 0. Named
    "layer 1 before p5" to "layer L after p95". A network without norms has its activations' inputs
    instead, as "before" alone; one whose activations are no modules the outputs of its linear and
    convolutional layers but the last. A layer with a value that isn't finite is left out.
    """
    model = at.model.eval()
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Tensor) -> None:
        seen.setdefault(name, []).append(value.detach().flatten())

    def goes_in(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        keep(name, inputs[0])

    def comes_out(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        keep(name, output)

    found = norms(model)
    for place, module in enumerate((found or activations(model)).values(), 1):
        module.register_forward_pre_hook(partial(goes_in, f"layer {place} before"))
        if found:
            module.register_forward_hook(partial(comes_out, f"layer {place} after"))
    if not found and not activations(model):
        for place, module in enumerate(list(layers(model).values())[:-1], 1):
            module.register_forward_hook(partial(comes_out, f"layer {place} before"))
    model(at.data.validation[0][:_SAMPLES])
    return {
        f"{name} p{percent}": value
        for name, values in seen.items()
        for percent, value in percentiles(torch.cat(values)).items()
    }


def percentiles(values: Tensor) -> dict[int, float]:
    """Return the percentiles by percent; none where a value isn't finite."""
    if not bool(torch.isfinite(values).all()):
        return {}
    ordered = values.sort().values
    return {
        percent: float(ordered[round(percent / 100 * (len(ordered) - 1))]) for percent in PERCENTS
    }


def figure(
    name: str, title: str, runs: Mapping[str, Sequence[Run]], shown: Mapping[str, tuple[str, int]]
) -> Figure | None:
    """Return the distributions of some arms as small multiples, layers side by side.

    `shown` maps the arms to their labels and colours. None where no run of theirs was looked at.
    """
    rows = []
    for arm, (label, colour) in shown.items():
        found = [run.curves for run in runs.get(arm, ()) if run.status == "finished"]
        for side, what in (("before", "before the norm"), ("after", "after the norm")):
            count = sum(name.endswith(f" {side} p50") for name in (found[0] if found else ()))
            if count:
                bare = not any("layer 1 after p50" in curves for curves in found)
                heading = f"{label}, {'into the activation' if bare else what}"
                rows.append((heading, colour, side, count, found))
    if not rows:
        return None
    layers_ = max(count for _, _, _, count, _ in rows)
    picked = sorted({round(i) for i in np.linspace(1, layers_, min(layers_, _MOST_LAYERS))})
    n = len(rows[0][4])
    some = "" if len(picked) == layers_ else f" {len(picked)} of {layers_} layers are shown."
    return grid(
        name=name,
        title=title,
        caption="Line: the median of a layer's values; dark band: the 15th to 85th percentile; "
        "light band: the 5th to 95th. Over the first 100 validation samples, all units and all "
        "places of an image together, in evaluation mode (running averages); each percentile is "
        f"the median over N = {n} seeds.{some} One row has one vertical axis.",
        alt=" ".join(_told(heading, side, count, found) for heading, _, side, count, found in rows),
        rows=[heading for heading, *_ in rows],
        columns=[f"layer {place}" for place in picked],
        cells=[
            [_bands(found, f"layer {place} {side}", colour) for place in picked]
            for _, colour, side, _, found in rows
        ],
        y=Axis(""),
    )


def _bands(found: Sequence[Mapping[str, Any]], which: str, colour: int) -> list[Line]:
    present = [curves for curves in found if f"{which} p50" in curves]
    if not present:
        return []
    steps = min((curves[f"{which} p50"][0] for curves in present), key=len)
    low, lower, middle, upper, high = (
        short(np.median([curves[f"{which} p{p}"][1][: len(steps)] for curves in present], 0))
        for p in PERCENTS
    )
    return [
        Line("5th to 95th percentile", colour, steps, middle, low, high),
        Line("15th to 85th percentile", colour, steps, middle, lower, upper),
    ]


def _told(heading: str, side: str, last: int, found: Sequence[Mapping[str, Any]]) -> str:
    outer = _bands(found, f"layer {last} {side}", 0)[1]
    assert outer.low is not None
    assert outer.high is not None
    first, end = ((outer.low[i], outer.y[i], outer.high[i]) for i in (0, -1))
    return (
        f"{heading}, layer {last}: 15th, 50th and 85th percentile "
        f"{first[0]:.2g}, {first[1]:.2g}, {first[2]:.2g} at first and "
        f"{end[0]:.2g}, {end[1]:.2g}, {end[2]:.2g} at the end."
    )
