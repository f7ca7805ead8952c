"""Every feature normalization as a function.

All of them are y = act((x - mean) * rstd * weight + bias [+ residual]), rstd = (variance +
eps)^(-1/2), and differ in which elements share a mean and a variance (`normkit.pool.Pool`) and in
where these come from. Statistics are computed in at least float32; y has x's dtype and layout.

`mask` is a boolean tensor of x's rank that broadcasts to x: where it is False, elements take no
part in the statistics, y is 0, and x and residual get no gradient, whatever they hold (NaN
included). An empty pool gives zeros, a pool of one value gives the bias.

`act` is None, "relu", "leaky_relu" (slope 0.01), "silu" or "gelu" (exact).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F

from . import autograd, statistics
from .backend import aten
from .pool import BATCH, CHANNELS, INSTANCE, group, last
from .spec import Inputs, Spec, check_momentum, compute_dtype

_AUTOCAST_TO_FLOAT32 = {"cuda": ("layer_norm", "rms_norm", "group_norm")}
"""What torch's autocast runs in float32, by device; its other norms keep the input's dtype."""


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
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    act: str | None = None,
    ranks: tuple[int, ...] | None = None,
) -> Tensor:
    """Batch normalization: each channel of (N, C, *) by its mean and variance over N and *.

    y = act((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    With `training` the statistics are the batch's (biased variance), and the running ones, where
    given, move in place: running <- (1 - momentum) * running + momentum * batch (unbiased
    variance), `num_batches_tracked` counts up by one, and `momentum=None` averages all batches
    alike by it. Otherwise the running ones are used.

    Args:
        input: (N, C, *), floating point.
        running_mean, running_var, weight, bias: (C,) each.
        residual: input's shape, dtype and device; added before `act`.
        ranks: the ranks that input may have; None for any.

    Raises:
        ValueError: a wrong shape; in training, one value per channel; eps or momentum out of range;
            unknown act; no running statistics in evaluation.
        TypeError: integer or complex input; a mask that isn't boolean; a residual of another dtype.

    Source: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithms 1 and 2.
    """
    _check_input(input, 2, "(N, C, *)", ranks)
    _check_channels(
        input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    check_momentum(momentum)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together: give both or neither")
    if training:
        count = input.shape[0] * math.prod(input.shape[2:])
        if count == 1 and mask is None:
            raise ValueError(
                "expected more than 1 value per channel when training, got input of shape "
                f"{tuple(input.shape)}, whose variance is 0; use a larger batch (DataLoader("
                "drop_last=True) drops a last batch of one), .eval(), or a norm that needs no "
                "batch (GroupNorm, LayerNorm)"
            )
        if eps == 0:
            raise ValueError("eps must be positive when training, got 0; torch's default is 1e-5")
        spec = Spec(BATCH, eps, True, act)
        y, mean, _, var = _normalize(spec, Inputs(input, weight, bias, residual, mask))
        if running_mean is None and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if running_mean is not None and running_var is not None:
            statistics.track(
                BATCH,
                input,
                mask,
                mean,
                var,
                running_mean,
                running_var,
                num_batches_tracked,
                momentum,
            )
        return y
    if running_mean is None or running_var is None:
        raise ValueError(
            "evaluation needs running_mean and running_var; pass them, or training=True to use the "
            "batch's own statistics"
        )
    return _by_running(
        input, running_mean, running_var, weight, bias, eps, act, mask=mask, residual=residual
    )


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
    _check_input(input, 2 if ranks else 3, "(N, C, *) with at least one position axis", ranks)
    if ranks and input.dim() == ranks[0]:
        return instance_norm(
            input.unsqueeze(0),
            *(running_mean, running_var, weight, bias, use_input_stats, momentum, eps),
            mask=None if mask is None else mask.unsqueeze(0),
            residual=None if residual is None else residual.unsqueeze(0),
            act=act,
            num_features=num_features,
        ).squeeze(0)
    if num_features is not None and input.shape[1] != num_features:
        raise ValueError(
            f"expected {num_features} channels, got {input.shape[1]} in input of shape "
            f"{tuple(input.shape)}"
        )
    _check_channels(
        input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    check_momentum(momentum)
    if not use_input_stats:
        if running_mean is None or running_var is None:
            raise ValueError("use_input_stats=False needs running_mean and running_var")
        return _by_running(
            input, running_mean, running_var, weight, bias, eps, act, mask=mask, residual=residual
        )
    if math.prod(input.shape[2:]) == 1 and mask is None:
        raise ValueError(
            "expected more than 1 position per channel, got input of shape "
            f"{tuple(input.shape)}, whose variance is 0; use larger inputs or another norm"
        )
    spec = Spec(INSTANCE, eps, True, act)
    inputs = Inputs(input, weight, bias, residual, mask)
    y, mean, _, var = _normalize(spec, inputs, tracked=running_mean is not None)
    if running_mean is not None and running_var is not None:
        statistics.track(
            INSTANCE, input, mask, mean, var, running_mean, running_var, None, momentum
        )
    return y


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
    channels and *, the same in training and evaluation. weight and bias are (C,). Errors as those
    of `batch_norm`; groups that don't divide C are a ValueError.

    Source: Wu & He 2018 (arXiv 1803.08494), equation 7.
    """
    _check_input(input, 2, "(N, C, *)")
    channels = input.shape[1]
    check_groups(num_groups, channels)
    _check_channels(input, weight=weight, bias=bias)
    if math.prod(input.shape) == num_groups and mask is None:
        raise ValueError(
            f"expected more than 1 value per group, got input of shape {tuple(input.shape)} in "
            f"{num_groups} groups; use fewer groups"
        )
    if residual is not None:
        _check_like("residual", residual, input)
        residual = _autocast("group_norm", residual)
    input = _autocast("group_norm", input)
    spec = Spec(group(num_groups), eps, True, act)
    return _normalize(spec, Inputs(input, weight, bias, residual, mask))[0]


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    channels_first: bool = False,
    mask: Tensor | None = None,
    add: Tensor | None = None,
    act: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalization over the last axes, or over the channel axis of (N, C, *).

    y = act((x - mean) / sqrt(variance + eps) * weight + bias), x = input [+ add]

    The same in training and evaluation.

    Args:
        input: (*, normalized_shape), or (N, C, *) with `channels_first`.
        normalized_shape: the sizes of the normalized axes; (C,) with `channels_first`.
        weight, bias: normalized_shape each.
        add: input's shape, dtype and device; added before the norm, and the sum is returned too.

    Returns:
        y, or (y, input + add) where `add` is given.

    Raises:
        ValueError, TypeError: as `batch_norm`; an input that doesn't end in normalized_shape.

    Source: Ba, Kiros & Hinton 2016 (arXiv 1607.06450), equation 4; over the channels: Liu et al.
    2022 (arXiv 2201.03545).
    """
    return _row_norm(
        "layer_norm",
        *(input, normalized_shape, weight, bias, eps),
        *(channels_first, mask, add, act),
    )


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    channels_first: bool = False,
    mask: Tensor | None = None,
    add: Tensor | None = None,
    act: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS normalization: as `layer_norm`, the mean not subtracted, without bias.

    y = act(x / sqrt(<x²> + eps) * weight), x = input [+ add]

    `eps=None` is the machine epsilon of the dtype it is computed in, as in torch: float64's for
    float64, float32's for all others. The rest is as in `layer_norm`.

    Source: Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4.
    """
    if eps is None:
        _check_input(input, 1, "any")
        eps = torch.finfo(compute_dtype(input.dtype)).eps
    return _row_norm(
        "rms_norm",
        *(input, normalized_shape, weight, None, eps),
        *(channels_first, mask, add, act),
    )


for _name in ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"):
    torch.fx.wrap(_name)


def _row_norm(
    name: str,
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    channels_first: bool,
    mask: Tensor | None,
    add: Tensor | None,
    act: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    shape = check_normalized_shape(normalized_shape, channels_first)
    _check_input(input, 2 if channels_first else 1, "(N, C, *)" if channels_first else "any")
    if channels_first:
        met: tuple[int, ...] = (input.shape[1],)
        pool = CHANNELS
    else:
        met = tuple(input.shape[-len(shape) :])
        pool = last(len(shape))
    if met != shape:
        raise ValueError(
            f"expected input with {'C = ' if channels_first else 'last sizes '}"
            f"{shape[0] if channels_first else shape}, got input of shape {tuple(input.shape)}"
        )
    for what, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if tuple(parameter.shape) != shape:
            raise ValueError(f"expected {what} of shape {shape}, got {tuple(parameter.shape)}")
        _check_device(what, parameter, input)
    if add is not None:
        _check_like("add", add, input)
    spec = Spec(pool, eps, name == "layer_norm", act)
    wide = _autocast(name, input)
    if add is not None and wide is not input:
        total = input + add
        y = _normalize(spec, Inputs(_autocast(name, total), weight, bias, None, mask))[0]
        return y, total
    y, _, _, _, *total = _normalize(spec, Inputs(wide, weight, bias, None, mask, add))
    return (y, *total) if total else y


def _by_running(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    *,
    mask: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    spec = Spec(BATCH, eps, True, act, given=True)
    if aten.exporting() and mask is None:
        y = F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
        return aten.epilogue(spec, y, residual)
    inputs = Inputs(input, weight, bias, residual, mask, None, running_mean, running_var)
    return _normalize(spec, inputs)[0]


def _normalize(spec: Spec, inputs: Inputs, tracked: bool = False) -> tuple[Tensor, ...]:
    if inputs.residual is not None:
        _check_like("residual", inputs.residual, inputs.x)
    if inputs.mask is not None:
        _check_mask(inputs.mask, inputs.x)
    return autograd.normalize(spec, inputs, tracked)


def _autocast(name: str, x: Tensor) -> Tensor:
    device = x.device.type
    if name in _AUTOCAST_TO_FLOAT32.get(device, ()) and torch.is_autocast_enabled(device):
        return x.to(compute_dtype(x.dtype))
    return x


def check_groups(groups: int, channels: int) -> None:
    """groups divide channels, or ValueError with those that do."""
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        dividing = [g for g in range(1, min(channels, 64) + 1) if channels % g == 0]
        raise ValueError(
            f"num_channels must be divisible by num_groups, got {channels} channels in {groups} "
            f"groups; {channels} can be split into {', '.join(map(str, dividing))} groups"
        )


def check_normalized_shape(
    normalized_shape: int | Sequence[int], channels_first: bool
) -> tuple[int, ...]:
    """The normalized axes as a tuple: at least one, and with `channels_first` just one."""
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not shape:
        raise ValueError("normalized_shape must name at least one axis, got ()")
    if channels_first and len(shape) != 1:
        raise ValueError(f"channels_first normalizes the one axis C, got {shape}")
    return shape


def _check_input(x: Tensor, rank: int, shape: str, ranks: tuple[int, ...] | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor as input, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(
            f"expected a floating-point input, got {x.dtype}; convert it, as by .float()"
        )
    if ranks and x.dim() not in ranks:
        raise ValueError(
            f"expected {' or '.join(f'{r}D' for r in ranks)} input, got {x.dim()}D of shape "
            f"{tuple(x.shape)}; add or remove axes, or use the layer for {x.dim()}D input"
        )
    if x.dim() < rank:
        raise ValueError(f"expected input {shape}, got shape {tuple(x.shape)}")


def _check_channels(x: Tensor, **parameters: Tensor | None) -> None:
    channels = x.shape[1]
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        if parameter.dim() != 1 or parameter.shape[0] != channels:
            raise ValueError(
                f"input has {channels} channels (axis 1), but {name} has shape "
                f"{tuple(parameter.shape)}; the layer and its input must agree"
            )
        _check_device(name, parameter, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the input on {x.device}; move one to the other by .to()"
        )


def _check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor like the input, got {type(tensor).__name__}")
    for what in ("shape", "dtype", "device"):
        met, expected = getattr(tensor, what), getattr(x, what)
        if met != expected:
            error = TypeError if what == "dtype" else ValueError
            raise error(f"{name} must have the input's {what}, {expected}, got {met}")


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        met = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a boolean tensor (True: take part), got {met}")
    shapes_fit = mask.dim() == x.dim() and all(
        m in (1, n) for m, n in zip(mask.shape, x.shape, strict=True)
    )
    if not shapes_fit:
        raise ValueError(
            f"mask must have the input's rank and broadcast to its shape {tuple(x.shape)}, got "
            f"{tuple(mask.shape)}; a mask of (N, L) for input (N, C, L) is mask[:, None, :]"
        )
    _check_device("mask", mask, x)
