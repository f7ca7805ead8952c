"""A norm with modules of the old layer behind it, under the old layer's keys.

timm's BatchNormAct2d holds its activation as a child: `bn1.weight`, `bn1.act`. What normkit can't
fuse of that stays a child of the same name of the new layer, so that a state dict still fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normkit.factory import NORMS


class Followed(nn.Module):
    """Mixin for a norm: its output goes through the children `followed_by`, in their order."""

    followed_by: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The norm's, then theirs."""
        y = super().forward(*args, **kwargs)
        for name in self.followed_by:
            child = self._modules[name]
            assert child is not None
            y = child(y)
        return y


def of_torch(layer: type[nn.Module]) -> type[nn.Module] | None:
    """The public layer of torch's that a class derives from, if there is one."""
    public = [base for base in layer.__mro__ if vars(nn).get(base.__name__) is base]
    return None if public[0] is nn.Module else public[0]


_OURS = [layer for entry in NORMS.values() for layer in (entry.layer, *entry.ranked)]
_TORCHS = [base for base in map(of_torch, _OURS) if base is not None]


def _followed(layer: type[nn.Module], name: str) -> type[nn.Module]:
    return type(f"Followed{name}", (Followed, layer), {"__module__": __name__})


_FOLLOWED = {layer: _followed(layer, layer.__name__) for layer in _OURS}
_FOLLOWED |= {layer: _followed(layer, f"Torch{layer.__name__}") for layer in _TORCHS}
_FOLLOWED[nn.Identity] = _followed(nn.Identity, "Identity")
globals().update({layer.__name__: layer for layer in _FOLLOWED.values()})  # for pickle


def follow(norm: nn.Module, children: Mapping[str, nn.Module]) -> nn.Module:
    """Have a norm, of normkit's or torch's, followed by these modules; in place."""
    if children:
        norm.__class__ = _FOLLOWED[type(norm)]
        norm.followed_by = tuple(children)  # type: ignore[assignment]
        norm._modules.update(children)  # `act` of normkit's layers is the fused activation's name
    return norm
