"""The definition: plain torch operators, any device, any floating dtype, any order of derivative.

Everything here is differentiable by torch, so the same lines serve as the eager kernels of this
backend, as the second derivative of every backend, as the batching rule, and as what a compiler is
given to fuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from normkit.backend.protocol import Gradients, Normalized, Sums
from normkit.formula.spec import Inputs, Spec, compute_dtype

DEVICE = None
LEAKY_SLOPE = 0.01


def available() -> str | None:
    """Why this backend can't be used on this machine, or None."""
    return None


def why_not(spec: Spec, inputs: Inputs) -> str | None:
    """Why this backend can't take this call, or None."""
    return None


def wide(x: Tensor) -> Tensor:
    """x in the dtype in which it is computed: at least float32."""
    return x.to(compute_dtype(x.dtype))


def dense_inputs(spec: Spec, inputs: Inputs) -> Inputs:
    """Any layout serves."""
    return inputs


def normalize(spec: Spec, inputs: Inputs) -> Normalized:
    """y = act((x - mean) * rstd * weight + bias + residual), and the statistics of each pool."""
    if inputs.add is not None:
        total = inputs.x + inputs.add
        return normalize(spec, inputs._replace(x=total, add=None))._replace(total=total)
    pool = spec.pool
    standard, mean, rstd, var = _standardize(spec, inputs)
    z = _affine(spec, inputs, standard)
    y = pool.unview(_select(spec, inputs, ACTIVATIONS[spec.act][0](z)))
    axes = pool.axes(standard.dim())
    statistics = (mean.squeeze(axes), rstd.squeeze(axes), var.squeeze(axes))
    return Normalized(y.to(inputs.x.dtype), *statistics)


def output(spec: Spec, inputs: Inputs) -> Tensor:
    """y alone, where no sum with `add` and none of the statistics is wanted."""
    return normalize(spec, inputs).y


def moments(spec: Spec, inputs: Inputs) -> Tensor:
    """Count, mean and biased variance of each pool, stacked, in float64; an empty one has zeros."""
    x = _select(spec, inputs, spec.pool.view(wide(inputs.x)))
    axes = spec.pool.axes(x.dim())
    scale = _scale(x, axes)
    mean, left, var = (m.double() for m in _moments(spec, inputs, x * scale))
    n = _count(spec, inputs, x).double().expand(var.shape)
    every = torch.stack([n, (mean + left) / scale, var / scale / scale])
    return every.squeeze(tuple(1 + axis for axis in axes))


def normalize_backward(
    spec: Spec, inputs: Inputs, dy: Tensor, dtotal: Tensor | None = None
) -> Gradients:
    """Gradients of x, weight, bias, residual from that of y.

    With dz = dy * act'(z) and g = dz * weight:
    dx = rstd * (g - <g> - x̂ * <g * x̂>), <.> the mean over a pool, and dx = rstd * g where the
    statistics were given; dweight = Σ dz * x̂, dbias = Σ dz, dresidual = dz. `inputs` may hold the
    mean and rstd that `normalize` returned; without them they are functions of x again. `dtotal`,
    the gradient of x + add, is added to dx.
    """
    standard, rstd, dz, g = _gradients(spec, inputs, dy)
    dx = spec.pool.unview(_project(spec, inputs, g, standard, rstd)).to(inputs.x.dtype)
    if dtotal is not None:
        dx = dx + dtotal
    dweight = _parameter_gradient(spec, inputs.weight, dz * standard)
    dbias = _parameter_gradient(spec, inputs.bias, dz)
    return Gradients(dx, dweight, dbias, spec.pool.unview(dz).to(inputs.x.dtype))


def sums(spec: Spec, inputs: Inputs, dy: Tensor) -> Sums:
    """The sums of g and of g * x̂ over each pool, stacked, in float64; dweight and dbias."""
    standard, _, dz, g = _gradients(spec, inputs, dy)
    axes = spec.pool.axes(g.dim())
    return Sums(
        torch.stack([g.double().sum(axes), (g * standard).double().sum(axes)]),
        _parameter_gradient(spec, inputs.weight, dz * standard),
        _parameter_gradient(spec, inputs.bias, dz),
    )


def gradient(spec: Spec, inputs: Inputs, dy: Tensor, means: Tensor) -> Gradients:
    """The gradients of x and residual, given <g> and <g * x̂> of each pool, stacked."""
    standard, rstd, dz, g = _gradients(spec, inputs, dy)
    mean_g, mean_gx = (spec.pool.spread(m.to(g.dtype), g) for m in means)
    dx = _select(spec, inputs, g - mean_g - standard * mean_gx) * rstd
    dx, dz = (spec.pool.unview(each).to(inputs.x.dtype) for each in (dx, dz))
    return Gradients(dx, residual=dz)


