"""Calls that aren't on plain tensors: subclasses with rules of their own, nested tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils._expanded_weights import expanded_weights_utils
from torch.nn.utils._expanded_weights.expanded_weights_impl import ExpandedWeight
from torch.overrides import handle_torch_function

from normkit.formula.checks import NESTED, check_normalized_shape


def overridden(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """`function(**arguments)` by `__torch_function__`, as that of torch's own norms.

    Nested tensors come here too. Jagged ones go no further, since their `__torch_function__` knows
    functions by their names, and would take ours for torch's.
    """
    with torch._C.DisableTorchFunctionSubclass():
        tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
        nested = [name for name, tensor in tensors.items() if tensor.is_nested]
    if "input" in nested:
        return _by_rows(function, **arguments)
    if nested:
        raise TypeError(f"{nested[0]} must be a dense tensor as the input is, got a nested one")
    plain = inspect.unwrap(function)  # torch.fx wraps it while it traces
    input = arguments.pop("input")
    return handle_torch_function(plain, (input, *arguments.values()), input, **arguments)


def _by_rows(
    norm: Callable[..., Any],
    input: Tensor,
    normalized_shape: int | Sequence[int] | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    add: Tensor | None = None,
    channels_first: bool = False,
    **settings: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """A norm over the last axes of a nested tensor, all its rows in one dense call."""
    if normalized_shape is None or channels_first:
        raise TypeError(NESTED)
    shape = check_normalized_shape(normalized_shape, channels_first)
    if mask is not None:
        raise ValueError("a nested tensor takes no mask; its samples have the length they have")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != shape:
            raise ValueError(
                f"a nested tensor takes one {name} for all samples, of shape {shape}, got "
                f"{tuple(parameter.shape)}"
            )
    total = input if add is None else input + add
    if total.layout == torch.jagged:
        y = _of_jagged(norm, total, shape, weight=weight, bias=bias, **settings)
    else:
        y = _of_strided(norm, total, shape, weight=weight, bias=bias, **settings)
    return y if add is None else (y, total)


def _of_jagged(norm: Callable[..., Any], x: Any, shape: tuple[int, ...], **settings: Any) -> Tensor:
    if x._ragged_idx >= x.dim() - len(shape):
        raise ValueError(
            f"expected a nested input with last sizes {shape}, none of them ragged, got shape "
            f"{tuple(x.shape)}"
        )
    ragged, values = x._ragged_idx, x.values()
    if x.lengths() is not None:
        held = _held(x).reshape(-1, *[1] * (values.dim() - ragged))
        settings["mask"] = held.expand(*values.shape[: ragged - 1], *held.shape)
    return torch.nested.nested_tensor_from_jagged(
        norm(values, shape, **settings), x.offsets(), x.lengths(), jagged_dim=ragged
    )


def _held(x: Any) -> Tensor:
    """Which of the values along the ragged axis are of a sample; others may lie between samples."""
    starts, lengths = x.offsets()[:-1], x.lengths()
    edges = starts.new_zeros(x.values().shape[x._ragged_idx - 1] + 1)
    edges = edges.scatter_add(0, starts, torch.ones_like(starts))
    edges = edges.scatter_add(0, starts + lengths, -torch.ones_like(starts))
    return edges.cumsum(0)[:-1] > 0


def _of_strided(
    norm: Callable[..., Any], x: Tensor, shape: tuple[int, ...], **settings: Any
) -> Tensor:
    samples = x.unbind()
    if not samples:
        return x
    for sample in samples:
        if tuple(sample.shape[-len(shape) :]) != shape:
            raise ValueError(
                f"expected a nested input with last sizes {shape} in each sample, got one of shape "
                f"{tuple(sample.shape)}"
            )
    rows = [sample.reshape(-1, *shape) for sample in samples]
    ys = norm(torch.cat(rows), shape, **settings).split([len(r) for r in rows])
    return torch.nested.as_nested_tensor(
        [y.reshape(sample.shape) for y, sample in zip(ys, samples, strict=True)]
    )


class PerSample:
    """The gradients of each sample by themselves, as `ExpandedWeight` asks of torch's own norms.

    weight and bias are given for each sample, so that their gradients are those of each.
    """

    @staticmethod
    def apply(names: tuple[str, ...], norm: Callable[..., Any], *values: Any) -> Any:
        """`norm` of the arguments, of which the last ones go by these names."""
        args, kwargs = expanded_weights_utils.standard_kwargs(names, values)
        expanded_weights_utils._check_and_unexpand_args(norm, args, kwargs)
        samples = args[0].shape[0]
        if (shape := kwargs.get("normalized_shape")) is not None and len(shape) == args[0].dim():
            raise ValueError(f"expected an input of several samples, got one of {tuple(shape)}")
        return norm(
            *args,
            **{
                name: _OfEachSample.apply(value, samples)
                if isinstance(value, ExpandedWeight)
                else value
                for name, value in kwargs.items()
            },
        )


class _OfEachSample(torch.autograd.Function):
    """A parameter once for each sample; the gradients go to its `grad_sample`."""

    @staticmethod
    def forward(ctx: Any, parameter: Any, samples: int) -> Tensor:
        ctx.parameter = parameter
        own = parameter.orig_weight.detach()
        return own.expand(samples, *own.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        expanded_weights_utils.set_grad_sample_if_exists(ctx.parameter, lambda _: gradient)
        return None, None
