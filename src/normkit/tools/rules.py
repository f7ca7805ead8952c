"""The rules of inspect: what each looks for, its threshold, and how to mend what it finds.

A rule is a function behind `@rule`; adding one is adding one function. It yields a `Found` for each
cause, with all the layers that the cause has hit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normkit.formula.spec import float64
from normkit.tools.findings import Finding
from normkit.tools.flow import LINEAR, Op
from normkit.tools.measure import Facts, Layer, input_spread
from normkit.tools.norms import is_synchronized
from normkit.tools.spread import Spread
from normkit.tools.trials import Pool, distance, finite, input_of, with_input

_FAR = 0.25
"""A distance of statistics, in standard deviations or in logarithms, that counts."""

_MATTERS = 0.1
"""A change of the outputs, in standard deviations, under which a suspect is harmless."""


@dataclass(frozen=True)
class Found:
    """One cause that a rule found.

    Attributes:
        where: names of layers, or of what else is at fault, to their types.
        values: what the rule's fix is filled with, beside {names}, a list, and {only}, a filter.
        cost: what evaluation loses by it.
        undo: changes the suspect, so that what follows from it is no longer measured.
    """

    where: dict[str, str]
    measured: str
    values: dict[str, Any] = field(default_factory=dict)
    cost: float | None = None
    undo: Callable[[], None] | None = None


Check = Callable[[Facts, float], Iterator[Found]]


@dataclass(frozen=True)
class Rule:
    """One rule: `check(facts, threshold)` yields its findings, `of` says what the threshold bounds.

    `fix` is a format string. A `note` needs no mending; a `symptom` counts only where no cause was
    found; what is `safe` `inspect(fix=True)` may mend.
    """

    code: str
    name: str
    threshold: float
    of: str
    why: str
    fix: str
    check: Check
    note: bool
    symptom: bool
    safe: bool

    def finding(self, found: Found, unit: str) -> Finding:
        """The finding to show."""
        names = list(found.where)
        only = repr(names[0]) if len(names) == 1 else f"lambda name, _: name in {names!r}"
        return Finding(
            self.code,
            self.name,
            tuple(names),
            tuple(found.where.values()),
            found.measured,
            self.why,
            self.fix.format(names=names, only=only, **found.values),
            found.cost,
            unit,
            self.note,
        )


RULES: list[Rule] = []
"""All rules, by their codes: the threshold stands beside the quantity that it bounds."""


def rule(
    code: str,
    threshold: float,
    *,
    of: str,
    why: str,
    fix: str,
    note: bool = False,
    symptom: bool = False,
    safe: bool = False,
) -> Callable[[Check], Check]:
    """Make a rule of a check, named as the function is."""

    def register(check: Check) -> Check:
        name = check.__name__.replace("_", "-")
        RULES.append(Rule(code, name, threshold, of, why, fix, check, note, symptom, safe))
        return check

    return register


RECALIBRATE = "normkit.recalibrate(model, loader)"


@rule(
    "NK01",
    0,
    of="values in the bias",
    why="the norm subtracts the mean, and the bias with it: the bias costs memory and gets no "
    "gradient",
    fix="for before, after in {pairs}:\n"
    "    linear, norm = model.get_submodule(before), model.get_submodule(after)\n"
    "    if getattr(norm, 'running_mean', None) is not None:\n"
    "        norm.running_mean -= linear.bias.detach()\n"
    "    linear.bias = None  # bias=False in the model's code",
)
def redundant_bias(facts: Facts, threshold: float) -> Iterator[Found]:
    """A layer's bias that the norm behind it subtracts again."""
    hits: dict[str, tuple[Layer, Any]] = {}
    for layer in facts.layers:
        linear: Any = layer.before.module if layer.before else None
        removes = layer.norm is not None and layer.norm.entry.removes_channel_means
        if not removes or layer.frozen or not layer.alone or not isinstance(linear, LINEAR):
            continue
        axes = 2 if isinstance(linear, nn.Linear) else 2 + len(linear.kernel_size)
        if linear.bias is not None and layer.rank == axes and len(linear.bias) > threshold:
            assert layer.before is not None
            hits[layer.before.name] = layer, linear
    if hits:
        count = sum(len(linear.bias) for _, linear in hits.values())
        after = _listed([layer.name for layer, _ in hits.values()])
        yield Found(
            {name: type(linear).__name__ for name, (_, linear) in hits.items()},
            f"{_of(len(hits), 'bias', 'biases')} of {count} values in all, which {after} "
            f"subtract{'s' * (len(hits) == 1)}",
            {"pairs": [(name, layer.name) for name, (layer, _) in hits.items()]},
        )


@rule(
    "NK02",
    0.25,
    of="distance of the outputs over their standard deviation, and twice the noise; four times it "
    "without a loss",
    why="evaluation computes another function than the one that was trained",
    fix=RECALIBRATE,
    symptom=True,
    safe=True,
)
def train_eval_gap(facts: Facts, threshold: float) -> Iterator[Found]:
    """Outputs that differ between training and evaluation by more than noise."""
    if not math.isfinite(facts.gap) or facts.gap <= max(threshold * facts.doubt, 2 * facts.floor):
        return
    keeping = [layer for layer in facts.layers if layer.uses_batch]
    if keeping and (cost := _worth(facts, undo := _takers(keeping))) is not None:
        yield Found(
            {"the model": type(facts.trials.model).__name__},
            f"outputs in training and in evaluation differ by {facts.gap:.2g} of their standard "
            f"deviation, by {facts.floor:.2g} with the statistics of these batches",
            cost=cost,
            undo=undo,
        )


