"""Buffers that move: in place, or functionally inside `functional_call`."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from normkit.common.errors import InputError

_written: ContextVar[dict[int, Tensor] | None] = ContextVar("_written", default=None)


def read(buffer: Tensor) -> Tensor:
    """The buffer's value: its own, or the one written to it inside this `functional_call`."""
    if torch.compiler.is_compiling():
        return buffer
    written = _written.get()
    return buffer if written is None else written.get(id(buffer), buffer)


def write(buffer: Tensor, value: Tensor) -> None:
    """Give the buffer a value: in place, or for `functional_call` to return.

    Raises:
        InputError: a transform of torch.func that doesn't let the buffer be written in place.
    """
    if torch.compiler.is_compiling():
        buffer.copy_(value)
    elif (written := _written.get()) is not None:
        written[id(buffer)] = value.to(buffer.dtype)
    elif torch._C._functorch.peek_interpreter_stack() is None:
        buffer.copy_(value)
    else:
        try:
            buffer.copy_(value)
        except RuntimeError as error:
            raise InputError(
                "in training it moves buffers, and a transform of torch.func may not write what "
                "it captures; call the model by normkit.functional_call, which returns them, or "
                "put it in evaluation"
            ) from error


def in_place() -> bool:
    """Whether buffers are written in place, and not inside `functional_call`."""
    return _written.get() is None


def functional_call(
    module: nn.Module,
    parameters_and_buffers: Mapping[str, Tensor] | tuple[Mapping[str, Tensor], ...],
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """`torch.func.functional_call` that returns the moved buffers instead of writing them.

    A transform of torch.func may not write a captured buffer; here normkit's layers in training
    write none. The values can be batched (`vmap`) and pass out of `grad` by `has_aux=True`:

        def loss(parameters, buffers, x, target):
            y, buffers = normkit.functional_call(model, (parameters, buffers), (x,))
            return cross_entropy(y, target), buffers

    Args:
        module, parameters_and_buffers, args, kwargs: those of `torch.func.functional_call`.

    Returns:
        (output, buffers): all buffers of the module by name, those that moved with new values.

    Raises:
        RuntimeError: under torch.compile, which can't trace it; compile the model in it instead.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "normkit.functional_call can't be traced by torch.compile; compile a plain training "
            "step, in which torch.compile itself makes the writes functional"
        )
    given = parameters_and_buffers
    dicts = given if isinstance(given, tuple) else (given,)
    buffers = dict(module.named_buffers(remove_duplicate=False))
    for tensors in dicts:
        buffers |= {name: tensor for name, tensor in tensors.items() if name in buffers}
    token = _written.set({})
    try:
        output = torch.func.functional_call(module, given, args, kwargs)  # type: ignore[arg-type]
        return output, {name: read(buffer) for name, buffer in buffers.items()}
    finally:
        _written.reset(token)
