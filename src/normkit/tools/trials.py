"""Runs of a model on a few batches: as it is, and again with a suspect changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from normkit.formula.spec import float64
from normkit.tools.model import Forward, all_off
from normkit.tools.norms import is_frozen, is_norm

Loss = Callable[[Any, Any], Tensor]
"""`loss(output, batch)` is a scalar."""

See = Callable[[str, Tensor, Any, bool], None]
"""Called with a norm's name, its input, its output, and whether it had a mask."""


@dataclass(frozen=True)
class Score:
    """What a run gave: the mean loss, if there is a loss, and the outputs of each batch."""

    loss: float | None
    outputs: list[list[Tensor]]

    def cost(self, other: Score) -> float:
        """How much higher this loss is than the other; without losses, how far outputs are."""
        if self.loss is None or other.loss is None:
            return distance(self.outputs, other.outputs)
        mine, theirs = (math.inf if math.isnan(x) else x for x in (self.loss, other.loss))
        return 0.0 if mine == theirs else mine - theirs


class Trials:
    """A model whose runs are compared; `batches` and tensors may be changed between them.

    The caller puts everything back afterwards (`preserved`).
    """

    def __init__(
        self, model: nn.Module, batches: list[Any], held: list[Any], run: Forward, loss: Loss | None
    ) -> None:
        self.model, self.batches, self.held, self.loss = model, batches, held, loss
        self._run = run
        self.norms = {name: m for name, m in model.named_modules() if is_norm(m)}
        self.frozen = {name for name, m in self.norms.items() if is_frozen(model, m)}
        all_off(model)

    def train(
        self,
        batches: list[Any] | None = None,
        see: See | None = None,
        *,
        gradients: Callable[[], None] | None = None,
    ) -> Score:
        """Run with batch statistics and without dropout; running averages end where they were."""
        with self.training(), torch.set_grad_enabled(gradients is not None):
            return self.score(self.batches if batches is None else batches, see, gradients)

    @torch.no_grad()
    def evaluate(self, batches: list[Any] | None = None, see: See | None = None) -> Score:
        """Run as in evaluation."""
        return self.score(self.batches if batches is None else batches, see)

    @torch.no_grad()
    def without(self, undo: Callable[[], None]) -> Score:
        """Evaluate with a suspect changed, which is then put back."""
        tensors = [
            t for m in self.norms.values() for t in (*m._parameters.values(), *m._buffers.values())
        ]
        kept = [(t, t.detach().clone()) for t in tensors if t is not None]
        batches = self.batches
        try:
            undo()
            return self.evaluate()
        finally:
            self.batches = batches
            for tensor, value in kept:
                tensor.copy_(value)

    @torch.no_grad()
    def moved(self) -> Score:
        """Evaluate after the running averages have moved with these batches in training."""
        with self.training():
            self.score(self.batches, None)
            all_off(self.model)
            return self.score(self.batches, None)

    @contextmanager
    def held_in_evaluation(self) -> Iterator[None]:
        """Norms are in evaluation inside, whatever a forward says."""

        def off(module: nn.Module, _: Any) -> None:
            module.training = False

        handles = [m.register_forward_pre_hook(off) for m in self.norms.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, batch: Any) -> Any:
        """One batch through the model."""
        return self._run(self.model, batch)

    def score(
        self, batches: list[Any], see: See | None, gradients: Callable[[], None] | None = None
    ) -> Score:
        """Run the batches in the mode of now."""
        losses, outputs = [], []
        with self._watching(see):
            for batch in batches:
                output = self.run(batch)
                if self.loss is not None:
                    value = self.loss(output, batch)
                    if gradients is not None and value.requires_grad:
                        # Not a plain backward: a criterion may have parameters of its own.
                        inputs = [p for p in self.model.parameters() if p.requires_grad]
                        if inputs:
                            value.backward(inputs=inputs)
                        gradients()
                    losses.append(float(value.detach()))
                outputs.append(
                    [
                        t.detach().clone()
                        for t in tree_leaves(output)
                        if isinstance(t, Tensor) and t.is_floating_point()
                    ]
                )
        return Score(sum(losses) / len(losses) if losses else None, outputs)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Norms that aren't frozen are in training inside; their buffers move only in copies."""
        own = [(m, dict(m._buffers)) for m in self.norms.values()]
        try:
            for name, module in self.norms.items():
                module.training = name not in self.frozen
                for key, buffer in module._buffers.items():
                    module._buffers[key] = None if buffer is None else buffer.clone()
            yield
        finally:
            for module, buffers in own:
                module._buffers.update(buffers)
            all_off(self.model)

    @contextmanager
    def _watching(self, see: See | None) -> Iterator[None]:
        if see is None:
            yield
            return

        def hook(name: str) -> Callable[..., None]:
            def after(
                _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
            ) -> None:
                given = dict(zip(("input", "mask"), args, strict=False)) | kwargs
                x = given.pop("input", None)
                x = next(iter(given.values())) if x is None else x
                see(name, x, output, given.get("mask") is not None)

            return after

        handles = [
            module.register_forward_hook(hook(name), with_kwargs=True)
            for name, module in self.norms.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Dropout(TorchFunctionMode):
    """Counts the calls of dropout inside; with `on`, they drop in whatever mode."""

    def __init__(self, *, on: bool) -> None:
        super().__init__()
        self.on, self.calls = on, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _DROPOUTS:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        names = ("input", "p", "training", "inplace")
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        return func(**(given | {"training": True} if self.on else given))


_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(F.alpha_dropout, F.feature_alpha_dropout),
)