@rule(
    "NK03",
    0,
    of="distance of the running statistics from 0 and 1",
    why="evaluation doesn't normalize: training never updated the statistics, or they were reset, "
    "or a checkpoint was loaded without them",
    fix="{cure}",
    safe=True,
)
def never_updated(facts: Facts, threshold: float) -> Iterator[Found]:
    """Running statistics that are still those of the constructor."""
    hits = [layer for layer in facts.layers if layer.uses_batch and _initial(layer, threshold)]
    if not hits:
        return
    undo = _takers(hits)
    cost = facts.gain(undo)
    measured = "running mean and variance are 0 and 1 in every channel"
    if cost > 0:
        yield Found(_at(hits), measured, {"cure": RECALIBRATE}, cost, undo)
    else:
        measured += ", and evaluation does better with them than with those of the data: the model "
        measured += "was trained in evaluation, without normalization"
        cure = "model.train()  # before each epoch, not only before the first; then train on"
        yield Found(_at(hits), measured, {"cure": cure})


@rule(
    "NK04",
    0.25,
    of="distance of the running statistics from the data, with a loss; four times it without",
    why="evaluation normalizes by statistics of other data or of older weights: the averages lag, "
    "or were overwritten",
    fix=RECALIBRATE,
    safe=True,
)
def stale(facts: Facts, threshold: float) -> Iterator[Found]:
    """Running statistics that are not those of the data."""
    hits = [
        layer
        for layer in facts.layers
        if layer.uses_batch
        and not _initial(layer)
        and _off(layer, layer.input) > threshold * facts.doubt
        and not _by_dropout(layer)
        and not _half_frozen(facts, layer)
    ]
    if not hits or _rescaled(facts) is not None:
        return
    if (cost := _worth(facts, undo := _takers(hits))) is not None:
        worst = max(hits, key=lambda layer: _off(layer, layer.input))
        yield Found(
            _at(hits),
            f"running statistics are {_off(worst, worst.input):.2g} from those of the data "
            f"(means in standard deviations, or logarithm of the variances, beyond noise)"
            f"{_worst(worst, hits)}",
            cost=cost,
            undo=undo,
        )


@rule(
    "NK05",
    0.2,
    of="noise of the running mean in standard deviations",
    why="evaluation depends on which batches came last: torch's momentum is the weight of the new "
    "batch, that of other libraries the weight of the old average",
    fix="for name in {names}:\n    model.get_submodule(name).momentum = {momentum:.2g}\n"
    + RECALIBRATE,
)
def short_memory(facts: Facts, threshold: float) -> Iterator[Found]:
    """Running means that follow single batches."""
    noisy = {
        layer.name: noise
        for layer in facts.layers
        if layer.uses_batch and (noise := _lag(layer)[0]) > threshold
    }
    hits = [layer for layer in facts.layers if layer.name in noisy]
    if hits:
        worst = max(hits, key=lambda layer: noisy[layer.name])
        assert worst.norm is not None
        undo = _takers(hits)
        yield Found(
            _at(hits),
            f"momentum={worst.norm.momentum:g} leaves a noise of {noisy[worst.name]:.2g} standard "
            f"deviations in the running mean{_worst(worst, hits)}",
            {"momentum": min(_momentum(layer, threshold) for layer in hits)},
            cost=max(0.0, facts.gain(undo)),
            undo=undo,
        )


@rule(
    "NK06",
    0.4,
    of="standard error of a batch's mean, or what an output varies with its batch, in standard "
    "deviations",
    why="each sample's output depends on which others are in its batch; larger batches are the "
    "other remedy",
    fix="normkit.swap(model, 'renorm', only={only})",
)
def few_values(facts: Facts, threshold: float) -> Iterator[Found]:
    """Batch statistics of too few values."""
    pooling = [
        layer
        for layer in facts.layers
        if layer.pools_samples and layer.norm is not None and layer.norm.kind != "renorm"
    ]
    hits = [layer for layer in pooling if _by_chance(layer) > threshold]
    cost = _of_size(facts) if facts.floor > threshold or hits else None
    felt = cost is not None and facts.floor > threshold and cost > 0.2 * (facts.trained.loss or 0)
    if felt and not any(map(_unmixed, facts.layers)):
        hits = pooling
    if hits:
        worst = max(hits, key=_by_chance)
        mean, variance = worst.input.errors()
        yield Found(
            _at(hits),
            f"{worst.values} values a statistic: standard errors of {mean:.2g} (mean, in "
            f"standard deviations) and {variance:.2g} (variance, relative){_worst(worst, hits)}; "
            f"by its batch alone an output varies by {facts.floor:.2g} standard deviations",
            cost=cost,
        )


@rule(
    "NK07",
    1e-6,
    of="standard deviation over root mean square",
    why="such channels carry nothing; trained networks have some, and they can be pruned",
    fix="",
    note=True,
)
def constant_channels(facts: Facts, threshold: float) -> Iterator[Found]:
    """Channels that don't vary, or that never get past a ReLU."""
    hits, said = [], []
    for layer in facts.layers:
        assert layer.input.all is not None
        moments = layer.input.all
        scale = (moments.mean.square() + moments.variance).sqrt()
        flat = moments.variance.sqrt() <= threshold * torch.maximum(scale, scale.mean())
        relu = bool(layer.after) and all(
            isinstance(op.module, nn.ReLU) or op.name in ("relu", "relu_") for op in layer.after
        )
        dead = torch.zeros_like(flat)
        if relu and layer.norm and layer.norm.channels_first and layer.highest is not None:
            dead = (layer.highest <= 0) & ~flat
        for which, what in ((flat, "constant"), (dead, "never above 0 before a ReLU")):
            if which.any():
                channels = _numbers(which.nonzero().flatten().tolist())
                said.append(
                    f"{int(which.sum())} of {len(which)} channels of {layer.name!r} are {what} "
                    f"({channels})"
                )
                hits.append(layer)
    if hits:
        yield Found(_at(hits), _listed(said, 3))


