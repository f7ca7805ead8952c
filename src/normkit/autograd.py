"""The seam between torch's transforms and the backends: one autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from . import backend
from .backend import aten, reference
from .spec import Inputs, Spec


def normalize(spec: Spec, inputs: Inputs, tracked: bool = False) -> tuple[Tensor, ...]:
    """(y, mean, rstd, variance), and x + add if there is one, by the backend that takes the call.

    Only y and x + add are differentiable. Under torch.compile the reference formula itself is
    traced; under export, torch's own operators are, unless the statistics are needed because they
    are tracked. A Function inside two forward-mode transforms loses the outer tangent without a
    word, so there too the formula itself runs.
    """
    if not _plain():
        if inputs.add is not None:
            total = inputs.x + inputs.add
            return *normalize(spec, inputs._replace(x=total, add=None), tracked), total
        if aten.exporting() and not tracked:
            return aten.normalize(spec, inputs)
        if torch.compiler.is_compiling() or _forward_over_forward():
            y, *statistics = reference.normalize(spec, inputs)
            return y, *(s.detach() for s in statistics)
        return _TransformedNormalize.apply(spec, *inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Normalize.apply(spec, *inputs)
    return backend.choose(spec, inputs).normalize(spec, inputs)


def _plain() -> bool:
    """No compiler, export, transform or forward mode is at work."""
    return not (
        torch.compiler.is_compiling()
        or aten.exporting()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _forward_over_forward() -> bool:
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    stack = retrieve_all_functorch_interpreters()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


def _save(ctx: Any, spec: Spec, inputs: Inputs, outputs: tuple[Tensor, ...]) -> None:
    y, mean, rstd, var, *total = outputs
    ctx.mark_non_differentiable(mean, rstd, var)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.has_residual = spec, inputs.residual is not None
    saved = inputs._replace(mean=mean, var=None, rstd=rstd)
    if total:
        saved = saved._replace(x=total[0], add=None)
    if spec.act in ("relu", "leaky_relu") and inputs.residual is not None:
        saved = saved._replace(residual=None, output=y)
    elif spec.act is None:
        saved = saved._replace(residual=None)
    ctx.save_for_backward(*saved)


def _backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    spec, inputs = ctx.spec, Inputs(*ctx.saved_tensors)
    dtotal = others[3] if len(others) > 3 else None
    if dy is None:
        return (None, dtotal, None, None, None, None, dtotal, None, None, None, None)
    if torch.is_grad_enabled():
        # Someone differentiates this backward: the statistics must be functions of x again.
        again = inputs if spec.given else inputs._replace(mean=None, rstd=None)
        gradients = reference.normalize_backward(spec, again, dy, dtotal)
    else:
        dy = _laid_out_like(dy, inputs.x)
        gradients = backend.choose(spec, inputs).normalize_backward(spec, inputs, dy, dtotal)
    dx, dweight, dbias, dz = gradients
    dresidual = dz if ctx.has_residual else None
    dadd = dx if len(others) > 3 else None
    return (None, dx, dweight, dbias, dresidual, None, dadd, None, None, None, None)


class _Normalize(torch.autograd.Function):
    """What runs eagerly; a Function with rules for transforms costs ten microseconds more."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        outputs = backend.choose(spec, inputs).normalize(spec, inputs)
        _save(ctx, spec, inputs, outputs)
        return outputs

    backward = staticmethod(_backward)


class _TransformedNormalize(torch.autograd.Function):
    """What runs under torch.func's transforms and in forward mode."""

    @staticmethod
    def forward(spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        return backend.choose(spec, inputs).normalize(spec, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, *tensors = inputs
        _save(ctx, spec, Inputs(*tensors), output)
        ctx.save_for_forward(*tensors)

    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs(*ctx.saved_tensors)
        return (reference.normalize_tangent(ctx.spec, inputs, *tangents[:4]), None, None, None)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], spec: Spec, *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def one(*one_of_each: Tensor | None) -> tuple[Tensor, ...]:
            return reference.normalize(spec, Inputs(*one_of_each))  # type: ignore[arg-type]

        batched = torch.vmap(one, in_dims[1:], 0, randomness=info.randomness)
        return batched(*tensors), (0, 0, 0, 0)


def _laid_out_like(dy: Tensor, x: Tensor) -> Tensor:
    """dy in x's memory format, so that the input gradient is too; that of .sum() is expanded."""
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == rank and x.is_contiguous(memory_format=memory_format):
            return dy if x.is_contiguous() else dy.contiguous(memory_format=memory_format)
    return dy
