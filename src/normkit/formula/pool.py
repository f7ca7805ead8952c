"""Which elements share their statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Summed = Literal["ns", "s", "ks", "k"]


@dataclass(frozen=True, slots=True)
class Pool:
    """The elements of x that share a mean and a variance.

    x is seen as ``(b, n, g, k, *s)``: ghost batches, their samples, groups, channels of a group,
    positions. `summed` names the letters that are pooled; the others index the statistics.

    ========================  ======  ======  ========  =====================
    norm                      summed  groups  trailing  statistics
    ========================  ======  ======  ========  =====================
    batch                     n s     -       0         (C,)
    ghost batch               n s     -       0         (B, C)
    instance                  s       -       0         (N, C)
    group                     k s     G       0         (N, G)
    layer, over the channels  k       1       0         (N, *S)
    layer, over the last d    k       1       d         (*leading axes)
    ========================  ======  ======  ========  =====================

    `groups` is None where each channel is a group of its own. `trailing` is the number of last axes
    that are k when channels don't lie on axis 1; every other axis is then n. `ghosts` is the number
    B of equal ghost batches that the samples are split into; None for one batch, without the axis.
    """

    summed: Summed
    groups: int | None = None
    trailing: int = 0
    ghosts: int | None = None

    def view(self, x: Tensor) -> Tensor:
        """x as ``(n, g, k, *s)`` for group pools, ``(b, n, k, *s)`` for ghosts; else x itself."""
        if self.summed == "ks":
            assert self.groups is not None
            n, c, *positions = x.shape
            return x.reshape(n, self.groups, c // self.groups, *positions)
        if self.ghosts is not None:
            n, *channels = x.shape
            return x.reshape(self.ghosts, n // self.ghosts, *channels)
        return x

    def unview(self, x: Tensor) -> Tensor:
        """Undo `view`."""
        if self.summed == "ks":
            n, g, k, *positions = x.shape
            return x.reshape(n, g * k, *positions)
        if self.ghosts is not None:
            b, n, *channels = x.shape
            return x.reshape(b * n, *channels)
        return x

    def axes(self, ndim: int) -> tuple[int, ...]:
        """The pooled axes of a view with `ndim` axes."""
        match self.summed:
            case "ns":
                return (0, *range(2, ndim)) if self.ghosts is None else (1, *range(3, ndim))
            case "k":
                return tuple(range(ndim - self.trailing, ndim)) if self.trailing else (1,)
            case _:
                return tuple(range(2, ndim))

    def spread(self, statistic: Tensor, view: Tensor) -> Tensor:
        """A statistic, one value a pool, in the shape that broadcasts against the view."""
        axes = self.axes(view.dim())
        return statistic.reshape([1 if i in axes else n for i, n in enumerate(view.shape)])

    def spread_affine(self, parameter: Tensor, ndim: int) -> Tensor:
        """A weight or bias in the shape that broadcasts against a view with `ndim` axes."""
        if self.trailing:
            return parameter
        if self.summed == "ks":
            assert self.groups is not None
            groups = (self.groups, parameter.shape[0] // self.groups)
            return parameter.reshape(*groups, *[1] * (ndim - 3))
        return parameter.reshape(-1, *[1] * (ndim - (2 if self.ghosts is None else 3)))

    def affine_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of a view over which a gradient of weight or bias, (C,), is summed."""
        if self.ghosts is not None:
            return (0, 1, *range(3, ndim))
        return (0, *range(3 if self.summed == "ks" else 2, ndim))


BATCH = Pool("ns")
INSTANCE = Pool("s")
CHANNELS = Pool("k", groups=1)


def ghost(ghosts: int) -> Pool:
    """The pool of ghost batch normalization, over this many ghost batches."""
    return Pool("ns", ghosts=ghosts)


def group(groups: int) -> Pool:
    """The pool of group normalization."""
    return Pool("ks", groups=groups)


_LAST = {axes: Pool("k", groups=1, trailing=axes) for axes in range(1, 9)}


def last(axes: int) -> Pool:
    """The pool of layer normalization over the last `axes` axes."""
    return _LAST.get(axes) or Pool("k", groups=1, trailing=axes)
