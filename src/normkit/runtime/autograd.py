"""The seam between torch's transforms and the backends: one autograd.Function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, is_legacy_batchedtensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from normkit import backend
from normkit.backend import aten, reference
from normkit.backend.protocol import Backend, Gradients, Normalized
from normkit.formula.spec import Inputs, Spec
from normkit.runtime import recompute
from normkit.runtime.statistics import Moments
from normkit.runtime.sync import Merge, Settings


def normalize(spec: Spec, inputs: Inputs, tracked: bool = False) -> Normalized:
    """y, the statistics where they are `tracked`, and x + add, by the backend that takes the call.

    Only y and x + add are differentiable.
    Under torch.compile a graph holds the C++ core's operator where that is kept, else the reference
    formula; under export, torch's own operators, unless the statistics are tracked. The formula
    itself runs, too, in the transforms that Functions don't fit, and where statistics that are
    given are differentiated, by which no Function here has a derivative.
    """
    if not plain():
        if inputs.add is not None:
            total = inputs.x + inputs.add
            return normalize(spec, inputs._replace(x=total, add=None), tracked)._replace(
                total=total
            )
        if aten.exporting() and not tracked:
            return aten.normalize(spec, inputs)
        if _compiled() and backend.kept_by_compilers(spec, inputs):
            return Normalized(*_CompiledNormalize.apply(spec, *inputs))
        if torch.compiler.is_compiling() or spec.given or _by_formula_alone():
            return _by_formula(spec, inputs)
        return Normalized(*_TransformedNormalize.apply(spec, *inputs))
    verbs = backend.choose(spec, inputs)
    if _differentiated(inputs):
        mean, var = inputs.mean, inputs.var
        if mean is not None and var is not None and (mean.requires_grad or var.requires_grad):
            return _by_formula(spec, inputs)
        inputs, found = verbs.dense_inputs(spec, inputs), list[Tensor]()
        differentiable = (inputs.x, inputs.weight, inputs.bias, inputs.residual, inputs.add)
        y, *total = _Normalize.apply(spec, inputs, verbs, found, *differentiable)
        return Normalized(y, *found, *total)
    if tracked or inputs.add is not None:
        return verbs.normalize(spec, inputs)
    return Normalized(verbs.output(spec, inputs))


def _without_total(outputs: Normalized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, rstd and variance: what a Function gives, whose outputs must all be tensors."""
    y, mean, rstd, var, _ = outputs
    assert mean is not None
    assert rstd is not None
    assert var is not None
    return y, mean, rstd, var


def _by_inputs(before: int, gradients: Gradients) -> tuple[Tensor | None, ...]:
    """What a backward returns for so many arguments and all of `Inputs` behind them."""
    rest = len(Inputs._fields) - len(gradients)
    return (*(None,) * before, *gradients, *(None,) * rest)


def _by_formula(spec: Spec, inputs: Inputs) -> Normalized:
    y, *statistics = _without_total(reference.normalize(spec, inputs))
    return Normalized(y, *(s.detach() for s in statistics))


def _differentiated(inputs: Inputs) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def plain() -> bool:
    """No compiler, export, transform or forward mode is at work."""
    return not (torch.compiler.is_compiling() or aten.exporting() or _transformed())


def _compiled() -> bool:
    """torch.compile is at work, and nothing else."""
    return torch.compiler.is_compiling() and not (aten.exporting() or _transformed())


def _transformed() -> bool:
    """Forward mode or a transform of torch.func is at work."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _by_formula_alone() -> bool:
    """Forward mode inside forward mode, or functionalization, is at work.

    A Function loses the outer tangent without a word in the first, and has no rule in the second.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    transforms = [level.key() for level in retrieve_all_functorch_interpreters()]
    return transforms.count(TransformType.Jvp) > 1 or TransformType.Functionalize in transforms


def _save(ctx: Any, spec: Spec, inputs: Inputs, outputs: Normalized) -> None:
    """What the backward needs: what `_saved` gives back."""
    x, weight, bias, residual, mask, *_ = inputs
    y, mean, rstd, _, total = outputs
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.has_residual = spec, residual is not None
    output = None
    if residual is not None and spec.act in ("relu", "leaky_relu"):
        residual, output = None, y
    elif spec.act is None:
        residual = None
    ctx.save_for_backward(
        x if total is None else total, weight, bias, residual, mask, mean, rstd, output
    )


