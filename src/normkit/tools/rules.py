"""The rules of inspect: what each looks for, its threshold, and how to mend what it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normkit.tools.flow import LINEAR
from normkit.tools.measure import Facts, Layer
from normkit.tools.norms import is_synchronized
from normkit.tools.spread import Spread

Found = Iterator[tuple[str, str, str]]
"""(layer, what was measured, the line that mends it) for each finding."""


@dataclass(frozen=True)
class Rule:
    """One rule: `check(facts, threshold)` yields its findings."""

    code: str
    name: str
    threshold: float
    of: str
    why: str
    check: Callable[[Facts, float], Found]


def redundant_bias(facts: Facts, threshold: float) -> Found:
    """A layer's bias that the norm behind it subtracts again."""
    for layer in facts.layers:
        linear: Any = layer.before.module if layer.before else None
        removes = layer.norm is not None and layer.norm.entry.removes_channel_means
        if not removes or layer.frozen or not layer.alone or not isinstance(linear, LINEAR):
            continue
        axes = 2 if isinstance(linear, nn.Linear) else 2 + len(linear.kernel_size)
        if linear.bias is not None and layer.rank == axes and len(linear.bias) > threshold:
            assert layer.before is not None
            words = type(linear).__name__
            yield (
                layer.before.name,
                f"a bias of {len(linear.bias)} values goes into {layer.name}, which subtracts it",
                f"{layer.before.name} = {words}(..., bias=False)",
            )


def train_eval_gap(facts: Facts, threshold: float) -> Found:
    """Outputs that differ between training and evaluation by more than noise."""
    if facts.gap <= max(threshold, 2 * facts.floor):
        return
    off = [layer for layer in facts.layers if _off(layer) > _ALLOWED_SHIFT]
    where = off[0].name if off else "the model"
    at = f"first at {where}, {_off(off[0]):.2g} from its data" if off else "at no single norm"
    yield (
        where,
        f"outputs differ by {facts.gap:.2g} of their standard deviation, {facts.floor:.2g} with "
        f"the statistics of these batches; {at}",
        "normkit.recalibrate(model, loader)",
    )


def never_updated(facts: Facts, threshold: float) -> Found:
    """Running statistics that are still those of the constructor."""
    for layer in facts.layers:
        if layer.uses_batch and _initial(layer):
            assert layer.running is not None
            distance = float((layer.running[0].abs() + (layer.running[1] - 1).abs()).max())
            if distance <= threshold:
                yield (
                    layer.name,
                    "running mean and variance are 0 and 1 in every channel",
                    "normkit.recalibrate(model, loader)",
                )


def stale(facts: Facts, threshold: float) -> Found:
    """Running statistics that are not those of the data."""
    for layer in facts.layers:
        if layer.uses_batch and not _initial(layer) and (away := _off(layer)) > threshold:
            yield (
                layer.name,
                f"running statistics are {away:.2g} from the data (means in standard deviations, "
                "or logarithm of the variances, beyond noise)",
                "normkit.recalibrate(model, loader)",
            )


def short_memory(facts: Facts, threshold: float) -> Found:
    """Running means that follow single batches."""
    for layer in facts.layers:
        momentum = layer.norm.momentum if layer.norm else None
        if not layer.uses_batch or momentum is None:
            continue
        noise = math.sqrt(momentum / (2 - momentum)) * layer.input.errors()[0]
        if noise > threshold:
            yield (
                layer.name,
                f"momentum={momentum:g} leaves a noise of {noise:.2g} standard deviations in the "
                "running mean",
                f"model.get_submodule({layer.name!r}).momentum = {_momentum(layer, threshold):.2g}",
            )


def few_values(facts: Facts, threshold: float) -> Found:
    """Batch statistics of too few values."""
    for layer in facts.layers:
        corrected = layer.norm is not None and layer.norm.kind == "renorm"
        if not layer.uses_batch or corrected:
            continue
        mean, variance = layer.input.errors()
        if mean > threshold:
            yield (
                layer.name,
                f"{layer.values} values a statistic: standard errors of {mean:.2g} (mean, in "
                f"standard deviations) and {variance:.2g} (variance, relative)",
                f"normkit.swap(model, 'group', only={layer.name!r})",
            )


def constant_channels(facts: Facts, threshold: float) -> Found:
    """Channels that don't vary, or that never get past a ReLU."""
    for layer in facts.layers:
        assert layer.input.all is not None
        moments = layer.input.all
        scale = (moments.mean.square() + moments.variance).sqrt()
        flat = moments.variance.sqrt() <= threshold * torch.maximum(scale, scale.mean())
        relu = bool(layer.after) and all(
            isinstance(op.module, nn.ReLU) or op.name in ("relu", "relu_") for op in layer.after
        )
        channel = layer.norm is not None and layer.norm.channels_first
        dead = torch.zeros_like(flat)
        if relu and channel and layer.highest is not None:
            dead = (layer.highest <= 0) & ~flat
        made_by = layer.before.name if layer.before and layer.before.module else "the input"
        for which, what, fix in (
            (flat, "constant", f"model.get_submodule({made_by!r}).reset_parameters()"),
            (
                dead,
                "never above 0 before a ReLU",
                f"torch.nn.init.zeros_(model.get_submodule({layer.name!r}).bias)",
            ),
        ):
            if which.any():
                channels = _list(which.nonzero().flatten().tolist())
                yield (
                    layer.name,
                    f"{int(which.sum())} of {len(which)} channels are {what}: {channels}",
                    fix,
                )


