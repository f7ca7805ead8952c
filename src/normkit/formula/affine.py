"""What scales and shifts after standardization: nothing, parameters, or what the call gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normkit.common.errors import InputError
from normkit.formula.checks import channels_disagree, check_device, check_floating
from normkit.formula.pool import Pool


class Affine(NamedTuple):
    """weight and bias, both plain, or both of the input's rank where `conditional`."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    conditional: bool = False

    @classmethod
    def of(
        cls,
        pool: Pool,
        x: Tensor,
        plain: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Affine:
        """weight and bias, checked; `plain` is the shape of those that all samples share."""
        plain_weight = _is_plain("weight", weight, pool, x, plain)
        if _is_plain("bias", bias, pool, x, plain) and plain_weight:
            return cls(weight, bias)
        return cls(_full_rank(weight, pool, x), _full_rank(bias, pool, x), conditional=True)

    def after(self, r: Tensor, d: Tensor, ndim: int) -> Affine:
        """The affine after x̂ -> x̂ * r + d, (C,) each, as one: r * weight, d * weight + bias."""
        if self.conditional:
            r, d = (t.reshape(1, -1, *[1] * (ndim - 2)) for t in (r, d))
        if self.weight is not None:
            r, d = r * self.weight, d * self.weight
        return Affine(r, d if self.bias is None else d + self.bias, self.conditional)

    def full_rank(self, pool: Pool, x: Tensor) -> Affine:
        """Both with x's rank, so that they broadcast to x."""
        return Affine(_full_rank(self.weight, pool, x), _full_rank(self.bias, pool, x), True)

    def applied(self, y: Tensor, mask: Tensor | None) -> Tensor:
        """y * weight + bias by torch's own operators; both of y's rank. 0 where the mask is."""
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
            y = y if mask is None else y.masked_fill(~mask, 0)
        return y


NO_AFFINE = Affine()


def _full_rank(parameter: Tensor | None, pool: Pool, x: Tensor) -> Tensor | None:
    """A plain or per-sample parameter with x's rank, its axes where they belong."""
    if parameter is None or parameter.dim() == x.dim():
        return parameter
    shape = parameter.shape
    positions = [1] * (x.dim() - 1 - (pool.trailing or 1))
    if parameter.dim() == (pool.trailing or 1):
        shape = torch.Size([1, *shape])
    return parameter.reshape(
        [shape[0], *positions, *shape[1:]] if pool.trailing else [*shape, *positions]
    )


def _is_plain(
    name: str, parameter: Tensor | None, pool: Pool, x: Tensor, plain: tuple[int, ...]
) -> bool:
    """Whether all samples share the parameter; an error where it fits neither all nor each."""
    if parameter is None:
        return True
    check_floating(name, parameter)
    check_device(name, parameter, x)
    if parameter.shape == plain:
        return True
    if parameter.dim() in (len(plain) + 1, x.dim()) and parameter.dim() <= x.dim():
        full = _full_rank(parameter, pool, x)
        assert full is not None
        if all(m in (1, n) for m, n in zip(full.shape, x.shape, strict=True)):
            return False
    if not pool.trailing and parameter.dim() == 1:
        raise InputError(channels_disagree(name, parameter, x))
    per_sample = (x.shape[0], *plain)
    raise InputError(
        f"expected {name} of shape {plain}, {per_sample} for one a sample, or {x.dim()} axes that "
        f"broadcast to the input's {tuple(x.shape)}, got {tuple(parameter.shape)}"
    )