def _saved(ctx: Any) -> Inputs:
    x, weight, bias, residual, mask, mean, rstd, output = ctx.saved_tensors
    return Inputs(x, weight, bias, residual, mask, None, mean, None, rstd, output)


def gradients_of(
    ctx: Any, verbs: Backend | None, dy: Tensor | None, dtotal: Tensor | None = None
) -> Gradients:
    """The gradients of the inputs; that of `add` is x's."""
    if dy is None:
        return Gradients(dtotal)
    spec, inputs = ctx.spec, _saved(ctx)
    batched = is_legacy_batchedtensor(dy) or (
        dtotal is not None and is_legacy_batchedtensor(dtotal)
    )
    if batched or torch.is_grad_enabled() or _transformed():
        # Someone differentiates this backward, so the statistics must be functions of x again; or
        # there are many gradients at once, which only torch's operators take.
        again = inputs if spec.given else inputs._replace(mean=None, rstd=None)
        gradients = reference.normalize_backward(spec, again, dy, dtotal)
    else:
        verbs = verbs or backend.choose(spec, inputs)
        gradients = verbs.normalize_backward(spec, inputs, laid_out_like(dy, inputs.x), dtotal)
    return gradients if ctx.has_residual else gradients._replace(residual=None)


def moments(spec: Spec, inputs: Inputs, merge: Merge, settings: Settings) -> Moments:
    """The moments of all ranks' batches together, which a recomputation doesn't ask for again.

    Where the formula itself is traced they are functions of x, else constants.
    """
    if plain():

        def read() -> Moments:
            with torch.no_grad():
                own = backend.choose(spec, inputs).moments(spec, inputs)
                return merge.moments(own, settings, whole=inputs.mask is None)

        return recompute.remember(read, moves=False)
    return _merged(reference.moments(spec, inputs), merge, settings)


def normalize_merged(spec: Spec, inputs: Inputs, merge: Merge, n: Tensor | int) -> Tensor:
    """y by merged statistics of n elements, which `inputs` hold; they count as functions of x."""
    if not plain():
        return reference.normalize(spec, inputs).y
    if _differentiated(inputs):
        return _NormalizeMerged.apply(spec, merge, n, *inputs)
    return backend.choose(spec, inputs).output(spec, inputs)


def _merged(own: Tensor, merge: Merge, settings: Settings) -> Moments:
    """As `Merge.moments`, differentiable."""
    return Moments(*_OfAllRanks.apply(own, merge, settings).unbind())