@rule(
    "NK08",
    0.3,
    of="share of the output",
    why="almost no gradient comes through where the activation is flat",
    fix="for name, factor in {factors}.items():\n"
    "    model.get_submodule(name).weight.data.mul_(factor)  # then train on",
)
def saturated(facts: Facts, threshold: float) -> Iterator[Found]:
    """A sigmoid or tanh behind a norm that works where it is flat."""
    hits: dict[str, tuple[Layer, float, str]] = {}
    for layer in facts.layers:
        for op in layer.after:
            share = _saturation(layer.outputs, _function(op))
            if share > threshold and isinstance(layer.module.weight, Tensor):
                hits[layer.name] = layer, share, _function(op)
    if hits:
        worst, share, function = max(hits.values(), key=lambda hit: hit[1])
        layers = [layer for layer, _, _ in hits.values()]
        factors = {
            name: float(f"{_EDGES[op] / 2 / _deviation(layer.outputs):.2g}")
            for name, (layer, _, op) in hits.items()
        }
        yield Found(
            _at(layers),
            f"{share:.0%} of the output is where {function} has under 1 % of its slope"
            f"{_worst(worst, layers)}",
            {"factors": factors},
        )


@rule(
    "NK09",
    0.3,
    of="share of the input",
    why="the norm can't bring back what the activation has flattened; put the norm first",
    fix="for first, second in {pairs}:\n"
    "    act, norm = model.get_submodule(first), model.get_submodule(second)\n"
    "    model.set_submodule(first, norm)\n"
    "    model.set_submodule(second, act)  # then train on",
)
def behind_saturating(facts: Facts, threshold: float) -> Iterator[Found]:
    """A norm behind a sigmoid or tanh that works where it is flat."""
    hits: dict[str, tuple[Layer, float, Op]] = {}
    for layer in facts.layers:
        if layer.before is None:
            continue
        edge = _EDGES.get(_function(layer.before))
        if edge is not None and layer.inputs:
            ends = _ENDS[_function(layer.before)]
            flat = sum(min(abs(x - end) for end in ends) < 0.01 for x in layer.inputs)
            if (share := flat / len(layer.inputs)) > threshold:
                hits[layer.name] = layer, share, layer.before
    if hits:
        worst, share, op = max(hits.values(), key=lambda hit: hit[1])
        layers = [layer for layer, _, _ in hits.values()]
        yield Found(
            _at(layers),
            f"the input is a {_function(op)}, and {share:.0%} of it lies within 0.01 of where that "
            f"ends{_worst(worst, layers)}",
            {"pairs": [(op.name, name) for name, (_, _, op) in hits.items()]},
        )


@rule(
    "NK10",
    0,
    of="weight decay",
    why="weight and bias of a norm set the scale of what comes out; weight decay pulls it towards "
    "0 without making the network simpler",
    fix="norms = {{p for n in {norms} for p in model.get_submodule(n).parameters(recurse=False)}}\n"
    "for group in list(optimizer.param_groups):\n"
    "    own = [p for p in group['params'] if p in norms]\n"
    "    group['params'] = [p for p in group['params'] if p not in norms]\n"
    "    optimizer.add_param_group({{**group, 'params': own, 'weight_decay': 0}})",
)
def weight_decay(facts: Facts, threshold: float) -> Iterator[Found]:
    """Weight decay on the affine of norms."""
    owner = {id(p): x.name for x in facts.layers for p in x.module.parameters(recurse=False)}
    where: dict[str, str] = {}
    hit: list[str] = []
    decay = 0.0
    for number, group in enumerate(facts.optimizer.param_groups if facts.optimizer else []):
        mine = [owner[id(p)] for p in group["params"] if id(p) in owner]
        if mine and group.get("weight_decay", 0) > threshold:
            where[f"optimizer.param_groups[{number}]"] = type(facts.optimizer).__name__
            hit += mine
            decay = max(decay, group["weight_decay"])
    if where:
        yield Found(
            where,
            f"weight_decay={decay:g} on {len(hit)} weights and biases of norms",
            {"norms": list(dict.fromkeys(hit))},
        )


@rule(
    "NK11",
    1 / 16,
    of="largest |x| over the limit",
    why="a little more, and squares or sums become infinite and the output zero or NaN",
    fix="{cure}",
    safe=True,
)
def near_overflow(facts: Facts, threshold: float) -> Iterator[Found]:
    """Inputs near the end of what their type can hold, or can square."""
    hits: dict[bool, list[tuple[float, float, Layer]]] = {}
    if _broken(facts):
        # What comes in is a consequence.
        return
    for layer in facts.layers:
        half = layer.dtype == torch.float16
        ours = type(layer.module).__module__.startswith("normkit.")
        if ours and not half:
            continue
        wide = torch.float64 if layer.dtype == torch.float64 else torch.float32
        limit = torch.finfo(layer.dtype).max if half else math.sqrt(torch.finfo(wide).max)
        if layer.largest > threshold * limit:
            hits.setdefault(half, []).append((layer.largest / limit, limit, layer))
    for half, found in hits.items():
        reached, limit, worst = max(found, key=lambda hit: hit[0])
        layers = [layer for _, _, layer in found]
        yield Found(
            _at(layers),
            f"|x| reaches {worst.largest:.2g} in {str(worst.dtype).removeprefix('torch.')}, which "
            f"{'holds' if half else 'can square'} numbers up to {limit:.2g}{_worst(worst, layers)}",
            {
                "cure": "model.bfloat16()  # and the batches too"
                if half
                else f"normkit.swap(model, only={_only(layers)})"
            },
            # Beyond the limit no run as in training gives a number.
            cost=math.inf if reached > 1 else None,
        )


