"""The seam between torch's transforms and the backends: one autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

from . import backend
from .backend import aten, reference
from .spec import Inputs, Spec


def normalize(
    spec: Spec, inputs: Inputs, tracked: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, rstd, variance) by the backend that takes the call, under every transform.

    Only y is differentiable. Under torch.compile the reference formula itself is traced, since
    Dynamo refuses a Function with `jvp` and `vmap` rules; under export, torch's own operators are,
    unless the statistics are needed because they are tracked. A Function inside two forward-mode
    transforms loses the outer tangent without a word, so there too the formula itself runs.
    """
    if aten.exporting() and not tracked:
        return aten.normalize(spec, inputs)
    if torch.compiler.is_compiling() or _forward_over_forward():
        y, *statistics = reference.normalize(spec, inputs)
        mean, rstd, var = (s.detach() for s in statistics)
        return y, mean, rstd, var
    return _Normalize.apply(spec, *inputs)


def _forward_over_forward() -> bool:
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    stack = retrieve_all_functorch_interpreters()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        return backend.choose(spec, inputs).normalize(spec, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, *tensors = inputs
        given = Inputs(*tensors)
        _, mean, rstd, var = output
        ctx.mark_non_differentiable(mean, rstd, var)
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.has_residual = spec, given.residual is not None
        saved = given if spec.given else given._replace(mean=mean, rstd=rstd)
        if spec.act is None:
            saved = saved._replace(residual=None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*given)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 8
        spec, inputs = ctx.spec, Inputs(*ctx.saved_tensors)
        if torch.is_grad_enabled():
            # Someone differentiates this backward: the statistics must be functions of x again.
            again = inputs if spec.given else inputs._replace(mean=None, rstd=None)
            gradients = reference.normalize_backward(spec, again, dy)
        else:
            dy = _laid_out_like(dy, inputs.x)
            gradients = backend.choose(spec, inputs).normalize_backward(spec, inputs, dy)
        dx, dweight, dbias, dresidual = gradients
        return (None, dx, dweight, dbias, dresidual if ctx.has_residual else None, None, None, None)

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