def normalize_tangent(
    spec: Spec,
    inputs: Inputs,
    tx: Tensor | None,
    tweight: Tensor | None,
    tbias: Tensor | None,
    tresidual: Tensor | None,
) -> Tensor:
    """The tangent of y: tx goes through the same projection as g does in the backward."""
    pool = spec.pool
    standard, _, rstd, _ = _standardize(spec, inputs)
    tz = torch.zeros_like(standard)
    if tx is not None:
        tx = _select(spec, inputs, pool.view(wide(tx)))
        tx = _project(spec, inputs, tx, standard, rstd)
        if inputs.weight is not None:
            tx = tx * _spread(spec, inputs, inputs.weight)
        tz = tz + tx
    if tweight is not None:
        tz = tz + standard * _spread(spec, inputs, tweight)
    if tbias is not None:
        tz = tz + _spread(spec, inputs, tbias)
    if tresidual is not None:
        tz = tz + pool.view(wide(tresidual))
    if spec.act is not None:
        tz = ACTIVATIONS[spec.act][1](_affine(spec, inputs, standard), tz)
    return pool.unview(_select(spec, inputs, tz)).to(inputs.x.dtype)


def _standardize(spec: Spec, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x̂ = (x - mean) * rstd as a view, with mean, rstd and variance that broadcast against it."""
    pool = spec.pool
    x = _select(spec, inputs, pool.view(wide(inputs.x)))
    if inputs.mean is not None:
        # A copy: what was handed in may be a buffer that moves before the backward.
        mean = pool.spread(inputs.mean.to(x.dtype, copy=True), x)
        if inputs.rstd is not None:
            rstd = pool.spread(inputs.rstd, x)
            var = torch.zeros_like(rstd)
        else:
            assert inputs.var is not None
            wider = torch.promote_types(inputs.var.dtype, x.dtype)
            var = pool.spread(inputs.var.to(wider, copy=True), x)
            rstd, var = torch.rsqrt(var + spec.eps).to(x.dtype), var.to(x.dtype)
    else:
        mean, rstd, var = _statistics(spec, x, inputs)
    if spec.center:
        x = _select(spec, inputs, x - mean)
        if spec.given and inputs.mean is not None and inputs.mean.dtype == torch.float64 != x.dtype:
            x = x - (pool.spread(inputs.mean, x) - mean).to(x.dtype)
        if not spec.given:
            # A mean rounded to x's dtype is off by up to half a unit in its last place, which at
            # mean 1e5 and std 1 shifts x̂ in the third digit: take out what it left.
            x = x - _average(spec, inputs, x)(x)
    return _select(spec, inputs, x) * rstd, mean, rstd, var


def _statistics(spec: Spec, x: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, rstd and biased variance of each pool of the view x, overflow-safe."""
    axes = spec.pool.axes(x.dim())
    if x.numel() == 0:
        zero = x.new_zeros([1 if i in axes else n for i, n in enumerate(x.shape)])
        return zero, (zero + spec.eps).rsqrt(), zero
    if x.dtype == torch.float64:
        mean, left, var = _moments(spec, inputs, x)
        return mean + left, torch.rsqrt(var + spec.eps), var
    scale = _scale(x, axes)
    mean, left, var = _moments(spec, inputs, x * scale)
    # At 2^-80 eps vanishes beside any variance but that of a constant pool.
    scaled = (scale < 1) & (var > 0)
    rstd = torch.rsqrt(var + torch.where(scaled, 2.0**-126, spec.eps))
    return (mean + left) / scale, rstd * torch.where(scaled, scale, 1.0), var / scale / scale


def _scale(x: Tensor, axes: tuple[int, ...]) -> Tensor | float:
    """1, or for float32 pools beyond 2^48, whose squares may overflow in a sum, 2^-80."""
    if x.dtype == torch.float64 or x.numel() == 0:
        return 1.0
    return torch.where(x.detach().abs().amax(axes, keepdim=True) > 2.0**48, 2.0**-80, 1.0)


def _moments(spec: Spec, inputs: Inputs, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (0 where it isn't subtracted), what its rounding left, mean square of what remains."""
    average = _average(spec, inputs, x)
    if not spec.center:
        square = average(x * x)
        return torch.zeros_like(square), torch.zeros_like(square), square
    mean = average(x)
    x = _select(spec, inputs, x - mean)
    left = average(x)
    x = _select(spec, inputs, x - left)
    return mean, left, average(x * x)


def _select(spec: Spec, inputs: Inputs, x: Tensor) -> Tensor:
    if inputs.mask is None:
        return x
    return torch.where(spec.pool.view(inputs.mask.expand(inputs.x.shape)), x, 0)


def _average(spec: Spec, inputs: Inputs, view: Tensor) -> Callable[[Tensor], Tensor]:
    """The mean over each pool; 0 over an empty or a masked one."""
    axes = spec.pool.axes(view.dim())
    if inputs.mask is None and view.numel() > 0:
        return lambda v: v.mean(axes, keepdim=True)
    counts = _count(spec, inputs, view).clamp(min=1).to(view.dtype)
    return lambda v: v.sum(axes, keepdim=True) / counts


def _count(spec: Spec, inputs: Inputs, view: Tensor) -> Tensor:
    """The number of elements of each pool, or of all alike."""
    axes = spec.pool.axes(view.dim())
    if inputs.mask is None:
        return torch.tensor(math.prod([view.shape[i] for i in axes]), device=view.device)
    return spec.pool.view(inputs.mask.expand(inputs.x.shape)).sum(axes, keepdim=True)


def _gradients(spec: Spec, inputs: Inputs, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x̂ and rstd; dz = dy * act'(z) and g = dz * weight; all as views."""
    standard, _, rstd, _ = _standardize(spec, inputs)
    dz = _select(spec, inputs, spec.pool.view(wide(dy)))
    if spec.act is not None:
        if inputs.output is None:
            z = _affine(spec, inputs, standard)
        else:
            z = spec.pool.view(wide(inputs.output))
        dz = ACTIVATIONS[spec.act][1](z, dz)
    g = dz if inputs.weight is None else dz * _spread(spec, inputs, inputs.weight)
    return standard, rstd, dz, g


def _parameter_gradient(spec: Spec, parameter: Tensor | None, gradient: Tensor) -> Tensor | None:
    if parameter is None:
        return None
    if spec.conditional or spec.pool.trailing:
        return spec.pool.unview(gradient).sum_to_size(parameter.shape).to(parameter.dtype)
    total = gradient.sum(spec.pool.affine_axes(gradient.dim()))
    return total.reshape(parameter.shape).to(parameter.dtype)


def _project(spec: Spec, inputs: Inputs, g: Tensor, standard: Tensor, rstd: Tensor) -> Tensor:
    """The derivative of standardization, which is its own transpose, applied to g."""
    if not spec.given:
        average = _average(spec, inputs, g)
        slope = standard * average(g * standard)
        g = g - average(g) - slope if spec.center else g - slope
    return _select(spec, inputs, g) * rstd


def _affine(spec: Spec, inputs: Inputs, standard: Tensor) -> Tensor:
    z = standard
    if inputs.weight is not None:
        z = z * _spread(spec, inputs, inputs.weight)
    if inputs.bias is not None:
        z = z + _spread(spec, inputs, inputs.bias)
    if inputs.residual is not None:
        z = z + _select(spec, inputs, spec.pool.view(wide(inputs.residual)))
    return z


def _spread(spec: Spec, inputs: Inputs, parameter: Tensor) -> Tensor:
    """A weight or bias in the shape that broadcasts against the view of x."""
    x, parameter = inputs.x, wide(parameter)
    if spec.conditional:
        return spec.pool.view(parameter.expand(x.shape))
    return spec.pool.spread_affine(parameter, spec.pool.view(x).dim())


def _identity(z: Tensor) -> Tensor:
    return z


def _silu_gradient(z: Tensor, g: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return g * s * (1 + z * (1 - s))


def _gelu_gradient(z: Tensor, g: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    return g * (cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))


ACTIVATIONS: dict[
    str | None, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
] = {
    None: (_identity, lambda z, g: g),
    "relu": (F.relu, lambda z, g: torch.where(z <= 0, 0, g)),
    "leaky_relu": (
        lambda z: F.leaky_relu(z, LEAKY_SLOPE),
        lambda z, g: torch.where(z <= 0, LEAKY_SLOPE * g, g),
    ),
    "silu": (F.silu, _silu_gradient),
    "gelu": (F.gelu, _gelu_gradient),
}
"""Name -> (function, its derivative at z applied to g). None of them has parameters."""