@rule(
    "NK12",
    0.05,
    of="share of the positions",
    why="the statistics, and so every sample's output, depend on how long the other samples are",
    fix="normkit.swap(model)  # and call the layer with a mask: norm(x, mask=mask)",
)
def padding(facts: Facts, threshold: float) -> Iterator[Found]:
    """Padding that takes part in statistics over positions."""
    hits = [
        layer
        for layer in facts.layers
        if layer.norm is not None
        and layer.norm.entry.pool in ("batch", "positions", "group")
        and not layer.frozen
        and (layer.padded or 0.0) > threshold
    ]
    if hits:
        worst = max(hits, key=lambda layer: layer.padded or 0.0)
        yield Found(
            _at(hits),
            f"{worst.padded:.0%} of the positions are padding of different lengths"
            f"{_worst(worst, hits)}",
        )


@rule(
    "NK13",
    16,
    of="samples a rank",
    why="each rank normalizes by a few samples of its own (Wu & He 2018: the error rises under 16)",
    fix="normkit.swap(model, 'sync', only={only})",
)
def local_statistics(facts: Facts, threshold: float) -> Iterator[Found]:
    """Batch statistics of each rank alone, at a small batch."""
    hits = [
        layer
        for layer in facts.layers
        if layer.uses_batch and not is_synchronized(layer.module) and layer.samples < threshold
    ]
    if facts.ranks > 1 and hits:
        worst = min(hits, key=lambda layer: layer.samples)
        yield Found(
            _at(hits),
            f"{worst.samples} samples a batch on each of {facts.ranks} ranks, normalized apart"
            f"{_worst(worst, hits, 'fewest')}",
        )


@rule(
    "NK14",
    2,
    of="values in a pool; one in that of an RMS norm",
    why="one value less its mean is 0, two become -1 and 1: of the input only signs are left",
    fix="normkit.swap(model, lambda channels: normkit.GroupNorm(1, channels), only={only})\n"
    "# then train on",
)
def single_values(facts: Facts, threshold: float) -> Iterator[Found]:
    """Pools of so few values that the norm's output hardly depends on its input."""
    hits = [
        layer
        for layer in facts.layers
        if layer.norm is not None
        and layer.norm.kind in ("group", "layer", "instance", "rms")
        and layer.values <= threshold - (layer.norm.kind == "rms")
    ]
    if hits:
        fewest = min(hits, key=lambda layer: layer.values)
        assert fewest.norm is not None
        yield Found(
            _at(hits),
            f"{_of(fewest.values, 'value', 'values')} in each pool of a {fewest.norm.kind} norm"
            f"{_worst(fewest, hits, 'fewest')}",
        )


@rule(
    "NK15",
    0.25,
    of="distance of the statistics",
    why="the two are prepared differently, or come from different sources",
    fix="{cure}",
)
def validation_shift(facts: Facts, threshold: float) -> Iterator[Found]:
    """Validation data whose statistics are not those of the training data."""
    off = {
        layer.name: away
        for layer in facts.layers
        if layer.evaluated.all is not None
        and layer.validated.all is not None
        and (away := _beyond_noise(layer.evaluated, layer.validated, layer.eps)) > threshold
    }
    if not off or facts.validated is None:
        return
    hits = [layer for layer in facts.layers if layer.name in off]
    trials = facts.trials
    change = _preparation(trials.batches, trials.held)
    cost, cure = None, "normkit.recalibrate(model, validation)  # if it is meant to be so"
    measured = (
        f"validation data are {off[hits[0].name]:.2g} from training data (means in standard "
        "deviations, or logarithm of the variances, beyond noise)"
    )
    if change is not None:
        scale, shift = change
        undone = trials.evaluate([_prepared(batch, scale, shift) for batch in trials.held])
        cost = facts.validated.cost(undone)
        if cost > 0:
            cure = f"x = x * {scale:.4g} + {shift:.4g}  # where the validation data are prepared"
            measured += f"; x * {scale:.4g} + {shift:.4g} gives them the training data's scale"
    yield Found(_at(hits), measured, {"cure": cure}, cost)