class _OfAllRanks(torch.autograd.Function):
    """Merged (count, mean, variance) as a function of this rank's, of which it has a share.

    d mean = share * d mean_r, d var = share * (d var_r + 2 (mean_r - mean) d mean_r), and what all
    ranks want of the merged ones is summed.
    """

    @staticmethod
    def forward(own: Tensor, merge: Merge, settings: Settings) -> Tensor:
        return torch.stack(merge.moments(own, settings, whole=False))  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        own, ctx.merge, _ = inputs
        ctx.save_for_backward(own, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (n_own, mean_own, _), (n, mean, _) = (t.unbind() for t in ctx.saved_tensors)
        _, dmean, dvar = _Total.apply(gradient, ctx.merge).unbind()
        share = n_own / n.clamp(min=1)
        dmean = dmean + 2 * (mean_own - mean) * dvar
        return torch.stack([torch.zeros_like(share), share * dmean, share * dvar]), None, None


def _total(own: Tensor, merge: Merge) -> Tensor:
    """The sum over the ranks; a Function only where it is differentiated, since that costs more."""
    return _Total.apply(own, merge) if torch.is_grad_enabled() else merge.total(own)


class _Total(torch.autograd.Function):
    """The sum over the ranks, which is its own transpose."""

    @staticmethod
    def forward(own: Tensor, merge: Merge) -> Tensor:
        return merge.total(own.clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.merge = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Total.apply(gradient, ctx.merge), None


class _NormalizeMerged(torch.autograd.Function):
    """`normalize_merged` by a backend's kernels: sums, their total over the ranks, gradient."""

    @staticmethod
    def forward(
        ctx: Any, spec: Spec, merge: Merge, n: Tensor | int, *tensors: Tensor | None
    ) -> Tensor:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        outputs = backend.choose(spec, inputs).normalize(spec, inputs)
        _save(ctx, spec, inputs, outputs)
        ctx.merge, ctx.n = merge, n
        return outputs.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        spec, inputs, n = ctx.spec, _saved(ctx), ctx.n
        verbs: Backend
        if dy is None:
            dy = torch.zeros_like(inputs.x)
        if _transformed() or is_legacy_batchedtensor(dy):
            raise RuntimeError(
                "a synchronized batch norm takes one gradient at a time, got many, or a tangent, "
                "which ranks can't exchange; call backward for each, or desynchronize() the layer"
            )
        if torch.is_grad_enabled():
            # Someone differentiates this backward: the statistics must be functions of x again.
            x, verbs = inputs.x, reference
            own = reference.moments(spec, inputs._replace(mean=None, rstd=None))
            settings = Settings(
                own.shape[1], x.dtype, "backward of a backward", spec.eps, None, True
            )
            batch = _merged(own, ctx.merge, settings)
            inputs = inputs._replace(mean=batch.mean, var=batch.var, rstd=None)
        else:
            dy = laid_out_like(dy, inputs.x)
            verbs = backend.choose(spec, inputs)
        sums = verbs.sums(spec, inputs, dy)
        found = Gradients(None, sums.weight, sums.bias)
        _, _, _, *wanted = ctx.needs_input_grad
        if Inputs(*wanted).x:
            total = _total(sums.pools, ctx.merge)
            means = total / (n.clamp(min=1) if isinstance(n, Tensor) else max(n, 1))
            of_x = verbs.gradient(spec, inputs, dy, means)
            found = found._replace(x=of_x.x, residual=of_x.residual)
        elif ctx.has_residual:
            none = torch.zeros_like(sums.pools)
            found = found._replace(residual=verbs.gradient(spec, inputs, dy, none).residual)
        return _by_inputs(3, found if ctx.has_residual else found._replace(residual=None))


class _Normalize(torch.autograd.Function):
    """What runs eagerly; a Function with rules for transforms costs ten microseconds more."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: Spec,
        inputs: Inputs,
        verbs: Backend,
        found: list[Tensor],
        *differentiable: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """y, and x + add if there is one; the statistics are `found`, not outputs."""
        outputs = verbs.normalize(spec, inputs)
        _save(ctx, spec, inputs, outputs)
        ctx.verbs = verbs
        y, mean, rstd, var, total = outputs
        found += mean, rstd, var  # type: ignore[arg-type]
        return (y,) if total is None else (y, total)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        found = gradients_of(ctx, ctx.verbs, dy, *dtotal)
        return None, None, None, None, *found, found.x if dtotal else None


class _CompiledNormalize(torch.autograd.Function):
    """What runs in a compiled graph that keeps the core's operators."""

    @staticmethod
    def forward(ctx: Any, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        outputs = backend.cpu.normalize(spec, inputs)
        y, *statistics = _without_total(outputs)
        ctx.mark_non_differentiable(*statistics)
        _save(ctx, spec, inputs, outputs)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *of_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = _saved(ctx)
        dy = laid_out_like(dy, inputs.x)
        found = backend.cpu.normalize_backward(ctx.spec, inputs, dy)
        return _by_inputs(1, found if ctx.has_residual else found._replace(residual=None))


class _TransformedNormalize(torch.autograd.Function):
    """What runs under torch.func's transforms and in forward mode."""

    @staticmethod
    def forward(spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        return _without_total(backend.choose(spec, inputs).normalize(spec, inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        spec, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, spec, Inputs(*tensors), Normalized(*output))
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, *of_statistics: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return _by_inputs(1, gradients_of(ctx, None, dy))

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = Inputs(*ctx.saved_tensors)
        return (reference.normalize_tangent(ctx.spec, inputs, *tangents[:4]), None, None, None)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], spec: Spec, *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        def one(*one_of_each: Tensor | None) -> tuple[Tensor, ...]:
            outputs = reference.normalize(spec, Inputs(*one_of_each))  # type: ignore[arg-type]
            return _without_total(outputs)

        of_tensors = in_dims[1:]
        of_x = Inputs(*of_tensors).x, Inputs(*of_tensors).mask  # type: ignore[arg-type]
        of_statistics = None if of_x == (None, None) else 0
        out_dims: Any = (0, of_statistics, of_statistics, of_statistics)
        return torch.vmap(one, of_tensors, out_dims, randomness=info.randomness)(*tensors), out_dims


def laid_out_like(dy: Tensor, x: Tensor) -> Tensor:
    """dy in x's memory format, so that the input gradient is too; that of .sum() is expanded."""
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == rank and x.is_contiguous(memory_format=memory_format):
            return dy if x.is_contiguous() else dy.contiguous(memory_format=memory_format)
    return dy
