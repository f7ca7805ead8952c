"""What inspect measures of a model and its data, before any rule judges it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from normkit.formula.spec import float64
from normkit.tools.flow import Flow, Op
from normkit.tools.norms import Norm, is_norm, is_synchronized, read
from normkit.tools.spread import Spread
from normkit.tools.trials import Dropout, Pool, Score, See, Trials, distance

_SAMPLES = 4000
"""Values of a layer's input and output that are kept for the page's histograms."""


@dataclass
class Layer:
    """One norm.

    Attributes:
        norm: what it is; None where it has a forward of its own.
        frozen: whether it is in evaluation inside a model in training.
        values: how many values one statistic is made of, in one batch on one rank.
        samples: the size of a batch there.
        input: of its input's channels, in training.
        sampled: of the means and the mean squared deviations of single samples.
        dropped: of its input's channels, in training with dropout on.
        evaluated, validated: the same in evaluation, on training and on validation data.
        largest: the largest |x|.
        highest: the highest output of each channel.
        padded: share of positions that are padding, where lengths differ; None if none was found.
        gradients, weight_gradients: norms of the output's and of the affine's, one a batch.
        rank: how many axes its input has.
        before, after: the calls that made its input, and that take its output.
        alone: whether its input goes nowhere else.
        dropouts: names of the dropouts between the norm before it and this one.
        inputs, outputs: some values of the first batch.
    """

    name: str
    module: nn.Module
    norm: Norm | None
    frozen: bool
    values: int = 0
    samples: int = 0
    dtype: torch.dtype = torch.float32
    input: Spread = field(default_factory=Spread)
    sampled: Spread = field(default_factory=Spread)
    dropped: Spread = field(default_factory=Spread)
    evaluated: Spread = field(default_factory=Spread)
    validated: Spread = field(default_factory=Spread)
    largest: float = 0.0
    highest: Tensor | None = None
    padded: float | None = None
    gradients: list[float] = field(default_factory=list)
    weight_gradients: list[float] = field(default_factory=list)
    rank: int = 0
    before: Op | None = None
    after: list[Op] = field(default_factory=list)
    alone: bool = False
    dropouts: list[str] = field(default_factory=list)
    inputs: list[float] = field(default_factory=list)
    outputs: list[float] = field(default_factory=list)

    @property
    def running(self) -> tuple[Tensor, Tensor] | None:
        """The running statistics, if it keeps any."""
        mean, var = (getattr(self.module, f"running_{s}", None) for s in ("mean", "var"))
        return None if mean is None or var is None else (mean, var)

    @property
    def pools_samples(self) -> bool:
        """Whether training normalizes by statistics over the samples of a batch."""
        return self.norm is not None and self.norm.entry.by_batch and not self.frozen

    @property
    def uses_batch(self) -> bool:
        """Whether training normalizes by the batch and evaluation doesn't."""
        return self.pools_samples and self.norm is not None and self.norm.tracks

    @property
    def eps(self) -> float:
        """What the layer adds to a variance."""
        return 0.0 if self.norm is None else self.norm.eps or 0.0

    @property
    def by_chance(self) -> tuple[float, float] | None:
        """`input.errors(eps)` as random batches would have them; None if unknown."""
        if self.sampled.all is None or self.input.all is None:
            return None
        scale = self.input.all.variance + self.eps
        count = self.samples if self.norm is None else self.norm.ghost_size or self.samples
        mean, square = self.sampled.all.variance.unflatten(0, (2, -1)) / count
        return float((mean / scale).mean().sqrt()), float((square / scale.square()).mean().sqrt())

    def take(self, spread: Spread) -> None:
        """Put these statistics in the place of the running ones."""
        assert spread.all is not None
        assert self.running is not None
        mean, var = self.running
        mean.copy_(spread.all.mean)
        var.copy_(spread.all.variance)


@dataclass
class Facts:
    """All that the rules look at.

    Attributes:
        trials: runs the model again.
        layers: the norms that a batch reached, in the order in which the first batch reached them.
        gap: distance of the outputs in training and in evaluation, over their standard deviation.
        floor: what of it stays with the statistics of exactly these batches.
        trained, evaluated: the runs that the gap is between.
        mixed: a run as in training whose batches hold the same samples in a random order; None
            where batches can't be mixed.
        validated: evaluation on the validation batches; None without any.
        in_training: names of the norms that are in training while the model is evaluated.
        lonely: a batch that has one value per channel for some layer.
    """

    trials: Trials
    layers: list[Layer]
    gap: float
    floor: float
    trained: Score
    evaluated: Score
    mixed: Score | None
    validated: Score | None
    in_training: list[str]
    lonely: Lonely | None
    optimizer: torch.optim.Optimizer | None
    ranks: int

    @property
    def doubt(self) -> float:
        """By how much thresholds rise without a loss, which alone tells whether a change is better.

        A trained model on data that aren't its own has other statistics too, and needs no mending.
        """
        return 4.0 if self.trials.loss is None else 1.0

    def gain(self, undo: Callable[[], None]) -> float:
        """What evaluation loses by a suspect: its score against that without the suspect."""
        return self.evaluated.cost(self.trials.without(undo))