@dataclass(frozen=True)
class Pool:
    """The samples of some batches, from which other batches can be made."""

    leaves: list[Tensor]
    form: Any
    sizes: list[int]

    @staticmethod
    def of(batches: list[Any]) -> Pool | None:
        """None where batches aren't made of tensors with the samples on axis 0, all alike."""
        flat, forms = zip(*map(tree_flatten, batches), strict=True)
        if not all(
            isinstance(t, Tensor) and t.dim() and len(t) == len(leaves[0])
            for leaves in flat
            for t in leaves
        ):
            return None
        alike = {tuple(t.shape[1:] for t in leaves) for leaves in flat}
        if len(alike) > 1 or any(form != forms[0] for form in forms) or not flat[0]:
            return None
        leaves = [torch.cat(parts) for parts in zip(*flat, strict=True)]
        return Pool(leaves, forms[0], [len(leaves[0]) for leaves in flat])

    def mixed(self) -> list[Any]:
        """Batches of the same sizes, of samples in a random order that is always the same."""
        return self._split([t[self._order.to(t.device)] for t in self.leaves], self.sizes)

    def unmixed(self, score: Score) -> Score:
        """The score of `mixed()`, its outputs back in the order of the samples."""
        back = self._order.argsort()
        columns = []
        for outputs in zip(*score.outputs, strict=True):
            if not all(y.dim() and len(y) == n for y, n in zip(outputs, self.sizes, strict=True)):
                return Score(score.loss, [[] for _ in self.sizes])
            every = torch.cat(outputs)
            columns.append(every[back.to(every.device)].split(self.sizes))
        return Score(score.loss, [list(outputs) for outputs in zip(*columns, strict=True)])

    @property
    def _order(self) -> Tensor:
        return torch.randperm(sum(self.sizes), generator=torch.Generator().manual_seed(0))

    def of_size(self, size: int, most: int) -> list[Any]:
        """Batches of another size, without a remainder, of at most so many samples."""
        count = min(most, sum(self.sizes)) // size
        return self._split([t[: count * size] for t in self.leaves], [size] * count)

    def _split(self, leaves: list[Tensor], sizes: list[int]) -> list[Any]:
        parts = zip(*(t.split(sizes) for t in leaves), strict=True)
        return [tree_unflatten(list(part), self.form) for part in parts]


def sample_count(batch: Any) -> int | None:
    """The length of a batch's first tensor; None without one."""
    first = next((t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), None)
    return None if first is None else len(first)


def input_of(batch: Any) -> Tensor | None:
    """The first tensor of a batch that holds floating-point numbers."""
    return next((t for t in tree_leaves(batch) if _floats(t)), None)


def with_input(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with another `input_of`."""
    leaves, form = tree_flatten(batch)
    at = next(i for i, t in enumerate(leaves) if _floats(t))
    return tree_unflatten([*leaves[:at], change(leaves[at]), *leaves[at + 1 :]], form)


def _floats(thing: Any) -> bool:
    return isinstance(thing, Tensor) and thing.is_floating_point()


def distance(a: list[list[Tensor]], b: list[list[Tensor]]) -> float:
    """Root mean square difference over the standard deviation, the largest over the outputs.

    Infinite where one is finite and the other isn't.
    """
    found = [0.0]
    for ours, theirs in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        if finite(ours) != finite(theirs):
            return math.inf
        if not finite(ours):
            continue
        pairs = [(float64(x), float64(y)) for x, y in zip(ours, theirs, strict=True)]
        difference = sum(float((x - y).square().sum()) for x, y in pairs)
        scale = max(_deviation(ours), _deviation(theirs))
        found.append(math.sqrt(difference / scale) if scale else 0.0)
    return max(found)


def finite(tensors: Any) -> bool:
    """Whether no tensor holds NaN or infinity."""
    return all(bool(t.isfinite().all()) for t in tensors)


def _deviation(tensors: Any) -> float:
    every = torch.cat([float64(t.flatten()) for t in tensors])
    return float((every - every.mean()).square().sum())
