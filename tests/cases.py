"""The norms of the tests, as (name, normkit layer, torch layer, input shape)."""

from dataclasses import dataclass
from typing import Any

from torch import nn

import normkit


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()

    def pair(self, **more):
        kwargs = dict(self.kwargs) | more
        return getattr(normkit, self.name)(*self.args, **kwargs), getattr(nn, self.name)(
            *self.args, **kwargs
        )

    def __str__(self):
        extra = "-".join(f"{k}={v}" for k, v in self.kwargs)
        return f"{self.name}{'x'.join(map(str, self.shape))}{'-' + extra if extra else ''}"


def _case(name, shape, *args, **kwargs):
    return Case(name, shape, args, tuple(kwargs.items()))


CASES = [
    _case("BatchNorm1d", (5, 6), 6),
    _case("BatchNorm1d", (4, 6, 3), 6, momentum=None),
    _case("BatchNorm2d", (3, 6, 4, 5), 6),
    _case("BatchNorm2d", (3, 6, 4, 5), 6, track_running_stats=False),
    _case("BatchNorm2d", (3, 6, 4, 5), 6, affine=False, eps=1e-3, momentum=0.3),
    _case("BatchNorm3d", (2, 4, 2, 3, 4), 4),
    _case("InstanceNorm1d", (3, 4, 7), 4),
    _case("InstanceNorm1d", (4, 7), 4),
    _case("InstanceNorm2d", (3, 4, 5, 3), 4, affine=True),
    _case("InstanceNorm2d", (3, 4, 5, 3), 4, affine=True, track_running_stats=True),
    _case("InstanceNorm3d", (2, 4, 2, 3, 4), 4, affine=True),
    _case("GroupNorm", (3, 6, 4, 2), 3, 6),
    _case("GroupNorm", (3, 6), 2, 6, affine=False),
    _case("GroupNorm", (2, 6, 5), 6, 6),
    _case("LayerNorm", (4, 3, 8), 8),
    _case("LayerNorm", (4, 3, 8), (3, 8), bias=False),
    _case("LayerNorm", (4, 8), 8, elementwise_affine=False),
    _case("RMSNorm", (4, 3, 8), 8),
    _case("RMSNorm", (4, 8), 8, eps=1e-3, elementwise_affine=False),
]