@dataclass(frozen=True)
class Lonely:
    """A batch of one sample, by which a layer can't normalize."""

    layer: Layer
    number: int
    of: int
    from_dataset: bool


def measure(
    trials: Trials,
    optimizer: torch.optim.Optimizer | None = None,
    lonely: Lonely | None = None,
    *,
    gradients: bool = False,
) -> Facts:
    """Run the batches in training and in evaluation; call it where all is put back after."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if not trials.batches:
        nothing = Score(None, [])
        return Facts(
            trials, [], 0.0, 0.0, nothing, nothing, None, None, [], lonely, optimizer, ranks
        )
    every = layers_of(trials)
    with trials.training(), torch.no_grad(), Dropout(on=False) as dropout:
        layers = _trace(trials, every)
    trained = trials.train(
        see=lambda name, *seen: _see_training(every[name], *seen),
        gradients=_gradients(trials, layers) if gradients else None,
    )

    def see_samples(name: str, x: Tensor, _: Any, __: bool) -> None:
        layer = every[name]
        x = float64(_channels_first(layer, x))
        assert layer.input.all is not None
        each = x.reshape(*x.shape[:2], -1)
        square = (each - layer.input.all.mean[:, None]).square().mean(2)
        layer.sampled.see(torch.cat([each.mean(2), square], 1))

    in_step = any(is_synchronized(layer.module) for layer in layers)
    pool = None if in_step or len(trials.batches) < 2 else Pool.of(trials.batches)
    mixed = None if pool is None else pool.unmixed(trials.train(pool.mixed(), see_samples))
    if dropout.calls and any(layer.uses_batch for layer in layers):
        with Dropout(on=True):
            trials.train(see=_into(every, "dropped"))
    in_training: list[str] = []

    def see_evaluated(name: str, x: Tensor, _: Any, __: bool) -> None:
        if every[name].module.training and name not in in_training:
            in_training.append(name)
        every[name].evaluated.see(_channels_first(every[name], x))

    evaluated = trials.evaluate(see=see_evaluated)
    validated = trials.evaluate(trials.held, _into(every, "validated")) if trials.held else None

    def recalibrate() -> None:
        for layer in layers:
            if layer.uses_batch:
                layer.take(layer.input)

    return Facts(
        trials,
        layers,
        distance(trained.outputs, evaluated.outputs),
        distance(trained.outputs, trials.without(recalibrate).outputs),
        trained,
        evaluated,
        mixed,
        validated,
        in_training,
        lonely,
        optimizer,
        ranks,
    )


def layers_of(trials: Trials) -> dict[str, Layer]:
    """The norms, before anything is measured."""
    return {
        name: Layer(name, module, read(module), name in trials.frozen)
        for name, module in trials.norms.items()
    }


def lonely_layer(trials: Trials, batch: Any) -> Layer | None:
    """The first layer for which a batch has one value per channel in training."""
    every = layers_of(trials)

    class Found(Exception):
        pass

    def before(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _channels_first(layer, args[0] if args else next(iter(kwargs.values())))
        if layer.pools_samples and _values(layer, x) == 1:
            raise Found(layer)

    handles = [
        layer.module.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: before(layer, args, kwargs), with_kwargs=True
        )
        for layer in every.values()
    ]
    try:
        with trials.training(), torch.no_grad():
            trials.run(batch)
    except Found as found:
        layer: Layer = found.args[0]
        return layer
    finally:
        for handle in handles:
            handle.remove()
    return None


def input_spread(trials: Trials, layer: Layer, batches: list[Any]) -> Spread:
    """What comes into a layer from these batches in evaluation."""
    spread = Spread()

    def see(name: str, x: Tensor, _: Any, __: bool) -> None:
        if name == layer.name:
            spread.see(_channels_first(layer, x))

    trials.evaluate(batches, see)
    return spread


def _trace(trials: Trials, every: dict[str, Layer]) -> list[Layer]:
    """See who hands what to whom; return the layers in the order of their first calls."""
    flow = Flow(trials.model)
    flow.run(lambda: trials.run(trials.batches[0]))
    order: dict[str, Layer] = {}
    for op in flow.ops:
        layer = every.get(op.name)
        if layer is None or op.module is not layer.module:
            continue
        order.setdefault(op.name, layer)
        x = op.inputs[0]
        layer.rank, layer.before = x.dim(), flow.producer(x)
        layer.alone = flow.consumers(x) == [op]
        layer.after = [] if op.output is None else flow.consumers(op.output)
        layer.dropouts = _dropouts(flow, x)
    for op in flow.ops:
        # The tensors were needed to tell who uses what; the calls alone are kept.
        op.inputs, op.output = [], None
    return list(order.values())


def _dropouts(flow: Flow, x: Tensor) -> list[str]:
    """The dropouts that a tensor came through since the last norm, the nearest first."""
    found: dict[str, None] = {}
    seen: set[int] = set()
    todo = [x]
    while todo:
        tensor = todo.pop(0)
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        made = flow.producer(tensor)
        # A dropout that is off hands its input on, and so is no producer.
        for op in (made, *(op for op in flow.consumers(tensor) if op.output is tensor)):
            if op is not None and _drops(op):
                found[op.name] = None
        if made is not None and not (made.module is not None and is_norm(made.module)):
            todo += made.inputs
    return list(found)


def _drops(op: Op) -> bool:
    if op.module is None:
        return "dropout" in op.name
    return isinstance(op.module, _DropoutNd) and op.module.p > 0


def _into(every: dict[str, Layer], field_name: str) -> See:
    def see(name: str, x: Tensor, _: Any, __: bool) -> None:
        getattr(every[name], field_name).see(_channels_first(every[name], x))

    return see


def _gradients(trials: Trials, layers: list[Layer]) -> Callable[[], None]:
    """Notes the gradients of each norm's affine after a batch, and clears all."""

    def note() -> None:
        for layer in layers:
            gradients = [p.grad.norm() for p in layer.module.parameters() if p.grad is not None]
            if gradients:
                layer.weight_gradients.append(float(torch.stack(gradients).norm()))
        for parameter in trials.model.parameters():
            parameter.grad = None

    return note


