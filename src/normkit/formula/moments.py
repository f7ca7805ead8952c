"""Exact moments of data that comes in batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normkit.formula.spec import float64


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of each feature, in float64."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @staticmethod
    def of(x: Tensor, mask: Tensor | None = None) -> Moments:
        """The moments of each channel of (N, C, *), of the elements where mask is True."""
        rows = float64(x.detach()).movedim(1, 0).flatten(1)
        if mask is None:
            count = torch.full_like(rows[:, 0:1].sum(1), rows.shape[1])
            mean = rows.sum(1) / count.clamp(min=1)
            return Moments(count, mean, (rows - mean[:, None]).square().sum(1))
        held = mask.to(rows.device).expand(x.shape).movedim(1, 0).flatten(1)
        count = held.sum(1).double()
        mean = rows.where(held, 0).sum(1) / count.clamp(min=1)
        return Moments(count, mean, (rows - mean[:, None]).where(held, 0).square().sum(1))

    def merge(self, other: Moments) -> Moments:
        """The moments of both together.

        mean = mean_a + d n_b / n, M2 = M2_a + M2_b + d² n_a n_b / n, d = mean_b - mean_a

        Source: Chan, Golub & LeVeque 1979 (Stanford STAN-CS-79-773), equations 2.1.
        """
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        delta = other.mean - self.mean
        m2 = self.m2 + other.m2 + delta.square() * self.count * share
        return Moments(count, self.mean + delta * share, m2)

    def cpu(self) -> Moments:
        """On the CPU."""
        return Moments(self.count.cpu(), self.mean.cpu(), self.m2.cpu())

    @property
    def variance(self) -> Tensor:
        """The unbiased variance; 0 of one value."""
        return self.m2 / (self.count - 1).clamp(min=1)
