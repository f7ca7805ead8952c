"""Running statistics: the state that training moves and evaluation reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .pool import Pool
from .spec import compute_dtype


def given(
    running_mean: Tensor, running_var: Tensor, eps: float, x: Tensor
) -> tuple[Tensor, Tensor]:
    """(mean, rstd) for evaluation: copies, since the buffers may move before the backward."""
    dtype = compute_dtype(x.dtype)
    return running_mean.to(dtype, copy=True), (running_var.to(dtype) + eps).rsqrt()


@torch.no_grad()
def track(
    pool: Pool,
    x: Tensor,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Move the running averages, in place, towards this batch's mean and unbiased variance.

    running <- (1 - f) * running + f * batch, f = momentum, or 1 / (number of batches) where it is
    None. Statistics per sample and channel are averaged over the samples. Empty pools move
    nothing; pools of one value leave the variance alone.
    """
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    factor: float | Tensor = 0.0
    if momentum is not None:
        factor = momentum
    elif num_batches_tracked is not None:
        factor = 1.0 / num_batches_tracked.to(running_mean.dtype)
    mean, var = mean.detach(), var.detach()
    if mask is None:
        count = math.prod([x.shape[i] for i in pool.axes(x.dim())])
        if count == 0 or mean.numel() == 0:
            return
        new_mean, new_var = mean, var * (count / (count - 1)) if count > 1 else None
        if mean.dim() == 2:
            new_mean = mean.mean(0)
            new_var = None if new_var is None else new_var.mean(0)
        _move(running_mean, new_mean, factor)
        if new_var is not None:
            _move(running_var, new_var, factor)
        return
    counts = mask.expand(x.shape).sum(pool.axes(x.dim()))
    unbiased = var * (counts / (counts - 1).clamp(min=1)).to(var.dtype)
    for running, new, enough in (
        (running_mean, mean, counts > 0),
        (running_var, unbiased, counts > 1),
    ):
        new = torch.where(enough, new, 0)
        if mean.dim() == 2:
            new = new.sum(0) / enough.sum(0).clamp(min=1)
            enough = enough.any(0)
        moved = running * (1 - factor) + new.to(running.dtype) * factor
        running.copy_(torch.where(enough, moved, running))


def _move(running: Tensor, new: Tensor, factor: float | Tensor) -> None:
    running.mul_(1 - factor).add_(new.to(running.dtype) * factor)
