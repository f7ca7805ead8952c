"""What an exported graph holds: torch's own operators, so that it has one node per normalization.

Used under torch.export, torch.onnx.export and torch.jit.trace only. A graph made of them is known
to ONNX and to every compiler; the reference formula in small steps would be as right and slower.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from normkit.backend import reference
from normkit.backend.protocol import Normalized
from normkit.formula.spec import Inputs, Spec


def exporting() -> bool:
    """Whether this call is being recorded for export."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def normalize(spec: Spec, inputs: Inputs) -> Normalized:
    """As `reference.normalize`, without the statistics; masks and batch pools stay with it."""
    pool, x = spec.pool, inputs.x
    if inputs.mask is not None or pool.summed == "ns":
        return reference.normalize(spec, inputs)
    weight, bias = (None, None) if spec.conditional else (inputs.weight, inputs.bias)
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
            y = y if bias is None else y + bias
        y = y if pool.trailing else y.movedim(-1, 1)
    return Normalized(_epilogue(spec, inputs, y))


def by_running(spec: Spec, inputs: Inputs, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """y by running statistics, as torch's batch norm in evaluation."""
    weight, bias = (None, None) if spec.conditional else (inputs.weight, inputs.bias)
    y = F.batch_norm(inputs.x, running_mean, running_var, weight, bias, False, 0.0, spec.eps)
    return _epilogue(spec, inputs, y)


def by_batch(
    spec: Spec,
    inputs: Inputs,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
) -> Tensor:
    """y by the batch's statistics, as torch's batch norm in training, which moves the running ones.

    Quantization-aware training looks for this operator in exported graphs.
    """
    weight, bias = (None, None) if spec.conditional else (inputs.weight, inputs.bias)
    y = F.batch_norm(inputs.x, running_mean, running_var, weight, bias, True, momentum, spec.eps)
    return _epilogue(spec, inputs, y)


def _epilogue(spec: Spec, inputs: Inputs, y: Tensor) -> Tensor:
    """act(y * weight + bias + residual), the affine only where it is conditional."""
    if spec.conditional and inputs.weight is not None:
        y = y * inputs.weight
    if spec.conditional and inputs.bias is not None:
        y = y + inputs.bias
    y = reference.ACTIVATIONS[spec.act][0](y if inputs.residual is None else y + inputs.residual)
    return y if y.dtype == inputs.x.dtype else y.to(inputs.x.dtype)