@rule(
    "NK16",
    0,
    of="values that are NaN or infinite",
    why="one such value makes everything behind it NaN; it came from one bad batch, an overflow or "
    "a step that was too large",
    fix="{cure}",
    safe=True,
)
def not_finite(facts: Facts, threshold: float) -> Iterator[Found]:
    """NaN or infinity in running statistics, in weights, or in the batches."""
    model, trials = facts.trials.model, facts.trials
    broken = {n: t for n, t in _tensors(model) if int((~t.isfinite()).sum()) > threshold}
    statistics = {name for name in broken if "running_" in name.rpartition(".")[2]}
    weights = [name for name in broken if name not in statistics]
    owners = _owners(statistics)
    hits = [layer for layer in facts.layers if layer.name in owners]
    batches = [i for i, batch in enumerate(trials.batches, 1) if not _finite_input(batch)]
    if weights:

        def without() -> None:
            for name in weights:
                broken[name].data.nan_to_num_(0, 0, 0)

        yield Found(
            {n: type(model.get_submodule(n)).__name__ for n in _owners(weights)},
            _not_finite({name: broken[name] for name in weights}),
            {
                "cure": f"for name, tensor in model.state_dict().items():\n"
                f"    if name in {weights!r}:\n"
                "        tensor.nan_to_num_(0, 0, 0)  # or load a checkpoint from before"
            },
            cost=facts.gain(without),
            undo=without,
        )
    if batches:
        good = [b for i, b in enumerate(trials.batches, 1) if i not in batches]

        def skip() -> None:
            trials.batches = good

        yield Found(
            {"loader": "input"},
            f"NaN or infinity in the inputs of batch {_numbers(batches)} of {len(trials.batches)}",
            {"cure": "loader = [batch for batch in loader if batch[0].isfinite().all()]"},
            cost=math.inf,
            undo=skip if good else None,
        )
    if hits:
        undo = _takers(hits)
        yield Found(
            _at(hits),
            _not_finite({name: broken[name] for name in statistics}),
            {"cure": RECALIBRATE},
            cost=facts.gain(undo),
            undo=undo,
        )


@rule(
    "NK17",
    0.25,
    of="distance of the statistics from the data, with a loss; twelve times it without",
    why="the layer is frozen, and normalizes by statistics that don't fit what comes in",
    fix="{thaw}\n"
    "normkit.recalibrate(model, loader, only={only})\n"
    "{freeze}  # or load the statistics that belong to these weights",
)
def frozen_statistics(facts: Facts, threshold: float) -> Iterator[Found]:
    """Frozen statistics whose replacement by those of the data lowers the loss."""
    far = {
        layer.name: away
        for layer in facts.layers
        if layer.frozen
        and layer.running is not None
        and layer.input.all is not None
        and layer.input.all.count.min() > 1
        and (away := _off(layer, layer.input))
        > (threshold if facts.evaluated.loss else 12 * threshold)
    }
    suspects = sorted((x for x in facts.layers if x.name in far), key=lambda x: -far[x.name])[:4]
    if not suspects:
        return
    costs = {layer.name: facts.gain(_takers([layer])) for layer in suspects}
    worst = max(suspects, key=lambda layer: costs[layer.name])
    if _share(facts, costs[worst.name]) > 0.2:
        assert worst.input.all is not None
        yield Found(
            _at([worst]),
            f"it is frozen at statistics that are {far[worst.name]:.2g} from those of the data "
            "(means in standard deviations, or logarithm of the variances, beyond noise)",
            _thaw_and_freeze(worst),
            cost=costs[worst.name],
            undo=_takers([worst]),
        )


@rule(
    "NK18",
    2.5,
    of="standard error of a batch's mean or variance over that of random batches",
    why="in training each batch is normalized by its own source or class, which tells the layers "
    "which one it is; evaluation has one set of statistics for all",
    fix="loader = torch.utils.data.DataLoader(loader.dataset, loader.batch_size, shuffle=True)\n"
    "# then train on, every batch a mix of all sources and classes",
)
def unmixed_batches(facts: Facts, threshold: float) -> Iterator[Found]:
    """Batches that differ by more than chance: one class, or one source, in each."""
    hits = [layer for layer in facts.layers if _unmixed(layer, threshold)]
    if hits and facts.mixed is not None:
        if distance(facts.mixed.outputs, facts.trained.outputs) < _MATTERS:
            return
        cost = abs(facts.mixed.cost(facts.trained))
        if facts.mixed.cost(facts.trained) > 0:
            # The model relies on who is in the batch, and evaluation can't give it that.
            cost = max(cost, facts.evaluated.cost(facts.trained))
        worst = max(hits, key=lambda layer: layer.input.errors(layer.eps)[0])
        (mean, variance), chance = worst.input.errors(worst.eps), worst.by_chance
        assert chance is not None
        yield Found(
            _at(hits),
            f"means of these batches vary by {mean:.2g} standard deviations, those of random "
            f"batches by {chance[0]:.2g}; variances by {variance:.0%}, those of random batches by "
            f"{chance[1]:.0%}{_worst(worst, hits)}",
            cost=cost,
        )


@rule(
    "NK19",
    1e-3,
    of="largest |weight| of the norm",
    why="nothing of the input comes through",
    fix="for name in {names}:\n    torch.nn.init.ones_(model.get_submodule(name).weight)",
)
def vanished_weight(facts: Facts, threshold: float) -> Iterator[Found]:
    """A norm's weight that is 0 or nearly so, in a place where that is felt."""
    hits = [
        layer
        for layer in facts.layers
        if layer.module._parameters.get("weight") is not None
        and _largest_weight(layer) <= threshold
    ]
    if not hits:
        return

    def ones(layer: Layer) -> None:
        layer.module._parameters["weight"].data.fill_(1)  # type: ignore[union-attr]

    # Some residual networks start with a weight of 0 in every block, where the skip goes on.
    costs = {layer.name: facts.gain(partial(ones, layer)) for layer in hits}
    # Behind one that lets nothing through, another isn't felt until both are changed.
    felt = [layer for layer in hits if _share(facts, costs[layer.name]) > 0.2] or hits

    def all_ones() -> None:
        for layer in felt:
            ones(layer)

    cost = facts.gain(all_ones)
    if _share(facts, cost) > 0.2:
        largest = max(_largest_weight(layer) for layer in felt)
        yield Found(
            _at(felt),
            f"|weight| is at most {largest:.2g} in every channel",
            cost=cost,
            undo=all_ones,
        )


