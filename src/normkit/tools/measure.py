"""What inspect measures of a model and its data, before any rule judges it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normkit.tools.flow import Flow, Op
from normkit.tools.model import Forward, all_off
from normkit.tools.norms import Norm, is_frozen, is_norm, read
from normkit.tools.spread import Spread

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
        evaluated, validated: the same in evaluation, on training and on validation data.
        largest: the largest |x|.
        highest: the highest output of each channel.
        padded: share of positions that are padding, where lengths differ; None if none was found.
        gradients, weight_gradients: norms of the output's and of the affine's, one a batch.
        rank: how many axes its input has.
        before, after: the calls that made its input, and that take its output.
        alone: whether its input goes nowhere else.
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
    inputs: list[float] = field(default_factory=list)
    outputs: list[float] = field(default_factory=list)

    @property
    def running(self) -> tuple[Tensor, Tensor] | None:
        """The running statistics, if it keeps any."""
        mean, var = (getattr(self.module, f"running_{s}", None) for s in ("mean", "var"))
        return None if mean is None or var is None else (mean, var)

    @property
    def uses_batch(self) -> bool:
        """Whether training normalizes by the batch and evaluation doesn't."""
        return (
            self.norm is not None
            and self.norm.entry.by_batch
            and self.norm.tracks
            and not self.frozen
        )


@dataclass
class Facts:
    """All that the rules look at.

    `gap` is the distance of the outputs in training and in evaluation, over their standard
    deviation; `floor` is what of it stays with the statistics of exactly these batches: noise.
    """

    model: nn.Module
    layers: list[Layer]
    gap: float
    floor: float
    optimizer: torch.optim.Optimizer | None
    ranks: int


def measure(
    model: nn.Module,
    batches: list[Any],
    validation: list[Any],
    run: Forward,
    loss: Callable[[Any, Any], Tensor] | None,
    optimizer: torch.optim.Optimizer | None,
) -> Facts:
    """Run the batches in training and in evaluation; call it where all is put back after."""
    layers = {
        name: Layer(name, module, read(module), is_frozen(model, module))
        for name, module in model.named_modules()
        if is_norm(module)
    }
    own = [(layer.module, dict(layer.module._buffers)) for layer in layers.values()]
    _training(model, layers)
    _trace(model, layers, lambda: run(model, batches[0]))
    trained = []
    for batch in batches:
        trained.append(_train(model, layers, batch, run, loss))
    for module, buffers in own:
        module._buffers.update(buffers)
    all_off(model)
    gap = _distance(trained, _evaluate(model, layers, "evaluated", batches, run))
    _evaluate(model, layers, "validated", validation, run)
    for layer in layers.values():
        if layer.uses_batch and layer.input.all is not None:
            for key, value in (
                ("running_mean", layer.input.all.mean),
                ("running_var", layer.input.all.variance),
            ):
                held = layer.module._buffers[key]
                assert held is not None
                layer.module._buffers[key] = value.to(held)
    floor = _distance(trained, _evaluate(model, layers, None, batches, run))
    reached = [layer for layer in layers.values() if layer.input.all is not None]
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return Facts(model, reached, gap, floor, optimizer, ranks)


def _training(model: nn.Module, layers: dict[str, Layer]) -> None:
    """Batch statistics, dropout off; running averages move, but in copies of the buffers."""
    all_off(model)
    for layer in layers.values():
        layer.module.training = not layer.frozen
        for key, buffer in layer.module._buffers.items():
            layer.module._buffers[key] = None if buffer is None else buffer.clone()


def _trace(model: nn.Module, layers: dict[str, Layer], call: Callable[[], Any]) -> None:
    flow = Flow(model)
    with torch.no_grad():
        flow.run(call)
    for op in flow.ops:
        layer = layers.get(op.name)
        if layer is None or op.module is not layer.module:
            continue
        x = op.inputs[0]
        layer.rank, layer.before = x.dim(), flow.producer(x)
        layer.alone = flow.consumers(x) == [op]
        layer.after = [] if op.output is None else flow.consumers(op.output)
    for op in flow.ops:
        # The tensors were needed to tell who uses what; the calls alone are kept.
        op.inputs, op.output = [], None


