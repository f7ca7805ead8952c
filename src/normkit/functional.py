"""Every feature normalization as a function.

All of them are y = act((x - mean) * rstd * weight + bias [+ residual]), rstd = (variance +
eps)^(-1/2), and differ in which elements share a mean and a variance (`normkit.formula.pool.Pool`)
and in where these come from. Statistics are computed in at least float32; y has x's dtype and
layout.

`mask` is a boolean tensor of x's rank that broadcasts to x: where it is False, elements take no
part in the statistics, y is 0, and x and residual get no gradient, whatever they hold (NaN
included). An empty pool gives zeros, a pool of one value gives the bias.

`weight` and `bias` are one value a channel, (C,), or given for each sample: (N, C), or x's rank and
broadcasting to x (conditional: AdaIN, arXiv 1703.06868; FiLM, arXiv 1709.07871). Over the last axes
(C,) reads normalized_shape, and (N, C) (N, *normalized_shape), the same at all positions (AdaLN).

`act` is None, "relu", "leaky_relu" (slope 0.01), "silu" or "gelu" (exact).

Tensor subclasses get each call through their `__torch_function__`, as with torch's own norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.utils._expanded_weights.expanded_weights_impl import implements_per_sample_grads
from torch.overrides import has_torch_function_variadic

from normkit.backend import aten
from normkit.backend.protocol import Normalized
from normkit.common.errors import InputError
from normkit.formula.affine import NO_AFFINE, Affine
from normkit.formula.checks import (
    check_batch,
    check_batch_statistics,
    check_ghost_size,
    check_groups,
    check_input,
    check_like,
    check_limits,
    check_mask,
    check_normalized_shape,
    check_positive_eps,
    check_running,
)
from normkit.formula.pool import BATCH, CHANNELS, INSTANCE, Pool, ghost, group, last
from normkit.formula.spec import Inputs, Spec, check_momentum, compute_dtype
from normkit.runtime import autograd, recompute, state, statistics
from normkit.runtime.eager import calls
from normkit.runtime.overrides import PerSample, overridden
from normkit.runtime.statistics import Moments, Running
from normkit.runtime.sync import Merge, RankError, Settings

_AUTOCAST_TO_FLOAT32 = ("layer_norm", "rms_norm", "group_norm")
"""What torch's autocast runs in float32, on CUDA alone; its other norms keep the input's dtype."""


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    ghost_size: int | None = None,
    pending: tuple[Tensor, ...] | None = None,
    micro_batches: int = 1,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    act: str | None = None,
    ranks: tuple[int, ...] | None = None,
    merge: Merge | None = None,
) -> Tensor:
    """Batch normalization: each channel of (N, C, *) by its mean and variance over N and *.

    y = act((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    With `training` the statistics are the batch's (biased variance), and the running ones, where
    given, move in place: running <- (1 - momentum) * running + momentum * batch (unbiased
    variance), `num_batches_tracked` counts up by one, and `momentum=None` averages all batches
    alike by it. Otherwise the running ones are used.

    Args:
        input: (N, C, *), floating point.
        running_mean, running_var: (C,) each; in evaluation y is differentiable by them.
        weight, bias: (C,) each, or per sample.
        ghost_size: with `training`, split the samples in their order into ceil(N / ghost_size)
            ghost batches, whose sizes differ by at most one, and normalize each by its own
            statistics; the running ones move by those of the whole batch.
        pending, micro_batches: (count, mean, variance), (C,) each, and a counter, zero at first:
            the running statistics move at every micro_batches-th call, by those of the batch that
            the calls since the last move form together.
        residual: input's shape, dtype and device; added before `act`.
        ranks: the ranks that input may have; None for any.
        merge: with `training`, the processes whose batches count as one. Of ghost batches, which
            stay within a process, only the running statistics are those of all. Layers tell the
            other processes of an error in one; this function leaves them waiting.

    Raises:
        RankError: processes that differ in channels, dtype or settings, or one that doesn't come.
        ValueError: a wrong shape; in training, one value per channel (or per channel of a ghost
            batch), or running statistics that are differentiated; eps or momentum out of range;
            unknown act; a ghost_size below 1; no running statistics in evaluation.
        TypeError: integer or complex input; a mask that isn't boolean; a residual of another dtype.

    Source: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithms 1 and 2; ghost batches: Hoffer,
    Hubara & Soudry 2017 (arXiv 1705.08741), Algorithm 1, with a whole batch's running statistics.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, mask, residual):
        return overridden(batch_norm, locals())
    if not is_compiling():
        taken = calls.batch_norm(
            *(input, running_mean, running_var, weight, bias, training, momentum, eps),
            *(num_batches_tracked, ghost_size, pending, mask, residual, act, ranks, merge),
        )
        if taken is not NotImplemented:
            return taken
    check_batch(input, running_mean, running_var, momentum, ranks, moving=training)
    affine = Affine.of(BATCH, input, (input.shape[1],), weight, bias)
    if not training:
        return _by_running(
            *(input, running_mean, running_var, affine, eps, act), mask=mask, residual=residual
        )
    merge = _of_several(merge)
    ghosts = [(1, input.shape[0])] if ghost_size is None else _ghosts(input.shape[0], ghost_size)
    plain = ghost_size is None and merge is None and mask is None and pending is None
    if plain and momentum is not None and aten.exporting():
        check_batch_statistics(input, eps, mask, ghosts)
        spec = Spec(BATCH, eps, True, act, conditional=affine.conditional)
        inputs = Inputs(input, affine.weight, affine.bias, residual)
        _check_elements(input, mask, residual)
        if num_batches_tracked is not None:
            state.write(num_batches_tracked, state.read(num_batches_tracked) + 1)
        return aten.by_batch(spec, inputs, running_mean, running_var, momentum)
    if ghost_size is None and merge is not None:
        batch = _merged(merge, "batch", input, eps, mask, residual, momentum)
        y = _by_merged(merge, batch, input, affine, eps, act, mask, residual)
    elif ghost_size is None:
        check_batch_statistics(input, eps, mask, ghosts)
        y, batch = _by_batch(BATCH, input, affine, eps, act, mask, residual)
    else:
        check_batch_statistics(input, eps, mask, ghosts)
        y, batch = _by_ghosts(ghosts, input, affine, eps, act, mask, residual)
        if merge is not None and running_mean is not None:
            own = torch.stack([moment.double() for moment in batch.spread()])
            settings = _settings("ghost", input, eps, momentum)
            batch = recompute.remember(
                lambda: merge.moments(own, settings, whole=mask is None), moves=False
            )
    if running_mean is not None and running_var is not None:
        running = Running(
            *(running_mean, running_var, num_batches_tracked, momentum),
            pending=pending,
            micro_batches=micro_batches,
        )
        statistics.track(running, batch, mask is not None or merge is not None)
    elif num_batches_tracked is not None and not recompute.recomputing():
        state.write(num_batches_tracked, state.read(num_batches_tracked) + 1)
    return y


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.01,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor,
    r_max: float = 3.0,
    d_max: float = 5.0,
    r_steps: tuple[int, int] = (5_000, 40_000),
    d_steps: tuple[int, int] = (5_000, 25_000),
    pending: tuple[Tensor, ...] | None = None,
    micro_batches: int = 1,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    act: str | None = None,
    ranks: tuple[int, ...] | None = None,
    merge: Merge | None = None,
) -> Tensor:
    """Batch renormalization: batch normalization corrected towards the running averages.

    y = act(((x - mean) / σ * r + d) * weight + bias + residual), σ = sqrt(variance + eps)

    With `training`, r = σ / running σ clipped to [1 / r_max, r_max] and d = (mean - running mean) /
    running σ clipped to [-d_max, d_max]; no gradient passes through either. Then the running
    averages move as those of `batch_norm`, but all variances are biased, the running one too: where
    no limit binds, y is what evaluation gives. The limits open linearly, r_max from 1 and d_max
    from 0, while num_batches_tracked goes from the first to the second of their `steps`.

    Args:
        num_batches_tracked: the number of training steps so far, that places the limits.
        r_max, d_max: the limits once open; r_max >= 1, d_max >= 0.
        r_steps, d_steps: (first, last) step of the opening.
        merge: the processes whose batches count as one.
        The rest: as `batch_norm`'s.

    Raises:
        ValueError: limits or steps out of order. The rest: as `batch_norm`.

    Source: Ioffe 2017 (arXiv 1702.03275), Algorithm 1, limits and momentum of section 4.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, mask, residual):
        return overridden(batch_renorm, locals())
    check_limits(r_max, d_max, r_steps, d_steps)
    check_batch(input, running_mean, running_var, momentum, ranks, moving=training)
    affine = Affine.of(BATCH, input, (input.shape[1],), weight, bias)
    if not training:
        return _by_running(
            *(input, running_mean, running_var, affine, eps, act), mask=mask, residual=residual
        )
    merge, merged = _of_several(merge), None
    if merge is None:
        check_batch_statistics(input, eps, mask, [(1, input.shape[0])])
    else:
        merged = _merged(merge, "renorm", input, eps, mask, residual, momentum)

    def correction() -> tuple[Tensor, Tensor]:
        if merged is None:
            seen = _by_batch(BATCH, input.detach(), NO_AFFINE, eps, None, mask, None)[1]
        else:
            seen = Moments(merged.n, merged.mean.detach(), merged.var.detach())
        mean, var = statistics.given(running_mean, running_var)
        rstd = (var.to(seen.var.dtype) + eps).rsqrt()
        r = ((seen.var + eps).sqrt() * rstd).to(compute_dtype(input.dtype))
        d = ((seen.mean - mean) * rstd).to(r.dtype)
        step = state.read(num_batches_tracked).to(r.dtype)
        r_limit = 1 + (r_max - 1) * _opened(step, r_steps)
        d_limit = d_max * _opened(step, d_steps)
        return r.clamp(1 / r_limit, r_limit), d.clamp(-d_limit, d_limit)

    r, d = recompute.remember(correction, moves=True)
    corrected = affine.after(r, d, input.dim())
    if merge is None or merged is None:
        y, batch = _by_batch(BATCH, input, corrected, eps, act, mask, residual)
    else:
        batch = merged
        y = _by_merged(merge, batch, input, corrected, eps, act, mask, residual)
    running = Running(
        *(running_mean, running_var, num_batches_tracked, momentum),
        biased=True,
        pending=pending,
        micro_batches=micro_batches,
    )
    statistics.track(running, batch, mask is not None or merge is not None)
    return y


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    act: str | None = None,
    ranks: tuple[int, int] | None = None,
    num_features: int | None = None,
) -> Tensor:
    """Instance normalization: each channel of each sample of (N, C, *) by itself.

    y = act((x - mean) / sqrt(variance + eps) * weight + bias + residual), statistics over *

    With `use_input_stats` they are the input's, and running ones, where given, move towards their
    average over the samples; otherwise the running ones are used. Arguments and errors as those of
    `batch_norm`; one position per channel with input statistics is a ValueError. With `ranks`
    (unbatched, batched) an input of the first rank is one sample without its batch axis.

    Source: Ulyanov, Vedaldi & Lempitsky 2016 (arXiv 1607.08022).
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias, mask, residual):
        return overridden(instance_norm, locals())
    if not is_compiling():
        taken = calls.instance_norm(
            *(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps),
            *(mask, residual, act, ranks, num_features),
        )
        if taken is not NotImplemented:
            return taken
    check_input(input, 2 if ranks else 3, "(N, C, *) with at least one position axis", ranks)
    if ranks and input.dim() == ranks[0]:
        y = instance_norm(
            input.unsqueeze(0),
            running_mean,
            running_var,
            weight if weight is None or weight.dim() == 1 else weight.unsqueeze(0),
            bias if bias is None or bias.dim() == 1 else bias.unsqueeze(0),
            use_input_stats,
            momentum,
            eps,
            mask=_unsqueezed(mask),
            residual=_unsqueezed(residual),
            act=act,
            num_features=num_features,
        )
        return _laid_out_like(y.squeeze(0), input)
    if num_features is not None and input.shape[1] != num_features:
        raise InputError(
            f"expected {num_features} channels, got {input.shape[1]} in input of shape "
            f"{tuple(input.shape)}"
        )
    check_running(input, running_mean, running_var, moving=use_input_stats)
    check_momentum(momentum)
    affine = Affine.of(INSTANCE, input, (input.shape[1],), weight, bias)
    if not use_input_stats:
        return _by_running(
            *(input, running_mean, running_var, affine, eps, act), mask=mask, residual=residual
        )
    if math.prod(input.shape[2:]) == 1 and mask is None:
        raise InputError(
            "Expected more than 1 spatial element when training, got 1 position per channel in "
            f"input of shape {tuple(input.shape)}, whose variance is 0; use larger inputs or "
            "another norm"
        )
    spec = Spec(INSTANCE, eps, True, act, conditional=affine.conditional)
    inputs = Inputs(input, affine.weight, affine.bias, residual, mask)
    if running_mean is None or running_var is None:
        return _normalize(spec, inputs).y
    outputs = _normalize(spec, inputs, tracked=True)
    batch = statistics.moments(INSTANCE, input, mask, outputs)
    running = Running(running_mean, running_var, None, momentum)
    statistics.track(running, batch, mask is not None)
    return outputs.y


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """Group normalization: each group of channels of each sample of (N, C, *) by itself.

    y = act((x - mean) / sqrt(variance + eps) * weight + bias + residual), statistics over C / G
    channels and *, the same in training and evaluation. weight and bias are (C,), or per sample.
    Errors as those of `batch_norm`; groups that don't divide C are a ValueError.

    Source: Wu & He 2018 (arXiv 1803.08494), equation 7.
    """
    if has_torch_function_variadic(input, weight, bias, mask, residual):
        return overridden(group_norm, locals())
    if not is_compiling():
        taken = calls.group_norm(input, num_groups, weight, bias, eps, mask, residual, act)
        if taken is not NotImplemented:
            return taken
    check_input(input, 2, "(N, C, *)")
    channels = input.shape[1]
    num_groups = check_groups(num_groups, channels)
    affine = Affine.of(group(num_groups), input, (channels,), weight, bias)
    if math.prod(input.shape) == num_groups and mask is None:
        raise InputError(
            "Expected more than 1 value per channel when training, got input size "
            f"{tuple(input.shape)} in {num_groups} groups: 1 value per group, whose variance is 0; "
            "use fewer groups"
        )
    if residual is not None:
        check_like("residual", residual, input)
        residual = _autocast("group_norm", residual)
    input = _autocast("group_norm", input)
    spec = Spec(group(num_groups), eps, True, act, conditional=affine.conditional)
    return _normalize(spec, Inputs(input, affine.weight, affine.bias, residual, mask)).y


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    channels_first: bool = False,
    cast_before_affine: bool = False,
    memory_format: torch.memory_format | None = None,
    mask: Tensor | None = None,
    add: Tensor | None = None,
    act: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalization over the last axes, or over the channel axis of (N, C, *).

    y = act((x - mean) / sqrt(variance + eps) * weight + bias), x = input [+ add]

    The same in training and evaluation.

    Args:
        input: (*, normalized_shape), or (N, C, *) with `channels_first`. A nested tensor, jagged or
            strided, has each of its rows normalized, without a mask and per-sample parameters.
        normalized_shape: the sizes of the normalized axes; (C,) with `channels_first`.
        weight, bias: normalized_shape each, or per sample.
        cast_before_affine: round to the input's dtype before weight and again before bias, which
            then promote it by torch's rules: Llama's and DeBERTa's order in half precision. In
            float32 and float64 it changes nothing.
        memory_format: y's, where it isn't as torch's layer gives it (contiguous over the last axes,
            input's over the channels): `torch.preserve_format` for input's strides, as norms of
            elementwise operators give them, or `torch.channels_last`, where input has four axes.
        add: input's shape, dtype and device; added before the norm, and the sum is returned too.

    Returns:
        y, or (y, input + add) where `add` is given.

    Raises:
        ValueError, TypeError: as `batch_norm`; an input that doesn't end in normalized_shape; `act`
            together with `cast_before_affine`.

    Source: Ba, Kiros & Hinton 2016 (arXiv 1607.06450), equation 4; over the channels: Liu et al.
    2022 (arXiv 2201.03545).
    """
    if has_torch_function_variadic(input, weight, bias, mask, add) or (
        isinstance(input, Tensor) and input.is_nested
    ):
        return overridden(layer_norm, locals())
    if not (is_compiling() or cast_before_affine or memory_format):
        taken = calls.layer_norm(
            *(input, normalized_shape, weight, bias, eps, channels_first, mask, add, act)
        )
        if taken is not NotImplemented:
            return taken
    return _row_norm(
        "layer_norm",
        input,
        normalized_shape,
        weight,
        bias,
        eps,
        channels_first,
        cast_before_affine,
        memory_format,
        mask,
        add,
        act,
    )


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    zero_centered_weight: bool = False,
    channels_first: bool = False,
    cast_before_affine: bool = False,
    memory_format: torch.memory_format | None = None,
    mask: Tensor | None = None,
    add: Tensor | None = None,
    act: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS normalization: as `layer_norm`, the mean not subtracted.

    y = act(x / sqrt(<x²> + eps) * weight + bias), x = input [+ add]

    `eps=None` is the machine epsilon of the dtype it is computed in, as in torch: float64's for
    float64, float32's for all others. With `zero_centered_weight` the factor is 1 + weight, added
    in the compute dtype, or with `cast_before_affine` in weight's. The rest is as in `layer_norm`.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4; 1 + weight: as in Gemma (arXiv
    2403.08295) and its reference implementation.
    """
    if has_torch_function_variadic(input, weight, bias, mask, add) or (
        isinstance(input, Tensor) and input.is_nested
    ):
        return overridden(rms_norm, locals())
    if not (is_compiling() or cast_before_affine or memory_format):
        taken = calls.rms_norm(
            *(input, normalized_shape, weight, eps, bias, zero_centered_weight, channels_first),
            *(mask, add, act),
        )
        if taken is not NotImplemented:
            return taken
    if zero_centered_weight and weight is not None:
        weight = 1 + (weight if cast_before_affine else weight.to(compute_dtype(weight.dtype)))
    if eps is None:
        check_input(input, 1, "any")
        eps = torch.finfo(compute_dtype(input.dtype)).eps
    return _row_norm(
        "rms_norm",
        input,
        normalized_shape,
        weight,
        bias,
        eps,
        channels_first,
        cast_before_affine,
        memory_format,
        mask,
        add,
        act,
    )