def saturated(facts: Facts, threshold: float) -> Found:
    """A sigmoid or tanh behind a norm that works where it is flat."""
    for layer in facts.layers:
        for op in layer.after:
            edge = _EDGES.get(_function(op))
            if edge is None or not layer.outputs:
                continue
            share = sum(abs(y) > edge for y in layer.outputs) / len(layer.outputs)
            if share > threshold:
                yield (
                    layer.name,
                    f"{share:.0%} of its output is where {_function(op)} has under 1 % of its "
                    "slope",
                    f"torch.nn.init.ones_(model.get_submodule({layer.name!r}).weight)",
                )


def behind_saturating(facts: Facts, threshold: float) -> Found:
    """A norm behind a sigmoid or tanh."""
    for layer in facts.layers:
        if layer.before is not None and _function(layer.before) in _EDGES:
            name = _function(layer.before)
            low, high = min(layer.inputs), max(layer.inputs)
            if high - low > threshold:
                yield (
                    layer.name,
                    f"its input is a {name}, from {low:.2g} to {high:.2g}",
                    f"nn.Sequential(linear, {layer.name}, nn.{name.title()}())",
                )


def weight_decay(facts: Facts, threshold: float) -> Found:
    """Weight decay on the affine of norms."""
    affine = {id(p) for layer in facts.layers for p in layer.module.parameters(recurse=False)}
    for number, group in enumerate(facts.optimizer.param_groups if facts.optimizer else []):
        hit = sum(id(p) in affine for p in group["params"])
        if hit and group.get("weight_decay", 0) > threshold:
            yield (
                f"optimizer.param_groups[{number}]",
                f"weight_decay={group['weight_decay']:g} on {hit} weights and biases of norms",
                f"torch.optim.{type(facts.optimizer).__name__}([{{'params': rest}}, "
                "{'params': norms, 'weight_decay': 0}])",
            )


def near_overflow(facts: Facts, threshold: float) -> Found:
    """Inputs near the end of what their type can hold, or can square."""
    for layer in facts.layers:
        half = layer.dtype == torch.float16
        ours = type(layer.module).__module__.startswith("normkit.")
        if ours and not half:
            continue
        wide = torch.float64 if layer.dtype == torch.float64 else torch.float32
        limit = torch.finfo(layer.dtype).max if half else math.sqrt(torch.finfo(wide).max)
        if layer.largest > threshold * limit:
            yield (
                layer.name,
                f"|x| reaches {layer.largest:.2g} in {layer.dtype}, whose "
                f"{'largest value' if half else 'largest square root'} is {limit:.2g}",
                "model.to(torch.bfloat16)" if half else f"normkit.swap(model, only={layer.name!r})",
            )


def padding(facts: Facts, threshold: float) -> Found:
    """Padding that takes part in statistics over positions."""
    for layer in facts.layers:
        pools = layer.norm is not None and layer.norm.entry.pool in ("batch", "positions", "group")
        if pools and not layer.frozen and (layer.padded or 0.0) > threshold:
            yield (
                layer.name,
                f"{layer.padded:.0%} of the positions are padding of different lengths",
                f"{layer.name}(x, mask=mask)  # after normkit.swap(model)",
            )


def local_statistics(facts: Facts, threshold: float) -> Found:
    """Batch statistics of each rank alone, at a small batch."""
    for layer in facts.layers:
        local = layer.uses_batch and layer.norm and not is_synchronized(layer.module)
        if facts.ranks > 1 and local and layer.samples < threshold:
            yield (
                layer.name,
                f"{layer.samples} samples a batch on each of {facts.ranks} ranks, normalized apart",
                f"normkit.swap(model, 'sync', only={layer.name!r})",
            )


def single_values(facts: Facts, threshold: float) -> Found:
    """Pools of one value: the norm's output is its bias."""
    for layer in facts.layers:
        kind = layer.norm.kind if layer.norm else None
        if kind in ("group", "layer", "instance") and layer.values <= threshold:
            yield (
                layer.name,
                f"{layer.values} value in each {kind}: the output is the bias, whatever comes in",
                f"normkit.swap(model, lambda c: normkit.GroupNorm(1, c), only={layer.name!r})",
            )


def validation_shift(facts: Facts, threshold: float) -> Found:
    """The first layer whose statistics differ between training and validation data."""
    off = []
    for layer in facts.layers:
        if layer.evaluated.all is None or layer.validated.all is None:
            continue
        away = _beyond_noise(layer.evaluated, layer.validated)
        if away > threshold:
            off.append((layer, away))
    if off:
        layer, away = off[0]
        more = f", and {len(off) - 1} norms after it" if len(off) > 1 else ""
        yield (
            layer.name,
            f"validation data are {away:.2g} from training data (means in standard deviations, or "
            f"logarithm of the variances, beyond noise){more}",
            "validation.transform = training.transform  # compare how the two are prepared",
        )


