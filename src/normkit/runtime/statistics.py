"""Statistics of batches, and the running averages that training moves and evaluation reads."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.backend import cpu
from normkit.backend.protocol import Normalized
from normkit.formula.pool import Pool
from normkit.runtime import recompute, state


class Moments(NamedTuple):
    """The number n of elements of pools, their mean and their biased variance.

    n is a number where it is the same for all, else alike in shape.
    """

    n: Tensor | int
    mean: Tensor
    var: Tensor

    def spread(self) -> tuple[Tensor, Tensor, Tensor]:
        """With n as a tensor."""
        n = self.n if isinstance(self.n, Tensor) else torch.full_like(self.mean, self.n)
        return n, self.mean, self.var


class Running(NamedTuple):
    """Running averages and how they move.

    `biased` says which variance they average. `pending`, where batches come in `micro_batches`
    parts, is (count, mean, variance) of the parts so far and how many they are.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor | None
    momentum: float | None
    biased: bool = False
    pending: tuple[Tensor, ...] | None = None
    micro_batches: int = 1


def given(running_mean: Tensor, running_var: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, variance) for evaluation: copies, since the buffers may move before they are used."""
    return state.read(running_mean).clone(), state.read(running_var).clone()


def moments(pool: Pool, x: Tensor, mask: Tensor | None, outputs: Normalized) -> Moments:
    """The moments of x's pools, whose mean and variance a forward found."""
    mean, var = outputs.mean, outputs.var
    assert mean is not None
    assert var is not None
    view = pool.view(x if mask is None else mask.expand(x.shape))
    axes = pool.axes(view.dim())
    if mask is None:
        return Moments(math.prod([view.shape[i] for i in axes]), mean, var)
    return Moments(view.sum(axes).to(mean.dtype), mean, var)


def pooled(parts: Moments) -> Moments:
    """The moments of the union of the pools along axis 0: of ghost batches, or of micro-batches."""
    each, means, variances = parts.spread()
    n = each.sum(0)
    share = each / n.clamp(min=1)
    mean = (share * means).sum(0)
    delta = means - mean
    var = (share * torch.addcmul(variances, delta, delta)).sum(0)
    return Moments(n, mean, var)


def track(running: Running, batch: Moments, may_be_empty: bool) -> None:
    """Move the running averages towards this batch's, once per real forward.

    running <- (1 - f) * running + f * batch, f = momentum, or 1 / (number of batches) where it is
    None. Moments per sample and channel are averaged over the samples. Empty pools move nothing;
    pools of one value leave the variance alone. With `pending` the batch is first united with the
    parts before it, and only the last part moves the averages. Batches that may be empty, masked or
    of several ranks, count where they aren't; so do all where the count weighs the average. Others
    count as in torch.
    """
    if recompute.recomputing():
        return
    with torch.no_grad():
        if _simple(running, batch):
            _move(running, batch)
        else:
            _move_by_part(running, batch, may_be_empty)


def _move_by_part(running: Running, batch: Moments, may_be_empty: bool) -> None:
    """As `track`, of batches that may be a part of one, empty, of several samples, or traced."""
    complete: bool | Tensor = True
    if running.pending is not None:
        batch, complete = _united(running.pending, batch, running.micro_batches)
    n, mean, var = batch.spread()
    has_mean, has_var = n > 0, n > 1
    by_count = running.momentum is None
    seen: int | Tensor = has_mean.any() if may_be_empty or by_count else 1
    if not running.biased:
        var = var * (n / (n - 1).clamp(min=1))
    if mean.dim() == 2:
        mean, has_mean = _averaged(mean, has_mean)
        var, has_var = _averaged(var, has_var)
    if running.pending is not None:
        seen, has_mean, has_var = complete * seen, complete & has_mean, complete & has_var
    factor: float | Tensor = 0.0 if running.momentum is None else running.momentum
    if running.batches is not None:
        batches = state.read(running.batches) + seen
        if by_count:
            factor = 1.0 / batches.clamp(min=1).to(mean.dtype)
    moved_mean = _moved(state.read(running.mean), mean, has_mean, factor)
    moved_var = _moved(state.read(running.var), var, has_var, factor)
    state.write(running.mean, moved_mean)
    state.write(running.var, moved_var)
    if running.batches is not None:
        state.write(running.batches, batches)


def _simple(running: Running, batch: Moments) -> bool:
    """Whether this is the common case: eager, one whole batch of more than one value a channel."""
    return (
        isinstance(batch.n, int)
        and batch.n > 1
        and running.momentum is not None
        and running.pending is None
        and batch.mean.dim() == 1
        and not torch.compiler.is_compiling()
        and state.in_place()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _move(running: Running, batch: Moments) -> None:
    """As `track`, in place: one operator, or five, where the general case takes thirty."""
    assert isinstance(batch.n, int)
    assert running.momentum is not None
    keep, factor = 1 - running.momentum, running.momentum
    unbias = 1.0 if running.biased else batch.n / (batch.n - 1)
    if cpu.move(*running[:3], batch.mean, batch.var, factor, unbias):
        return
    running.mean.mul_(keep).add_(batch.mean, alpha=factor)
    running.var.mul_(keep).add_(batch.var, alpha=factor * unbias)
    if running.batches is not None:
        running.batches.add_(1)


def _united(
    pending: tuple[Tensor, ...], part: Moments, micro_batches: int
) -> tuple[Moments, Tensor]:
    """The parts so far and this one, and whether it is the last; pending holds them, or none."""
    *before, parts = (state.read(p) for p in pending)
    both = [torch.stack([b.to(p.dtype), p]) for b, p in zip(before, part.spread(), strict=True)]
    united = pooled(Moments(*both))
    complete = parts + 1 == micro_batches
    for buffer, value in zip(pending, (*united.spread(), parts + 1), strict=True):
        state.write(buffer, torch.where(complete, 0, value))
    return united, complete


def _averaged(new: Tensor, has: Tensor) -> tuple[Tensor, Tensor]:
    """The average over the samples that have any."""
    return torch.where(has, new, 0).sum(0) / has.sum(0).clamp(min=1), has.any(0)


def _moved(running: Tensor, new: Tensor, has: Tensor, factor: float | Tensor) -> Tensor:
    moved = running.to(new.dtype) * (1 - factor) + new * factor
    return torch.where(has, moved, running)