for _name in (
    "batch_norm",
    "batch_renorm",
    "instance_norm",
    "group_norm",
    "layer_norm",
    "rms_norm",
):
    torch.fx.wrap(_name)

for _function in (instance_norm, group_norm, layer_norm, rms_norm):
    implements_per_sample_grads(_function)(PerSample)


def _row_norm(
    name: str,
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channels_first: bool,
    cast_before_affine: bool,
    memory_format: torch.memory_format | None,
    mask: Tensor | None,
    add: Tensor | None,
    act: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    shape = check_normalized_shape(normalized_shape, channels_first)
    check_input(input, 2 if channels_first else 1, "(N, C, *)" if channels_first else "any")
    if channels_first:
        met: tuple[int, ...] = (input.shape[1],)
        pool = CHANNELS
    else:
        met = tuple(input.shape[-len(shape) :])
        pool = last(len(shape))
    if met != shape:
        raise InputError(
            f"expected input with {'C = ' if channels_first else 'last sizes '}"
            f"{shape[0] if channels_first else shape}, got input of shape {tuple(input.shape)}"
        )
    if memory_format is torch.channels_last and input.dim() == 4:
        input = input.contiguous(memory_format=memory_format)
    affine, after = Affine.of(pool, input, shape, weight, bias), NO_AFFINE
    if cast_before_affine and act is not None:
        raise ValueError(
            f"cast_before_affine rounds before weight and bias, and act={act!r} is computed before "
            "anything is rounded; leave one of them out"
        )
    if cast_before_affine and compute_dtype(input.dtype) != input.dtype:
        affine, after = NO_AFFINE, affine.full_rank(pool, input)
    if add is not None:
        check_like("add", add, input)
    spec = Spec(pool, eps, name == "layer_norm", act, conditional=affine.conditional)
    wide = input if cast_before_affine else _autocast(name, input)
    total: Tensor | None
    if add is not None and wide is not input:
        total = input + add
        inputs = Inputs(_autocast(name, total), affine.weight, affine.bias, None, mask)
        y = _normalize(spec, inputs).y
    else:
        inputs = Inputs(wide, affine.weight, affine.bias, None, mask, add)
        y, *_, total = _normalize(spec, inputs)
    y = _laid_out_like(after.applied(y, mask), input)
    if memory_format is torch.preserve_format and y.stride() != input.stride():
        y = torch.empty_like(input, dtype=y.dtype).copy_(y)
    return y if total is None else (y, _laid_out_like(total, input))


def _ghosts(samples: int, size: int) -> list[tuple[int, int]]:
    """ceil(samples / size) ghost batches, sizes differing by at most one: (how many, of what size).

    The larger ones come first.
    """
    size = check_ghost_size(size)
    ghosts = max(1, -(-samples // size))
    smaller, larger = samples // ghosts, samples % ghosts
    return [(n, k) for n, k in ((larger, smaller + 1), (ghosts - larger, smaller)) if n]


def _by_ghosts(
    ghosts: list[tuple[int, int]],
    x: Tensor,
    affine: Affine,
    eps: float,
    act: str | None,
    mask: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Moments]:
    """y by each ghost batch's statistics, and the whole batch's moments."""
    _check_elements(x, mask, residual)
    samples = [how_many * size for how_many, size in ghosts]

    def blocks(tensor: Tensor | None) -> Sequence[Tensor | None]:
        if tensor is None or tensor.dim() < x.dim() or tensor.shape[0] != x.shape[0]:
            return [tensor] * len(samples)
        return tensor.split(samples) if len(samples) > 1 else [tensor]

    ys, moments = [], []
    tensors = (x, affine.weight, affine.bias, mask, residual)
    for (how_many, _), (block, weight, bias, *rest) in zip(
        ghosts, zip(*map(blocks, tensors), strict=True), strict=True
    ):
        pool = ghost(how_many) if how_many > 1 else BATCH
        own = affine._replace(weight=weight, bias=bias)
        y, batch = _by_batch(pool, block, own, eps, act, *rest)
        ys.append(y)
        moments.append([moment.reshape(how_many, -1) for moment in batch.spread()])
    whole = statistics.pooled(Moments(*map(torch.cat, zip(*moments, strict=True))))
    return ys[0] if len(ys) == 1 else torch.cat(ys), whole


def _check_elements(x: Tensor, mask: Tensor | None, residual: Tensor | None) -> None:
    if residual is not None:
        check_like("residual", residual, x)
    if mask is not None:
        check_mask(mask, x)


def _by_batch(
    pool: Pool,
    x: Tensor,
    affine: Affine,
    eps: float,
    act: str | None,
    mask: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Moments]:
    """y by the input's own statistics, and these."""
    spec = Spec(pool, eps, True, act, conditional=affine.conditional)
    inputs = Inputs(x, affine.weight, affine.bias, residual, mask)
    outputs = _normalize(spec, inputs, tracked=True)
    return outputs.y, statistics.moments(pool, x, mask, outputs)


def _of_several(merge: Merge | None) -> Merge | None:
    """The merge, or None where it has one rank."""
    return None if merge is None or merge.ranks() == 1 else merge


def _merged(
    merge: Merge,
    norm: str,
    x: Tensor,
    eps: float,
    mask: Tensor | None,
    residual: Tensor | None,
    momentum: float | None,
) -> Moments:
    """The moments of all ranks' batches together; what could fail later is checked before."""
    _check_elements(x, mask, residual)
    check_positive_eps(eps)
    spec = Spec(BATCH, eps, given=True)
    settings = _settings(norm, x, eps, momentum)
    batch = autograd.moments(spec, Inputs(x, mask=mask), merge, settings)
    if isinstance(batch.n, int) and batch.n == 1:
        raise RankError(
            "Expected more than 1 value per channel when training, got 1 on all ranks together, "
            "whose variance is 0; use a larger batch, .eval(), or a norm that needs no batch "
            "(GroupNorm, LayerNorm)"
        )
    return batch


def _settings(norm: str, x: Tensor, eps: float, momentum: float | None) -> Settings:
    gradient = torch.is_grad_enabled() and x.requires_grad
    return Settings(x.shape[1], x.dtype, norm, eps, momentum, gradient)


def _by_merged(
    merge: Merge,
    batch: Moments,
    x: Tensor,
    affine: Affine,
    eps: float,
    act: str | None,
    mask: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """y by the moments of all ranks' batches together."""
    spec = Spec(BATCH, eps, True, act, given=True, conditional=affine.conditional)
    inputs = Inputs(x, affine.weight, affine.bias, residual, mask, None, batch.mean, batch.var)
    return autograd.normalize_merged(spec, inputs, merge, batch.n)


def _by_running(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    affine: Affine,
    eps: float,
    act: str | None,
    *,
    mask: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """y by the running statistics, as they were in the forward."""
    if running_mean is None or running_var is None:
        raise InputError(
            "evaluation needs running_mean and running_var; pass them, or have the input's own "
            "statistics used (training=True of batch_norm, use_input_stats=True of instance_norm)"
        )
    spec = Spec(BATCH, eps, True, act, given=True, conditional=affine.conditional)
    if aten.exporting() and mask is None:
        inputs = Inputs(input, affine.weight, affine.bias, residual)
        return aten.by_running(spec, inputs, running_mean, running_var)
    mean, var = state.read(running_mean), state.read(running_var)
    constant = not (mean.requires_grad or var.requires_grad)
    if constant and not (autograd.plain() and recompute.idle()):
        mean, var = recompute.remember(
            lambda: statistics.given(running_mean, running_var), moves=False
        )
    inputs = Inputs(input, affine.weight, affine.bias, residual, mask, None, mean, var)
    return _normalize(spec, inputs).y


def _opened(step: Tensor, steps: tuple[int, int]) -> Tensor:
    """How far limits are open, 0 to 1: linear between the first and the last of the steps."""
    first, last = steps
    return torch.where(step >= last, 1.0, (step - first) / max(last - first, 1)).clamp(0, 1)


def _normalize(spec: Spec, inputs: Inputs, tracked: bool = False) -> Normalized:
    _check_elements(inputs.x, inputs.mask, inputs.residual)
    return autograd.normalize(spec, inputs, tracked)


def _laid_out_like(y: Tensor, x: Tensor) -> Tensor:
    """y in x's memory format, where kernels know only that it isn't contiguous.

    Under transforms a tensor doesn't say its format.
    """
    return y if x.is_contiguous() or not autograd.plain() else autograd.laid_out_like(y, x)


def _unsqueezed(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(0)


def _autocast(name: str, x: Tensor) -> Tensor:
    if x.is_cuda and name in _AUTOCAST_TO_FLOAT32 and torch.is_autocast_enabled("cuda"):
        return x.to(compute_dtype(x.dtype))
    return x
