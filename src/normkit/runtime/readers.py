"""torch's code that reads a layer's attributes instead of calling it, kept from losing anything.

It knows what torch's layers have: an activation inside, frozen statistics or channels on axis 1
would be gone without a word.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def leave_to_forward(layer: nn.Module) -> None:
    """Keep torch's fast path of `nn.TransformerEncoderLayer` from a layer.

    From weight, bias and eps it computes what a plain layer norm would give. It lets modules that
    have hooks alone, so the layer gets one, which does nothing.
    """
    layer.register_forward_pre_hook(do_nothing)


def is_left_to_forward(layer: nn.Module) -> bool:
    return do_nothing in layer._forward_pre_hooks.values()


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hand the hooks of a layer to the one that takes its place; handles still remove them."""
    own = is_left_to_forward(new)
    for key in [k for k, hook in old._forward_pre_hooks.items() if hook is do_nothing]:
        del old._forward_pre_hooks[key]
    for attribute, value in vars(old).items():
        if "_hooks" in attribute:
            vars(new)[attribute] = value
    if own:
        leave_to_forward(new)


def do_nothing(layer: nn.Module, args: Any) -> None:
    pass


def refuse_to_lose(
    owner: Any, name: str, lost: Callable[[nn.Module], str | None], remedy: str
) -> None:
    """Have torch's `owner.name` raise where a module that it is given has what it doesn't know.

    `lost` says what a layer would lose, or None. A name that was imported before is replaced too.
    """
    held = vars(owner)[name]
    original = getattr(held, "__func__", held)

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for given in (*args, *kwargs.values()):
            for layer in given.modules() if isinstance(given, nn.Module) else ():
                if what := lost(layer):
                    raise RuntimeError(f"{layer}: torch's {name} would lose {what}; {remedy}")
        return original(*args, **kwargs)

    if isinstance(held, classmethod):
        setattr(owner, name, classmethod(checked))
        return
    for module in tuple(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, checked)


_QUANTIZATION = "torch.ao.quantization"
_UNKNOWN = (
    "torch's quantization knows layers by their exact types, and would leave this one as it is; "
    'normkit.swap(model, to="torch") first'
)


def refuse_quantization(layer: nn.Module, input: Any) -> None:
    """RuntimeError where `prepare_fx`, `prepare_qat_fx` or `fuse_fx` traces the layer."""
    if isinstance(input, torch.fx.Proxy):
        tracers = type(input.tracer).__mro__
        if any(kind.__module__.startswith(_QUANTIZATION) for kind in tracers):
            raise RuntimeError(f"{layer}: {_UNKNOWN}")


def refuse_fusing(layers: Iterable[type[nn.Module]]) -> None:
    """Have torch's `fuse_modules` raise RuntimeError for these batch norms."""

    def refuse(is_qat: bool, *modules: nn.Module) -> NoReturn:
        norm = next(module for module in modules if isinstance(module, _BatchNorm))
        raise RuntimeError(f"{norm}: {_UNKNOWN}")

    mappings = sys.modules.get(f"{_QUANTIZATION}.fuser_method_mappings")
    known: dict[tuple[type, ...], Any] = getattr(mappings, "_DEFAULT_OP_LIST_TO_FUSER_METHOD", {})
    for pattern in [p for p in known if any(issubclass(kind, _BatchNorm) for kind in p)]:
        for layer in layers:
            ours = tuple(layer if issubclass(kind, _BatchNorm) else kind for kind in pattern)
            known.setdefault(ours, refuse)
