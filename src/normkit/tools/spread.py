"""A statistic over all values, and how it spreads from batch to batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from normkit.formula.moments import Moments


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

    def errors(self, eps: float = 0.0) -> tuple[float, float]:
        """Standard errors of one batch's mean and variance, by what a norm divides by.

        Root mean squares over the channels, of mean / sqrt(variance + eps) and of variance /
        (variance + eps).
        """
        assert self.all is not None
        assert self.means is not None
        assert self.variances is not None
        scale = self.all.variance + eps
        varies = scale > 0
        if self.batches < 2 or not varies.any():
            return 0.0, 0.0
        scale = scale[varies]
        of_mean = (self.means.variance[varies] / scale).mean().sqrt()
        of_variance = (self.variances.variance[varies] / scale.square()).mean().sqrt()
        return float(of_mean), float(of_variance)

    def distance(self, mean: Tensor, variance: Tensor, eps: float = 0.0) -> tuple[float, float]:
        """How far other statistics are: (shift of the mean, |ln| of the ratio of variance + eps).

        Root mean squares over the channels, the shift by sqrt(variance + eps): what the layer
        divides by. Without eps, channels that don't vary are left out.
        """
        assert self.all is not None
        scale = self.all.variance + eps
        varies = scale > 0
        if not varies.any():
            return 0.0, 0.0
        mine = scale[varies]
        shift = (mean.to(mine)[varies] - self.all.mean[varies]) / mine.sqrt()
        ratio = ((variance.to(mine)[varies] + eps).clamp(min=1e-300) / mine).log()
        return float(shift.square().mean().sqrt()), float(ratio.square().mean().sqrt())


def _both(a: Moments | None, b: Moments | None) -> Moments | None:
    return a.merge(b) if a and b else a or b
