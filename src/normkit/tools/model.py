"""What the tools share: models they can't take, and running a model on a batch."""

from __future__ import annotations

import copy as copying
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from normkit.formula.spec import float64
from normkit.tools.restore import preserved

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on one item of a loader: `forward(model, batch)`."""

Only = str | Callable[[str, nn.Module], bool] | None
"""Which layers: a pattern for names as in a shell ("layer1.*"), a predicate of name and module."""


class ToolError(ValueError):
    """A model or data that a tool can't take; the text names the layer, the reason, the remedy."""


def taken(model: nn.Module, copy: bool = False) -> nn.Module:
    """The model that a tool works on: itself, or a copy.

    Raises:
        TypeError: not a module.
        ToolError: scripted, quantized or lazy modules inside, named.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise ToolError(
                f"{where} is scripted, and its layers can't be replaced; give the model that was "
                "scripted, and script the result"
            )
        package = type(module).__module__.split(".")
        if package[0] == "torch" and "quantized" in package:
            raise ToolError(
                f"{where} is quantized, and its norms are part of integer kernels; give the "
                "floating-point model, and quantize the result"
            )
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
            raise ToolError(
                f"{where} is lazy and has no shapes yet; run one batch through the model first"
            )
    return copying.deepcopy(model) if copy else model


def inner(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, whose forward waits for every rank's."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def chosen(only: Only, name: str, module: nn.Module) -> bool:
    """Whether a filter takes this layer."""
    if only is None:
        return True
    return fnmatch.fnmatchcase(name, only) if isinstance(only, str) else only(name, module)


def check_only(model: nn.Module, only: Only) -> None:
    """A pattern fits some name, or ToolError with the nearest one."""
    names = [name for name, _ in model.named_modules() if name]
    if not isinstance(only, str) or any(fnmatch.fnmatchcase(name, only) for name in names):
        return
    near = difflib.get_close_matches(only, names, n=1, cutoff=0.3)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    raise ToolError(f"no layer's name fits only={only!r}{hint}")


def check_loader(loader: Any) -> None:
    """A loader yields batches; one tensor would be cut into its samples."""
    if isinstance(loader, Tensor):
        raise ToolError(
            f"expected a loader of batches, got a tensor of shape {tuple(loader.shape)}; give "
            "[x], or a DataLoader"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU if it has none."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def first_input(model: nn.Module, batch: Any) -> Any:
    """model(batch), or model(batch[0]) of a pair like (x, y); the input goes to model's device.

    Raises:
        ToolError: a batch of another form.
    """
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        inputs = "**batch" if isinstance(batch, Mapping) else "batch[0][0]"
        raise ToolError(
            f"a batch is a {_form(batch)}, neither a tensor nor a tuple that starts with one; say "
            f"how to run it: forward=lambda model, batch: model({inputs})"
        )
    return model(x.to(device_of(model)))


def on_copies(forward: Forward | None) -> Forward:
    """The forward, or `first_input`, on a copy of the batch: some models edit their input."""
    run = forward or first_input

    def on_copy(model: nn.Module, batch: Any) -> Any:
        return run(model, tree_map_only(Tensor, lambda x: x.detach().clone(), batch))

    return on_copy


def _form(batch: Any) -> str:
    inner = batch[0] if isinstance(batch, tuple | list) and batch else None
    name = type(batch).__name__
    return name if inner is None else f"{name} that starts with a {type(inner).__name__}"


def again(loader: Iterable[Any], why: str) -> Iterable[Any]:
    """A loader that can be read more than once, or ToolError."""
    if isinstance(loader, Iterator):
        raise ToolError(
            f"{why} reads the loader more than once, and an iterator ({type(loader).__name__}) "
            "can be read only once; give the DataLoader itself, or a list of batches"
        )
    return loader


def set_training(model: nn.Module, training: bool) -> None:
    """Every module's flag, past `train` and `__setattr__`, which models override."""
    for module in model.modules():
        object.__setattr__(module, "training", training)


def all_off(model: nn.Module) -> None:
    """Every module in evaluation."""
    set_training(model, False)


def outputs(model: nn.Module, example: Any, run: Forward) -> list[Tensor]:
    """The tensors that the model puts out in evaluation; none without an example."""
    if example is None:
        return []
    with preserved(model), torch.no_grad():
        all_off(model)
        return [y.clone() for y in tree_leaves(run(inner(model), example)) if isinstance(y, Tensor)]


def largest(before: list[Tensor], after: list[Tensor] | None = None) -> float:
    """The largest difference of two sets of outputs, or the largest value of one."""
    pairs = zip(before, after or [y.new_zeros(()) for y in before], strict=True)
    return max((float((float64(a) - float64(b)).abs().max()) for a, b in pairs), default=0.0)
