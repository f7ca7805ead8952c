"""Bad input, told from good: each says what holds, what it met, and the remedy."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit.common.errors import InputError, InputTypeError
from normkit.formula.spec import check_momentum

NESTED = (
    "expected a dense tensor, got a nested one, which only LayerNorm and RMSNorm over the last "
    "axes take; pad it, as by to_padded_tensor, and give a mask"
)


def check_size(name: str, size: Any, least: int = 0, what: str | None = None) -> int:
    """size, an integer of any library, as an int of at least `least`, or ValueError."""
    met = _integer(size)
    if met is None or met < least:
        hint = f"; it is {what}" if what else ""
        raise InputError(f"{name} must be an integer >= {least}, got {size!r}{hint}")
    return met


def _integer(value: Any) -> int | None:
    if isinstance(value, int | torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_shape(name: str, shape: Any, least: int = 0) -> tuple[int, ...]:
    """One size or several as a tuple, or ValueError."""
    if isinstance(shape, int):
        sizes: tuple[Any, ...] = (shape,)
    else:
        try:
            sizes = tuple(shape)
        except TypeError:
            sizes = (shape,)
    return tuple([check_size(name, size, least) for size in sizes])


def check_groups(num_groups: int, channels: int) -> int:
    """The number of groups, which divides that of the channels, or ValueError with all that do."""
    groups = _integer(num_groups)
    if groups is None or groups < 1 or channels % groups:
        dividing = [g for g in range(1, min(channels, 64) + 1) if channels % g == 0]
        raise InputError(
            f"num_channels must be divisible by num_groups, got {channels} channels in "
            f"{num_groups} groups; {channels} can be split into "
            f"{', '.join(map(str, dividing))} groups"
        )
    return groups


def check_normalized_shape(
    normalized_shape: int | Sequence[int], channels_first: bool
) -> tuple[int, ...]:
    """The normalized axes as a tuple: at least one, and with `channels_first` just one."""
    shape = check_shape("normalized_shape", normalized_shape)
    if not shape:
        raise InputError("normalized_shape must name at least one axis, got ()")
    if channels_first and len(shape) != 1:
        raise InputError(f"channels_first normalizes the one axis C, got {shape}")
    return shape


def check_input(x: Tensor, rank: int, shape: str, ranks: tuple[int, ...] | None = None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a tensor as input, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(NESTED)
    if not x.is_floating_point():
        raise InputTypeError(
            f"expected a floating-point input, got {x.dtype}; convert it, as by .float()"
        )
    if ranks and x.dim() not in ranks:
        raise InputError(
            f"expected {' or '.join(f'{r}D' for r in ranks)} input (got {x.dim()}D input) of shape "
            f"{tuple(x.shape)}; add or remove axes, or use the layer for {x.dim()}D input"
        )
    if x.dim() < rank:
        raise InputError(f"expected input {shape}, got shape {tuple(x.shape)}")


def check_batch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    ranks: tuple[int, ...] | None,
    *,
    moving: bool,
) -> None:
    check_input(x, 2, "(N, C, *)", ranks)
    check_running(x, running_mean, running_var, moving=moving)
    check_momentum(momentum)


def check_running(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *, moving: bool
) -> None:
    if (running_mean is None) != (running_var is None):
        raise InputError("running_mean and running_var go together: give both or neither")
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if buffer is not None and tuple(buffer.shape) != (x.shape[1],):
            raise InputError(channels_disagree(name, buffer, x))
        if buffer is not None:
            check_floating(name, buffer)
            check_device(name, buffer, x)
            if moving and _is_differentiated(buffer):
                raise ValueError(
                    f"{name} is differentiated, but training moves it in steps that have no "
                    "derivative; detach() it, or use it in evaluation, where it has one"
                )


def _is_differentiated(tensor: Tensor) -> bool:
    """Whether a gradient or, in forward mode, a tangent is asked of it."""
    if tensor.requires_grad:
        return torch.is_grad_enabled()
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def check_batch_statistics(
    x: Tensor, eps: float, mask: Tensor | None, ghosts: list[tuple[int, int]]
) -> None:
    """Each ghost batch has more than one value per channel, and eps keeps a constant one finite."""
    count = ghosts[-1][1] * math.prod(x.shape[2:])
    if count == 1 and mask is None:
        batch = "channel" if x.shape[0] == 1 else "channel of a ghost batch"
        raise InputError(
            f"Expected more than 1 value per {batch} when training, got input size "
            f"{tuple(x.shape)}, whose variance is 0; use a larger batch (DataLoader("
            "drop_last=True) drops a last batch of one) or ghost size, .eval(), or a norm that "
            "needs no batch (GroupNorm, LayerNorm)"
        )
    check_positive_eps(eps)


def check_positive_eps(eps: float) -> None:
    if eps == 0:
        raise ValueError("eps must be positive when training, got 0; torch's default is 1e-5")


def check_ghost_size(size: int) -> int:
    """size as an integer of at least 1, or ValueError."""
    return check_size("ghost_size", size, 1, "the number of samples that share statistics")


def check_limits(
    r_max: float, d_max: float, r_steps: tuple[int, int], d_steps: tuple[int, int]
) -> None:
    """r_max >= 1, d_max >= 0, and steps from a first to a last one, or ValueError."""
    if not r_max >= 1:
        raise ValueError(f"r_max must be >= 1, got {r_max!r}; r is clipped to [1 / r_max, r_max]")
    if not d_max >= 0:
        raise ValueError(f"d_max must be >= 0, got {d_max!r}; d is clipped to [-d_max, d_max]")
    for name, steps in (("r_steps", r_steps), ("d_steps", d_steps)):
        if len(steps) != 2 or not 0 <= steps[0] <= steps[1]:
            raise ValueError(
                f"{name} must be (first, last) with 0 <= first <= last, got {steps!r}; the limit "
                "opens between them"
            )


def channels_disagree(name: str, tensor: Tensor, x: Tensor) -> str:
    return (
        f"input has {x.shape[1]} channels (axis 1), but {name} has shape {tuple(tensor.shape)}; "
        "the layer and its input must agree"
    )


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise InputError(
            f"{name} is on {tensor.device}, the input on {x.device}; move one to the other by .to()"
        )


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        met = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise InputTypeError(f"{name} must be a floating-point tensor, got {met}")


def check_like(name: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor like the input, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor as the input is, got a nested one")
    for what in ("shape", "dtype", "device"):
        met, expected = getattr(tensor, what), getattr(x, what)
        if met != expected:
            error = InputTypeError if what == "dtype" else InputError
            raise error(f"{name} must have the input's {what}, {expected}, got {met}")


def check_mask(mask: Tensor, x: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        met = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a boolean tensor (True: take part), got {met}")
    shapes_fit = mask.dim() == x.dim() and all(
        m in (1, n) for m, n in zip(mask.shape, x.shape, strict=True)
    )
    if not shapes_fit:
        raise InputError(
            f"mask must have the input's rank and broadcast to its shape {tuple(x.shape)}, got "
            f"{tuple(mask.shape)}; a mask of (N, L) is mask[:, None, :] for input (N, C, L), "
            "mask[:, :, None] for (N, L, C)"
        )
    check_device("mask", mask, x)
