"""Norms that only studies use: batch norm with one of its workings taken out."""

from typing import Any

import torch
from torch import Tensor, nn

import normkit
from normkit import functional
from normkit.factory import NORMS


class NoisyBatchNorm(normkit.BatchNorm):
    """Batch normalization with noise behind it that makes every unit's distribution unsteady.

    y = batch_norm(x) * scale + shift, scale ~ N(sigma, 0.1²), shift ~ N(mu, 0.1²)

    mu ~ U(-0.5, 0.5) and sigma ~ U(1, 1.25) are drawn for each unit (channel) at each call, scale
    and shift for each sample and unit, all from torch's global generator. In evaluation there is no
    noise. Input (N, C, *), state, constructor and errors: as `normkit.BatchNorm`.

    Source: Santurkar et al. 2018 (arXiv 1805.11604), section 2.1.
    """

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Return y of input (N, C, *)."""
        y = super().forward(input)
        if not self.training:
            return y
        samples, units = y.shape[:2]
        mu = torch.empty(units, dtype=y.dtype, device=y.device).uniform_(-0.5, 0.5)
        sigma = torch.empty_like(mu).uniform_(1.0, 1.25)
        draws = torch.randn(2, samples, units, dtype=y.dtype, device=y.device)
        over = (samples, units, *[1] * (y.dim() - 2))
        return y * (sigma + 0.1 * draws[0]).view(over) + (mu + 0.1 * draws[1]).view(over)


class DetachedBatchNorm(normkit.BatchNorm):
    """Batch normalization whose statistics are constants to the gradient.

    y = (x - mean) / sqrt(variance + eps) * weight + bias, dy/dx = weight / sqrt(variance + eps)

    In training, mean and variance are the batch's, as batch norm's, but no gradient passes through
    them. In evaluation it is batch norm. Input (N, C, *), state, constructor and errors:
    as `normkit.BatchNorm`.

    Source: the counter-example in section 2 of Ioffe & Szegedy 2015 (arXiv 1502.03167).
    """

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Return y of input (N, C, *)."""
        if not self.training:
            return super().forward(input)
        with torch.no_grad():
            super().forward(input)  # moves the running statistics
            over = [0, *range(2, input.dim())]
            variance, mean = torch.var_mean(input, over, correction=0)
        return functional.batch_norm(input, mean, variance, self.weight, self.bias, eps=self.eps)


_OWN: dict[str, type[nn.Module]] = {"noisy": NoisyBatchNorm, "detached": DetachedBatchNorm}


def create(name: str, features: int, **arguments: Any) -> nn.Module:
    """Return the norm of that name over `features`: one of these, or `normkit.create`'s."""
    if name in _OWN:
        return _OWN[name](features, **arguments)
    return normkit.create(name, features, **arguments)


def layer_of(name: str) -> type[nn.Module]:
    """Return the class of the norms of that name."""
    return _OWN.get(name) or NORMS[name.partition(":")[0]].layer