def _see_training(layer: Layer, x: Tensor, output: Any, masked: bool) -> None:
    y = output[0] if isinstance(output, tuple) else output
    if y.requires_grad:
        y.register_hook(lambda gradient: layer.gradients.append(float(gradient.norm())))
    x, y = _channels_first(layer, x), _channels_first(layer, y)
    first = layer.input.all is None
    ghost = layer.norm.ghost_size if layer.norm else None
    for part in x.tensor_split(-(-len(x) // ghost)) if ghost else (x,):
        layer.input.see(part)
        layer.values = _values(layer, part)
    layer.dtype, layer.samples = x.dtype, x.shape[0]
    # NaN compares with nothing; as infinity it is past every limit.
    layer.largest = max(layer.largest, float(x.abs().nan_to_num(nan=math.inf).max()))
    highest = y.movedim(1, 0).flatten(1).amax(1)
    layer.highest = highest if layer.highest is None else layer.highest.maximum(highest)
    if first:
        layer.inputs, layer.outputs = _thinned(x), _thinned(y)
    if not masked and x.dim() == 3 and layer.norm is not None and layer.norm.channels_first:
        share = _padding(x)
        if share is not None:
            layer.padded = max(layer.padded or 0.0, share)


def _channels_first(layer: Layer, x: Tensor) -> Tensor:
    x, norm = x.detach(), layer.norm
    if norm is not None and norm.kind == "instance" and x.dim() == (norm.dims or 0) + 1:
        return x[None]
    if norm is not None and not norm.channels_first:
        return x[None] if x.dim() == 1 else x.movedim(-1, 1)
    return x


def _values(layer: Layer, x: Tensor) -> int:
    """How many values of a (channels-first) input share one statistic."""
    positions = math.prod(x.shape[2:])
    if layer.norm is None:
        return 0
    match layer.norm.entry.pool:
        case "positions":
            return positions
        case "group":
            return x.shape[1] // (layer.norm.groups or 1) * positions
        case "row":
            return math.prod(layer.norm.shape)
        case _:
            return x.shape[0] * positions


def _padding(x: Tensor) -> float | None:
    """The share of last positions that repeat, where samples differ in how many those are."""
    same = (x[:, :, 1:] == x[:, :, :-1]).all(1).flip(-1)
    runs = same.long().cumprod(-1).sum(-1)
    if runs.max() < 2 or runs.max() == runs.min():
        return None
    return float((runs + (runs > 0)).sum() / (x.shape[0] * x.shape[2]))


def _thinned(x: Tensor) -> list[float]:
    flat = x.flatten()
    values = float64(flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES])
    return values[values.isfinite()].tolist()
