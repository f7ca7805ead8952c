"""What the tools share: models they can't take, batches for a model, and leaving no trace."""

from __future__ import annotations

import copy as copying
import difflib
import fnmatch
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from normkit.formula.spec import float64

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


def all_off(model: nn.Module) -> None:
    """Every module in evaluation, without `model.train`, which a model may have overridden."""
    for module in model.modules():
        module.training = False


@contextmanager
def preserved(model: nn.Module, *loaders: Any) -> Iterator[None]:
    """Put everything back at the end, also after an exception.

    That is: every module's attributes (parameters, buffers, submodules, hooks, train or eval), the
    values of all parameters and buffers, gradients, and the random state of Python, NumPy, torch
    and the loaders' own generators.
    """
    modules = [(m, dict(vars(m)), _dicts(m)) for m in model.modules()]
    values = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    random_state = _random_state(loaders)
    for parameter, _, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for module, attributes, dicts in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for target, content in dicts:
                target.clear()
                target.update(content)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for parameter, gradient, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for restore in random_state:
            restore()


@contextmanager
def undone_on_failure(model: nn.Module) -> Iterator[None]:
    """Put submodules and parameters back where they were if something raises inside."""
    held = [(m, dict(m._modules), dict(m._parameters)) for m in model.modules()]
    try:
        yield
    except BaseException:
        for module, children, parameters in held:
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
        raise


def _dicts(module: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    return [(value, dict(value)) for value in vars(module).values() if isinstance(value, dict)]


def _random_state(loaders: tuple[Any, ...]) -> list[Callable[[], Any]]:
    restores: list[Callable[[], Any]] = []

    def keep(get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
        state = get()
        restores.append(lambda: put(state))

    keep(random.getstate, random.setstate)
    keep(torch.get_rng_state, torch.set_rng_state)
    if torch.cuda.is_initialized():
        keep(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        keep(numpy.random.get_state, numpy.random.set_state)
    for owner in (*loaders, *(getattr(loader, "sampler", None) for loader in loaders)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            keep(generator.get_state, generator.set_state)
    return restores


def outputs(model: nn.Module, example: Any, run: Forward) -> list[Tensor]:
    """The tensors that the model puts out in evaluation; none without an example."""
    if example is None:
        return []
    with preserved(model), torch.no_grad():
        all_off(model)
        return [y.clone() for y in tree_leaves(run(model, example)) if isinstance(y, Tensor)]


def largest(before: list[Tensor], after: list[Tensor] | None = None) -> float:
    """The largest difference of two sets of outputs, or the largest value of one."""
    pairs = zip(before, after or [y.new_zeros(()) for y in before], strict=True)
    return max((float((float64(a) - float64(b)).abs().max()) for a, b in pairs), default=0.0)