@rule(
    "NK20",
    0,
    of="parameters of the norm that are trained",
    why="requires_grad_(False) stops the weights; the running statistics go on moving with every "
    "batch in training, away from those that the weights were trained with",
    fix="{first}normkit.swap(model, 'frozen', only={only})",
)
def moving_while_frozen(facts: Facts, threshold: float) -> Iterator[Found]:
    """Norms without gradients, in a model that is trained, whose statistics still move."""
    hits = [layer for layer in facts.layers if _half_frozen(facts, layer, threshold)]
    if hits:
        undo = _takers(hits)
        after = facts.trials.moved()
        already = _worth(facts, undo) if any(_off(x, x.input) > _FAR for x in hits) else None
        yield Found(
            _at(hits),
            f"weight and bias need no gradient, but the statistics move: after "
            f"{len(facts.trials.batches)} batches of training the outputs have changed by "
            f"{distance(after.outputs, facts.evaluated.outputs):.2g} of their standard deviation",
            {"first": "" if already is None else RECALIBRATE + "\n"},
            cost=max(0.0, already or 0.0, after.cost(facts.evaluated)),
            undo=None if already is None else undo,
        )


@rule(
    "NK21",
    0,
    of="running statistics that the layer keeps",
    why="evaluation normalizes by its own batch: a prediction depends on the samples beside it",
    fix="normkit.swap(model, lambda channels: normkit.BatchNorm(channels), only={only})\n"
    "normkit.recalibrate(model, loader)",
)
def no_running_statistics(facts: Facts, threshold: float) -> Iterator[Found]:
    """Batch norms with track_running_stats=False."""
    hits = [
        layer
        for layer in facts.layers
        if layer.pools_samples and layer.norm is not None and layer.norm.tracks <= threshold
    ]
    if hits:
        cost = _of_size(facts, 2)
        yield Found(
            _at(hits),
            "it keeps no running statistics"
            + ("" if cost is None else f"; in batches of 2 evaluation loses {cost:.2g}"),
            cost=cost,
        )


@rule(
    "NK22",
    1,
    of="values a channel in a batch",
    why="a batch of one value per channel has no variance, and training stops with an error",
    fix="{cure}",
)
def single_sample(facts: Facts, threshold: float) -> Iterator[Found]:
    """A batch of one sample before a batch norm without other axes."""
    lonely = facts.lonely
    if lonely is not None and threshold:
        yield Found(
            _at([lonely.layer]),
            f"batch {lonely.number} of {lonely.of} holds one sample: 1 value per channel",
            {
                "cure": "loader = torch.utils.data.DataLoader(\n"
                "    loader.dataset, loader.batch_size, sampler=loader.sampler, drop_last=True\n)"
                if lonely.from_dataset
                else "loader = [batch for batch in loader if len(batch[0]) > 1]"
            },
            cost=math.inf,
        )


@rule(
    "NK23",
    0.1,
    of="distance of the running statistics from the data without dropout",
    why="dropout raises the variance in training; in evaluation it is off, and the statistics that "
    "were learned with it are too large (Li et al. 2018); behind the last norm it does no harm",
    fix=RECALIBRATE,
    safe=True,
)
def variance_shift(facts: Facts, threshold: float) -> Iterator[Found]:
    """Running statistics that are those of the data with dropout, in evaluation without it."""
    hits = [
        layer
        for layer in facts.layers
        if _by_dropout(layer) and _off(layer, layer.input) > threshold
    ]
    if hits and (cost := _worth(facts, undo := _takers(hits))) is not None:
        worst = max(hits, key=lambda layer: _off(layer, layer.input))
        assert worst.input.all is not None
        assert worst.dropped.all is not None
        ratio = (worst.dropped.all.variance + worst.eps) / (worst.input.all.variance + worst.eps)
        yield Found(
            _at(hits),
            f"dropout{_named(worst.dropouts)} before it multiplies the variance by "
            f"{float(ratio.log().mean().exp()):.2g} in training{_worst(worst, hits)}",
            cost=cost,
            undo=undo,
        )


@rule(
    "NK24",
    0,
    of="norms in training during evaluation",
    why="eval() was forgotten, or undone by a train() in the forward: predictions depend on the "
    "batch, and every one of them moves the running statistics",
    fix="model.eval()  # once before evaluation, and remove the train() inside of it",
)
def training_in_evaluation(facts: Facts, threshold: float) -> Iterator[Found]:
    """Norms that something puts into training while the model is evaluated."""
    hits = [layer for layer in facts.layers if layer.name in facts.in_training]
    if len(hits) > threshold:
        with facts.trials.held_in_evaluation():
            rightly = facts.trials.evaluate()
        yield Found(
            _at(hits),
            "it is in training while the model is evaluated",
            cost=abs(facts.evaluated.cost(rightly)),
        )


@rule(
    "NK25",
    0.25,
    of="distance of the running statistics from the data, before and after the change",
    why="the inputs are prepared differently from those that the statistics were learned with, as "
    "0 to 255 instead of 0 to 1",
    fix="x = x * {scale:.4g} + {shift:.4g}  # where the data are prepared",
)
def input_scale(facts: Facts, threshold: float) -> Iterator[Found]:
    """Inputs on another scale, which one factor and one shift bring back to the statistics."""
    found = _rescaled(facts, threshold)
    if found is not None:
        layer = facts.layers[0]
        yield Found(
            _at([layer]),
            f"running statistics are {_off(layer, layer.input):.2g} from those of the data, and "
            f"fit after x * {found.scale:.4g} + {found.shift:.4g}",
            {"scale": found.scale, "shift": found.shift},
            found.cost,
            found.undo,
        )


RULES.sort(key=lambda rule: rule.code)

