"""The layouts that kernels know: contiguous, and channels last."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.formula.spec import Inputs, Spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What kernels compute; statistics are float32, those of float64 float64."""


def dense_inputs(spec: Spec, inputs: Inputs) -> Inputs:
    """x, residual and add in one of the layouts, copied once where they are in another."""
    x = dense(spec, inputs.x)
    if x is inputs.x and inputs.residual is None and inputs.add is None:
        return inputs
    return inputs._replace(x=x, residual=like(inputs.residual, x), add=like(inputs.add, x))


def dense(spec: Spec, x: Tensor) -> Tensor:
    """x in one of the layouts, copied where it is in another."""
    if x.is_contiguous() or (not spec.pool.trailing and x.movedim(1, -1).is_contiguous()):
        return x
    return x.contiguous()


def like(t: Tensor | None, x: Tensor) -> Tensor | None:
    """t in x's layout, which is contiguous or has its channels last."""
    if t is None or t.stride() == x.stride():
        return t
    if x.is_contiguous():
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def dense_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask in full, in x's layout."""
    return None if mask is None else torch.empty_like(x, dtype=torch.bool).copy_(mask)


def contiguous(t: Tensor | None) -> Tensor | None:
    """t with its values in a row."""
    return None if t is None else t.contiguous()
