"""Running statistics: the state that training moves and evaluation reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .pool import Pool


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
    mean, var = mean.detach(), var.detach()
    seen: int | Tensor = 1
    if mask is None:
        count = math.prod([x.shape[i] for i in pool.axes(x.dim())])
        filled = count > 0 and mean.numel() > 0
        has_mean = torch.full_like(mean, filled, dtype=torch.bool)
        has_var = has_mean & (count > 1)
        unbiased = var * (count / max(count - 1, 1))
    else:
        counts = mask.expand(x.shape).sum(pool.axes(x.dim()))
        has_mean, has_var = counts > 0, counts > 1
        unbiased = var * (counts / (counts - 1).clamp(min=1)).to(var.dtype)
        seen = has_mean.any()
    factor: float | Tensor = 0.0 if momentum is None else momentum
    if momentum is None and num_batches_tracked is not None:
        factor = 1.0 / (num_batches_tracked + seen).clamp(min=1).to(running_mean.dtype)
    moved_mean = _moved(running_mean, mean, has_mean, factor)
    moved_var = _moved(running_var, unbiased, has_var, factor)
    running_mean.copy_(moved_mean)
    running_var.copy_(moved_var)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(seen)


def _moved(running: Tensor, new: Tensor, has: Tensor, factor: float | Tensor) -> Tensor:
    new = torch.where(has, new, 0)
    if new.dim() == 2:
        new = new.sum(0) / has.sum(0).clamp(min=1)
        has = has.any(0)
    moved = running * (1 - factor) + new.to(running.dtype) * factor
    return torch.where(has, moved, running)
