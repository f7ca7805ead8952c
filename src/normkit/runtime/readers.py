"""torch's code that reads a layer's attributes instead of calling it, kept from losing anything.

It knows what torch's layers have: an activation inside, frozen statistics or channels on axis 1
would be gone without a word.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn


def leave_to_forward(layer: nn.Module) -> None:
    """Keep torch's fast path of `nn.TransformerEncoderLayer` from a layer.

    From weight, bias and eps it computes what a plain layer norm would give. It lets modules that
    have hooks alone, so the layer gets one, which does nothing.
    """
    layer.register_forward_pre_hook(_nothing)


def is_left_to_forward(layer: nn.Module) -> bool:
    return _nothing in layer._forward_pre_hooks.values()


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hand the hooks of a layer to the one that takes its place; handles still remove them."""
    own = is_left_to_forward(new)
    for key in [k for k, hook in old._forward_pre_hooks.items() if hook is _nothing]:
        del old._forward_pre_hooks[key]
    for attribute, value in vars(old).items():
        if "_hooks" in attribute:
            vars(new)[attribute] = value
    if own:
        leave_to_forward(new)


def _nothing(layer: nn.Module, args: Any) -> None:
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
