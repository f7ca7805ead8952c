"""State under activation checkpointing: a recomputation reads what its forward read, moves nothing.

`torch.utils.checkpoint`, reentrant or not, runs a forward a second time in the backward. What such
a forward reads from state that moves (running averages, a power iteration's vectors) goes through
`remember`; where it moves state, it asks `recomputing` first:

    r, d = recompute.remember(lambda: correction(batch, running), moves=True)
    if not recompute.recomputing():
        running.copy_(...)

What was read is kept on torch's own object of the checkpointed region, so it lives as long as the
graph does. Regions nest; a region may be recomputed more than once.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.fx import traceback
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointFunction

T = TypeVar("T")


def recomputing() -> bool:
    """Whether this runs inside a backward, where a forward repeats one that has counted already."""
    return not torch.compiler.is_compiling() and (
        torch._C._current_graph_task_id() != -1 or _recomputed_region() is not None
    )


def idle() -> bool:
    """Whether no backward runs here, and no checkpointed region is recorded or recomputed."""
    return (
        torch._C._current_graph_task_id() == -1
        and _recomputed_region() is None
        and not _recorded_regions()
    )


def remember(read: Callable[[], T], *, moves: bool) -> T:
    """What `read()` returns; in a recomputation, what it returned in the forward recomputed.

    The k-th call within a checkpointed region gets, in every recomputation of the region, the
    result of the k-th call of its forward. Tensors among the result must be the caller's own, not
    the state itself, which moves on.

    Args:
        read: reads state and, where `recomputing()` is False, may move it.
        moves: whether this forward moves the state that is read, there or later.

    Raises:
        RuntimeError: a recomputation that calls more often than its forward did; torch.compile
            and a checkpoint around each other, around state that moves.

    A backward that repeats a forward without `torch.utils.checkpoint` warns, and reads the state
    as it is now.
    """
    if torch.compiler.is_compiling():
        value = read()
        moves &= torch.is_grad_enabled() and not torch.compiler.is_exporting()
        return tree_map_only(torch.Tensor, _saved, value) if moves else value
    repeated = _recomputed_region()
    if repeated is not None:
        value = repeated.value(read)
    else:
        if torch._C._current_graph_task_id() != -1:
            warnings.warn(
                "a backward runs a forward again, and not by torch.utils.checkpoint: the state it "
                "reads is today's, not its forward's",
                stacklevel=2,
            )
        value = read()
    for region in _recorded_regions():
        _reads(region).values.append(value)
    return value


@torch.library.custom_op("normkit::saved", mutates_args=())
def _saved(value: torch.Tensor) -> torch.Tensor:
    """A copy that a compiled backward saves, since it recomputes no operator of others.

    Without it, torch.compile saves the state itself, and recomputes from it when it has moved.
    """
    if recomputing():
        raise RuntimeError(_EITHER)
    return value.clone()


@_saved.register_fake
def _(value: torch.Tensor) -> torch.Tensor:
    if "ac_graph_id" in traceback.get_current_meta():  # a checkpoint inside the compiled function
        raise RuntimeError(_EITHER)
    return torch.empty_like(value)


_EITHER = (
    "a compiled recomputation would read state that has moved since its forward; leave this layer "
    "out of the checkpoint or out of torch.compile"
)


@dataclass
class _Reads:
    """What a region's forward read, in order, and how far each recomputation of it has come."""

    values: list[Any] = field(default_factory=list)
    position: defaultdict[Hashable, int] = field(default_factory=lambda: defaultdict(int))


def _reads(region: Any) -> _Reads:
    return region.__dict__.setdefault("_normkit_reads", _Reads())


@dataclass(frozen=True)
class _Repeated:
    region: Any
    run: Hashable

    def value(self, read: Callable[[], T]) -> T:
        reads = _reads(self.region)
        at = reads.position[self.run]
        reads.position[self.run] += 1
        if at < len(reads.values):
            return reads.values[at]
        if not getattr(self.region, "forward_completed", True):
            # A backward inside the region's forward repeats all of it, also what is still to come;
            # of that nothing is used.
            return read()
        raise RuntimeError(
            f"a recomputation reads state more often than the {len(reads.values)} times of its "
            "forward; don't change modes (train, eval, freeze) between forward and backward"
        )


def _recomputed_region() -> _Repeated | None:
    """The innermost checkpointed region whose recomputation this is, and which one of several."""
    if torch._C._current_graph_task_id() != -1:
        node: Any = torch._C._current_autograd_node()
        if isinstance(node, CheckpointFunction._backward_cls):
            return _Repeated(node, torch._C._current_graph_task_id())
    for hook in _pack_hooks():
        if "target_frame_ref" in hook:
            return _Repeated(hook["target_frame_ref"](), hook["gid"])
    return None


def _recorded_regions() -> list[Any]:
    """The checkpointed regions whose forward this is, up to the one being recomputed."""
    regions = []
    for hook in _pack_hooks():
        if "target_frame_ref" in hook:
            break
        regions.append(hook["frame"])
    # The forward of a reentrant region runs without gradients.
    if not (torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code is CheckpointFunction.forward.__code__:
                regions.append(frame.f_locals["ctx"])
            frame = frame.f_back
    return regions


def _pack_hooks() -> list[dict[str, Any]]:
    """The closures of the non-reentrant checkpoints' active pack hooks, innermost first.

    torch offers no list of the active hooks, only the top of their stack.
    """
    top = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if top is None:
        return []
    torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        below = _pack_hooks()
    finally:
        torch._C._autograd._push_saved_tensors_default_hooks(*top)
    hook = inspect.unwrap(top[0])
    if getattr(hook, "__module__", None) != CheckpointFunction.__module__:
        return below
    cells = zip(hook.__code__.co_freevars, hook.__closure__ or (), strict=True)
    return [{name: cell.cell_contents for name, cell in cells}, *below]