_FEWEST_BATCHES = 4
"""Fewer may differ by chance."""

_EDGES = {"sigmoid": 5.98, "tanh": 2.99}
"""|x| beyond which the slope is under 1 % of the largest."""

_ENDS = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0)}


def _at(layers: Iterable[Layer]) -> dict[str, str]:
    return {layer.name: type(layer.module).__name__ for layer in layers}


def _only(layers: list[Layer]) -> str:
    names = [layer.name for layer in layers]
    return repr(names[0]) if len(names) == 1 else f"lambda name, _: name in {names!r}"


def _takers(layers: list[Layer]) -> Callable[[], None]:
    """Gives each layer the statistics of the data."""

    def take() -> None:
        for layer in layers:
            layer.take(layer.input)

    return take


def _worth(facts: Facts, undo: Callable[[], None]) -> float | None:
    """What evaluation loses by a suspect; None where it is harmless, or better than the change."""
    without = facts.trials.without(undo)
    cost = facts.evaluated.cost(without)
    changed = distance(facts.evaluated.outputs, without.outputs)
    return cost if changed > _MATTERS and cost > 0 else None


def _largest_weight(layer: Layer) -> float:
    weight: Any = layer.module.weight
    return float(weight.detach().abs().max())


def _share(facts: Facts, cost: float) -> float:
    """A cost over the loss, or as it is where there is no loss."""
    loss = facts.evaluated.loss
    return cost if loss is None or not math.isfinite(cost) else cost / (abs(loss) or 1.0)


def _of_size(facts: Facts, size: int | None = None) -> float | None:
    """What is lost by batches of this size, or of their own, against all samples together."""
    trials = facts.trials
    pool = Pool.of(trials.batches)
    if pool is None or trials.loss is None:
        return None
    count = min(sum(pool.sizes), 64)
    together = trials.train(pool.of_size(count, count))
    apart = facts.trained if size is None else trials.train(pool.of_size(size, count))
    return max(0.0, apart.cost(together))


def _initial(layer: Layer, threshold: float = 0) -> bool:
    assert layer.running is not None
    mean, var = layer.running
    return float((mean.abs() + (var - 1).abs()).max()) <= threshold


def _off(layer: Layer, data: Spread) -> float:
    """How far the running statistics are from the data, beyond noise; 0 if they are NaN."""
    if layer.running is None or data.all is None:
        return 0.0
    shift, log = data.distance(*layer.running, layer.eps)
    lag = _lag(layer) if layer.uses_batch else (0.0, 0.0)
    return _less_noise(shift, log, [_of_mean(data, layer.eps), lag])


def _lag(layer: Layer) -> tuple[float, float]:
    """The noise that the moving average leaves in mean and variance."""
    momentum = layer.norm.momentum if layer.norm else None
    weight = math.sqrt(momentum / (2 - momentum)) if momentum else 0.0
    mean, variance = layer.input.errors(layer.eps)
    return weight * mean, weight * variance


def _of_mean(data: Spread, eps: float) -> tuple[float, float]:
    mean, variance = data.errors(eps)
    return mean / math.sqrt(data.batches), variance / math.sqrt(data.batches)


def _beyond_noise(a: Spread, b: Spread, eps: float) -> float:
    assert b.all is not None
    shift, log = a.distance(b.all.mean, b.all.variance, eps)
    return _less_noise(shift, log, [_of_mean(a, eps), _of_mean(b, eps)])


def _less_noise(shift: float, log: float, errors: list[tuple[float, float]]) -> float:
    """The larger of both distances, less three standard errors of each."""
    of_mean, of_variance = (math.hypot(*each) for each in zip(*errors, strict=True))
    away = max(shift - 3 * of_mean, log - 3 * of_variance, 0.0)
    return away if math.isfinite(away) else 0.0


def _unmixed(layer: Layer, threshold: float = 2.5) -> bool:
    """Whether batches differ in mean or variance by more than random batches would."""
    if layer.by_chance is None or not layer.pools_samples:
        return False
    if layer.input.batches < _FEWEST_BATCHES:
        return False
    errors = zip(layer.input.errors(layer.eps), layer.by_chance, strict=True)
    return any(own > threshold * chance for own, chance in errors)


def _by_chance(layer: Layer) -> float:
    """The standard error of a batch's mean, but for what is due to how samples are mixed."""
    own = layer.input.errors(layer.eps)[0]
    return own if layer.by_chance is None else min(own, layer.by_chance[0])


def _half_frozen(facts: Facts, layer: Layer, threshold: float = 0) -> bool:
    """Whether its statistics move though its parameters aren't trained, and others' are."""
    own = [p.requires_grad for p in layer.module.parameters(recurse=False)]
    others = any(p.requires_grad for p in facts.trials.model.parameters())
    return layer.uses_batch and bool(own) and sum(own) <= threshold and others


def _by_dropout(layer: Layer) -> bool:
    """Whether the running statistics are those with dropout rather than those without."""
    if not layer.uses_batch or layer.dropped.all is None:
        return False
    assert layer.running is not None
    with_it, without = (
        math.hypot(*data.distance(*layer.running, layer.eps))
        for data in (layer.dropped, layer.input)
    )
    return with_it < without / 2


def _momentum(layer: Layer, threshold: float) -> float:
    """The largest momentum whose noise is half the threshold."""
    ratio = (threshold / 2 / layer.input.errors(layer.eps)[0]) ** 2
    return min(0.1, 2 * ratio / (1 + ratio))


