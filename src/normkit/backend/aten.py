"""What an exported graph holds: torch's own operators, so that it has one node per normalization.

Used under torch.export, torch.onnx.export and torch.jit.trace only. A graph made of them is known
to ONNX and to every compiler; the reference formula in small steps would be as right and slower.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..spec import Inputs, Spec
from . import reference


def exporting() -> bool:
    """Whether this call is being recorded for export."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def normalize(spec: Spec, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.normalize`, without the statistics; masks and batch pools stay with it."""
    pool, (x, weight, bias, residual, mask, *_) = spec.pool, inputs
    if mask is not None or pool.summed == "ns":
        return reference.normalize(spec, inputs)
    if pool.summed == "s":
        y = F.instance_norm(x, None, None, weight, bias, True, 0.0, spec.eps)
    elif pool.summed == "ks":
        assert pool.groups is not None
        y = F.group_norm(x, pool.groups, weight, bias, spec.eps)
    else:
        rows = x if pool.trailing else x.movedim(1, -1)
        shape = rows.shape[rows.dim() - max(pool.trailing, 1) :]
        if spec.center:
            y = F.layer_norm(rows, shape, weight, bias, spec.eps)
        else:
            y = F.rms_norm(rows, shape, weight, spec.eps)
        y = y if pool.trailing else y.movedim(-1, 1)
    none = x.new_empty(0)
    return epilogue(spec, y, residual), none, none, none


def epilogue(spec: Spec, y: Tensor, residual: Tensor | None) -> Tensor:
    """act(y + residual)."""
    return reference.ACTIVATIONS[spec.act][0](y if residual is None else y + residual)
