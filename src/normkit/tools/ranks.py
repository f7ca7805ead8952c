"""Ranks that go through a model's layers together: none waits for one that has failed or ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from normkit.layers import _BatchLayer
from normkit.runtime.statistics import Moments
from normkit.runtime.sync import Merge, Settings, gathered
from normkit.tools.model import ToolError


@contextmanager
def together(process_group: Any) -> Iterator[None]:
    """What one rank raises inside ends it on all ranks, which would else wait for that one."""
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    stopped = isinstance(own, _Stopped)
    told = None if own is None or stopped else f"{type(own).__name__}: {own}"
    texts = gathered(told, process_group)
    if own is not None and not stopped:
        raise own
    for rank, said in enumerate(texts):
        if said is not None:
            raise ToolError(f"rank {rank} failed: {said}")
    if own is not None:
        raise ToolError(str(own))


class _Stopped(Exception):
    """Another rank goes on elsewhere, so that this one can't."""


class _InStep:
    """Ranks that say where they are before they wait for each other, batch by batch.

    All that they send has one form, so that a rank which fails between two layers meets the others
    at the next of them.
    """

    def __init__(self, process_group: Any, layers: dict[_BatchLayer, Merge]) -> None:
        self._group, self._layers = process_group, layers
        self._together = process_group is not None and bool(layers)
        for layer in layers:
            layer.merge = _Announced(self, process_group, layer) if self._together else None

    def read(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; where a rank has no more, layers stop to wait for it, on all at once."""
        for batch in batches:
            self.at("a batch")
            yield batch

    def at(self, place: str) -> None:
        """Say it, and hear where the others are."""
        if not self._together:
            return
        places = set(gathered(place, self._group))
        if places == {place}:
            return
        self.part()
        if places != {"a batch", "the end"}:
            raise _Stopped(f"ranks call synchronized layers differently: {sorted(places)}")

    def end(self) -> None:
        """Say that no batch follows."""
        if self._together:
            gathered("the end", self._group)
            self.part()

    def part(self) -> None:
        """Let layers normalize by this rank's batches from now on."""
        self._together = False
        for layer in self._layers:
            layer.merge = None


class _Announced(Merge):
    """Says that its layer is about to merge before it does; errors are told by `together`."""

    def __init__(self, in_step: _InStep, process_group: Any, layer: _BatchLayer) -> None:
        super().__init__(process_group, layer)
        self._in_step = in_step

    def moments(self, own: Tensor, settings: Settings, *, whole: bool) -> Moments:
        self._in_step.at(f"{self.layer}")
        return super().moments(own, settings, whole=whole)

    def fail(self, error: Exception, sent: int, *tensors: Any) -> None:
        """Nothing is sent yet."""


@contextmanager
def in_step(model: nn.Module, process_group: Any) -> Iterator[_InStep]:
    """Synchronized layers merge over the group inside, while each of its ranks has a batch."""
    with apart(model) as merges:
        ranks = _InStep(process_group, merges)
        try:
            yield ranks
        finally:
            ranks.end()


@contextmanager
def apart(model: nn.Module) -> Iterator[dict[_BatchLayer, Merge]]:
    """No layer waits for other ranks inside."""
    merges = {m: m.merge for m in model.modules() if isinstance(m, _BatchLayer) and m.merge}
    for layer in merges:
        layer.merge = None
    try:
        yield merges
    finally:
        for layer, merge in merges.items():
            layer.merge = merge