def _preparation(wanted: list[Any], given: list[Any]) -> tuple[float, float] | None:
    """(scale, shift) that bring the given batches to the mean and deviation of the wanted ones."""
    ends = []
    for batches in (wanted, given):
        inputs = [x for x in map(input_of, batches) if x is not None]
        if not inputs:
            return None
        every = float64(torch.cat([x.flatten() for x in inputs]))
        ends.append((float(every.mean()), float(every.std())))
    (mean, deviation), (other, spread) = ends
    if not (math.isfinite(spread) and spread > 0):
        return None
    scale = deviation / spread
    return scale, mean - other * scale


@dataclass(frozen=True)
class _Rescaling:
    """x * scale + shift for the inputs, what it gains, and a function that does it."""

    scale: float
    shift: float
    cost: float
    undo: Callable[[], None]


def _rescaled(facts: Facts, threshold: float = _FAR) -> _Rescaling | None:
    """A scale and a shift of the inputs after which the first norm's running statistics fit.

    Between the input and the first norm there is usually a linear layer, whose channel means are
    linear in both: constant inputs show how.
    """
    if not facts.layers:
        return None
    layer, trials = facts.layers[0], facts.trials
    inputs = [input_of(batch) for batch in trials.batches]
    if (
        not layer.uses_batch
        or layer.running is None
        or _initial(layer)
        or _unmixed(layer)
        or _half_frozen(facts, layer)
        or _off(layer, layer.input) <= threshold * facts.doubt
        or any(x is None for x in inputs)
    ):
        return None
    first = trials.batches[0]
    zero, one = (
        input_spread(trials, layer, [with_input(first, partial(torch.full_like, fill_value=v))])
        for v in (0, 1)
    )
    assert zero.all is not None
    assert one.all is not None
    assert layer.input.all is not None
    mean, var = (float64(t) for t in layer.running)
    own = layer.input.all
    varies = (own.variance > layer.eps) & (var > layer.eps) & mean.isfinite() & var.isfinite()
    if varies.sum() < 3:
        return None
    # mean = zero + scale * slope + shift * response, weighted by the deviation of each channel.
    weight = (var + layer.eps).rsqrt()[varies]
    slope, response, rise = (
        weight * (m - zero.all.mean)[varies] for m in (own.mean, one.all.mean, mean)
    )
    size = float((var / own.variance)[varies].log().mean().exp().sqrt())
    both = torch.linalg.lstsq(torch.stack([slope, response], 1), rise[:, None]).solution
    changes = [(float(both[0, 0]), float(both[1, 0]))]
    # Where all channels' means are alike, they don't tell a scale from a shift; variances do.
    power = float(response.square().sum()) or 1.0
    for scale in (size, -size):
        changes.append((scale, float((response * (rise - scale * slope)).sum()) / power))
    fits = []
    for scale, shift in changes:
        moved = [_prepared(batch, scale, shift) for batch in trials.batches]
        spread = input_spread(trials, layer, moved)
        fits.append((sum(spread.distance(mean, var, layer.eps)), scale, shift))
    away, scale, shift = min(fits)
    if not away <= threshold:
        return None

    def prepare() -> None:
        trials.batches = [_prepared(batch, scale, shift) for batch in trials.batches]

    cost = _worth(facts, prepare)
    return None if cost is None else _Rescaling(scale, shift, cost, prepare)


def _prepared(batch: Any, scale: float, shift: float) -> Any:
    return with_input(batch, lambda x: x * scale + shift)


def _thaw_and_freeze(layer: Layer) -> dict[str, str]:
    at = f"model.get_submodule({layer.name!r})"
    if layer.norm is not None and layer.norm.kind == "frozen":
        return {
            "thaw": f"normkit.swap(model, 'batch', only={layer.name!r})",
            "freeze": f"{at}.freeze()",
        }
    if getattr(layer.module, "frozen", False):
        return {"thaw": f"{at}.unfreeze()", "freeze": f"{at}.freeze()"}
    return {"thaw": f"{at}.train()", "freeze": f"{at}.eval()"}


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    every = (*model.named_parameters(), *model.named_buffers())
    return [(name, t) for name, t in every if t.is_floating_point()]


def _owners(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _finite_input(batch: Any) -> bool:
    x = input_of(batch)
    return x is None or finite([x])


def _broken(facts: Facts) -> bool:
    """Whether NaN or infinity in weights or inputs goes through the layers in training."""
    held = finite(facts.trials.model.parameters())
    return not held or not all(map(_finite_input, facts.trials.batches))


def _not_finite(tensors: dict[str, Tensor]) -> str:
    counts = [f"{int((~t.isfinite()).sum())} of {t.numel()} in {n!r}" for n, t in tensors.items()]
    return f"NaN or infinity: {_listed(counts, 4)}"


def _function(op: Op) -> str:
    """The name of an activation, as a module or a function."""
    if isinstance(op.module, nn.Sigmoid | nn.Tanh):
        return type(op.module).__name__.lower()
    return op.name.rstrip("_") if op.module is None else ""


def _saturation(values: list[float], function: str) -> float:
    edge = _EDGES.get(function)
    return 0.0 if edge is None or not values else sum(abs(y) > edge for y in values) / len(values)


def _deviation(values: list[float]) -> float:
    return float(torch.tensor(values).std())


def _named(dropouts: list[str]) -> str:
    return f" {dropouts[0]!r}" if dropouts else ""


def _worst(layer: Layer, layers: list[Layer], which: str = "most") -> str:
    return f" at {layer.name!r}, the {which} of {len(layers)}" if len(layers) > 1 else ""


def _of(count: int, one: str, many: str) -> str:
    return f"one {one}" if count == 1 else f"{count} {many}"


def _listed(words: list[str], most: int = 8) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
