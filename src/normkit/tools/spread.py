"""Exact moments of data that comes in batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of each channel, in float64."""

    count: Tensor
    mean: Tensor
    m2: Tensor

    @staticmethod
    def of(x: Tensor, mask: Tensor | None = None) -> Moments:
        """The moments of each channel of (N, C, *), of the elements where mask is True."""
        rows = x.detach().movedim(1, 0).flatten(1).double()
        if mask is None:
            count = torch.full_like(rows[:, 0:1].sum(1), rows.shape[1])
            mean = rows.sum(1) / count.clamp(min=1)
            return Moments(count, mean, (rows - mean[:, None]).square().sum(1))
        held = mask.expand(x.shape).movedim(1, 0).flatten(1)
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


@dataclass
class Spread:
    """One statistic of each channel: over all values, and from batch to batch."""

    all: Moments | None = None
    means: Moments | None = None
    variances: Moments | None = None

    def see(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Take in a batch, (N, C, *)."""
        new = Moments.of(x, mask)
        mean, variance = Moments.of(new.mean[None]), Moments.of(new.variance[None])
        both = self.merge(Spread(new, mean, variance))
        self.all, self.means, self.variances = both.all, both.means, both.variances

    def merge(self, other: Spread) -> Spread:
        """The batches of both."""
        return Spread(
            _both(self.all, other.all),
            _both(self.means, other.means),
            _both(self.variances, other.variances),
        )

    def cpu(self) -> Spread:
        """On the CPU."""
        return Spread(*(m and m.cpu() for m in (self.all, self.means, self.variances)))

    @property
    def batches(self) -> int:
        """How many batches were seen."""
        return int(self.means.count[0]) if self.means else 0

    def errors(self) -> tuple[float, float]:
        """Standard errors of one batch's mean, in standard deviations, and variance, relative."""
        assert self.all is not None
        assert self.means is not None
        assert self.variances is not None
        varies = self.all.variance > 0
        if self.batches < 2 or not varies.any():
            return 0.0, 0.0
        variance = self.all.variance[varies]
        of_mean = (self.means.variance[varies] / variance).mean().sqrt()
        of_variance = (self.variances.variance[varies] / variance.square()).mean().sqrt()
        return float(of_mean), float(of_variance)

    def distance(self, mean: Tensor, variance: Tensor) -> tuple[float, float]:
        """How far other statistics are: (shift of the mean, |ln| of the variances' ratio).

        Root mean squares over the channels that vary, the shift in standard deviations.
        """
        assert self.all is not None
        varies = self.all.variance > 0
        if not varies.any():
            return 0.0, 0.0
        mine = self.all.variance[varies]
        shift = (mean.to(mine)[varies] - self.all.mean[varies]) / mine.sqrt()
        ratio = (variance.to(mine)[varies].clamp(min=1e-300) / mine).log()
        return float(shift.square().mean().sqrt()), float(ratio.square().mean().sqrt())


def _both(a: Moments | None, b: Moments | None) -> Moments | None:
    return a.merge(b) if a and b else a or b