def _train(
    model: nn.Module,
    layers: dict[str, Layer],
    batch: Any,
    run: Forward,
    loss: Callable[[Any, Any], Tensor] | None,
) -> list[Tensor]:
    with _watching(layers, _see_training), torch.set_grad_enabled(loss is not None):
        output = run(model, batch)
        if loss is not None:
            # Not a plain backward, which adds to the gradients of a criterion's parameters too.
            inputs = [p for p in model.parameters() if p.requires_grad]
            cost = loss(output, batch)
            if inputs:
                cost.backward(inputs=inputs)
    for layer in layers.values():
        gradients = [p.grad.norm() for p in layer.module.parameters() if p.grad is not None]
        if gradients:
            layer.weight_gradients.append(float(torch.stack(gradients).norm()))
    for parameter in model.parameters():
        parameter.grad = None
    return _tensors(output)


@torch.no_grad()
def _evaluate(
    model: nn.Module, layers: dict[str, Layer], into: str | None, batches: list[Any], run: Forward
) -> list[list[Tensor]]:
    def see(layer: Layer, x: Tensor, _: Tensor, __: bool) -> None:
        if into is not None:
            getattr(layer, into).see(_channels_first(layer, x))

    results = []
    with _watching(layers, see):
        for batch in batches:
            results.append(_tensors(run(model, batch)))
    return results


@contextmanager
def _watching(layers: dict[str, Layer], see: Callable[..., None]) -> Iterator[None]:
    def hook(layer: Layer) -> Callable[..., None]:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = dict(zip(("input", "mask"), args, strict=False)) | kwargs
            x = given.pop("input", None)
            x = next(iter(given.values())) if x is None else x
            see(layer, x, output, given.get("mask") is not None)

        return after

    handles = [
        layer.module.register_forward_hook(hook(layer), with_kwargs=True)
        for layer in layers.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _see_training(layer: Layer, x: Tensor, output: Any, masked: bool) -> None:
    y = output[0] if isinstance(output, tuple) else output
    if y.requires_grad:
        y.register_hook(lambda gradient: layer.gradients.append(float(gradient.norm())))
    x, y = _channels_first(layer, x.detach()), _channels_first(layer, y.detach())
    first = layer.input.all is None
    ghost = layer.norm.ghost_size if layer.norm else None
    for part in x.tensor_split(-(-len(x) // ghost)) if ghost else (x,):
        layer.input.see(part)
        layer.values = _values(layer, part)
    layer.dtype, layer.samples = x.dtype, x.shape[0]
    layer.largest = max(layer.largest, float(x.abs().max()))
    highest = y.movedim(1, 0).flatten(1).amax(1)
    layer.highest = highest if layer.highest is None else layer.highest.maximum(highest)
    if first:
        layer.inputs, layer.outputs = _thinned(x), _thinned(y)
    if not masked and x.dim() == 3 and layer.norm is not None and layer.norm.channels_first:
        share = _padding(x)
        if share is not None:
            layer.padded = max(layer.padded or 0.0, share)


def _channels_first(layer: Layer, x: Tensor) -> Tensor:
    norm = layer.norm
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
    values = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].double()
    return values[values.isfinite()].tolist()


def _tensors(output: Any) -> list[Tensor]:
    return [
        t.detach().double()
        for t in tree_leaves(output)
        if isinstance(t, Tensor) and t.is_floating_point()
    ]


def _distance(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    """Root mean square difference over the standard deviation, the largest over the outputs."""
    found = [0.0]
    for ours, theirs in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        difference = sum(float((x - y).square().sum()) for x, y in zip(ours, theirs, strict=True))
        each = torch.cat([x.flatten() for x in ours])
        scale = float((each - each.mean()).square().sum())
        found.append(math.sqrt(difference / scale) if scale else 0.0)
    return max(found)