_ALLOWED_SHIFT = 0.25
_EDGES = {"sigmoid": 5.98, "tanh": 2.99}
"""|x| beyond which the slope is under 1 % of the largest."""

RULES = [
    Rule(
        "NK01",
        "redundant-bias",
        0,
        "values in the bias",
        "the norm subtracts the mean and the bias with it: it costs memory and gets no gradient",
        redundant_bias,
    ),
    Rule(
        "NK02",
        "train-eval-gap",
        0.25,
        "distance of the outputs over their standard deviation, and twice the noise",
        "evaluation runs another network than the one that was trained",
        train_eval_gap,
    ),
    Rule(
        "NK03",
        "never-updated",
        0,
        "distance of the running statistics from 0 and 1",
        "evaluation doesn't normalize at all",
        never_updated,
    ),
    Rule(
        "NK04",
        "stale",
        _ALLOWED_SHIFT,
        "distance of the running statistics from the data",
        "evaluation normalizes by the statistics of other data or of older weights",
        stale,
    ),
    Rule(
        "NK05",
        "short-memory",
        0.2,
        "noise of the running mean in standard deviations",
        "evaluation depends on which batches came last; torch's momentum weighs the new batch",
        short_memory,
    ),
    Rule(
        "NK06",
        "few-values",
        0.4,
        "standard error of a batch's mean in standard deviations",
        "each sample's output depends on which others are in its batch",
        few_values,
    ),
    Rule(
        "NK07",
        "constant-channels",
        1e-6,
        "standard deviation over root mean square",
        "such a channel carries nothing; the norm blows its rounding errors up, or puts out 0",
        constant_channels,
    ),
    Rule(
        "NK08",
        "saturated",
        0.3,
        "share of the output",
        "no gradient comes through where the activation is flat",
        saturated,
    ),
    Rule(
        "NK09",
        "behind-saturating",
        0,
        "range of the input",
        "the norm can't bring back what the activation has flattened; put it before",
        behind_saturating,
    ),
    Rule(
        "NK10",
        "weight-decay",
        0,
        "weight decay",
        "the affine sets the scale of the layer's output; decay pulls that to 0, without making "
        "the network simpler",
        weight_decay,
    ),
    Rule(
        "NK11",
        "near-overflow",
        1 / 16,
        "largest |x| over the limit",
        "squares or sums become infinite, and the output zero or NaN",
        near_overflow,
    ),
    Rule(
        "NK12",
        "padding",
        0.05,
        "share of the positions",
        "the statistics, and so every sample's output, depend on how long the others are",
        padding,
    ),
    Rule(
        "NK13",
        "local-statistics",
        16,
        "samples a rank",
        "each rank normalizes by a few samples of its own (Wu & He 2018: error rises under 16)",
        local_statistics,
    ),
    Rule(
        "NK14",
        "single-values",
        1,
        "values in a pool",
        "one value minus its mean is 0",
        single_values,
    ),
    Rule(
        "NK15",
        "validation-shift",
        _ALLOWED_SHIFT,
        "distance of the statistics",
        "the two are prepared differently, or come from different sources",
        validation_shift,
    ),
]
"""All rules: the threshold stands beside the quantity that it bounds."""


def _initial(layer: Layer) -> bool:
    assert layer.running is not None
    mean, var = layer.running
    return bool((mean == 0).all() and (var == 1).all())


def _off(layer: Layer) -> float:
    """How far the running statistics are from the data, beyond noise."""
    if not layer.uses_batch or layer.running is None:
        return 0.0
    shift, log = layer.input.distance(*layer.running)
    return _less_noise(shift, log, [layer.input])


def _beyond_noise(a: Spread, b: Spread) -> float:
    assert b.all is not None
    return _less_noise(*a.distance(b.all.mean, b.all.variance), [a, b])


def _less_noise(shift: float, log: float, spreads: list[Spread]) -> float:
    """The larger of both distances, less three standard errors of each."""
    errors = [(e / math.sqrt(s.batches) for e in s.errors()) for s in spreads]
    of_mean, of_variance = (math.hypot(*pair) for pair in zip(*errors, strict=True))
    return max(shift - 3 * of_mean, log - 3 * of_variance, 0.0)


def _momentum(layer: Layer, threshold: float) -> float:
    """The largest momentum whose noise is half the threshold."""
    ratio = (threshold / 2 / layer.input.errors()[0]) ** 2
    return min(0.1, 2 * ratio / (1 + ratio))


def _function(op: Any) -> str:
    """The name of an activation, as a module or a function."""
    if isinstance(op.module, nn.Sigmoid | nn.Tanh):
        return type(op.module).__name__.lower()
    return op.name.rstrip("_") if op.module is None else ""


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
