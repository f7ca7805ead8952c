"""What a norm is, and those norms that are known by the forward that runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normkit.factory import NORMS, Entry, name_of
from normkit.layers import _BatchLayer, _Norm
from normkit.tools.followed import Followed

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}
"""What `act` stands for, as a module with its default arguments."""

_FIRST, _LAST = True, False
_TORCH, _TIMM = "torch.nn.modules", "timm.layers"

_FORWARDS: dict[str, tuple[str, bool]] = {
    f"{_TORCH}.batchnorm._BatchNorm": ("batch", _FIRST),
    f"{_TORCH}.batchnorm.SyncBatchNorm": ("sync", _FIRST),
    f"{_TORCH}.instancenorm._InstanceNorm": ("instance", _FIRST),
    f"{_TORCH}.normalization.GroupNorm": ("group", _FIRST),
    f"{_TORCH}.normalization.LayerNorm": ("layer", _LAST),
    f"{_TORCH}.normalization.RMSNorm": ("rms", _LAST),
    f"{_TIMM}.norm.GroupNorm": ("group", _FIRST),
    f"{_TIMM}.norm.GroupNorm1": ("group", _FIRST),
    f"{_TIMM}.norm.LayerNorm": ("layer", _LAST),
    f"{_TIMM}.norm.LayerNormFp32": ("layer", _LAST),
    f"{_TIMM}.norm.RmsNorm": ("rms", _LAST),
    f"{_TIMM}.norm.RmsNormFp32": ("rms", _LAST),
    f"{_TIMM}.norm_act.BatchNormAct2d": ("batch", _FIRST),
    f"{_TIMM}.norm_act.SyncBatchNormAct": ("sync", _FIRST),
    f"{_TIMM}.norm_act.FrozenBatchNormAct2d": ("frozen", _FIRST),
    f"{_TIMM}.norm_act.GroupNormAct": ("group", _FIRST),
    f"{_TIMM}.norm_act.LayerNormAct": ("layer", _LAST),
    "torchvision.ops.misc.FrozenBatchNorm2d": ("frozen", _FIRST),
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": ("frozen", _FIRST),
}
"""Class whose forward runs -> (kind, whether channels lie on axis 1).

By the forward and not by the class: a subclass that overrides it is another function.
"""

_OWN = ("normkit.layers", "normkit.standalone")


@dataclass(frozen=True)
class Norm:
    """A norm, apart from its tensors.

    Attributes:
        kind: its name in `normkit.factory.NORMS`.
        shape: the normalized shape; (C,) where channels lie on axis 1.
        channels_first: whether they lie there.
        dims: how many axes follow them, where the layer says it.
        ghost_size: of ghost batch norm.
        act: the activation inside: None, one that `normkit` fuses, or "?".
        process_group: of synchronized layers.
        zero_centered_weight, cast_before_affine, memory_format: as of the layers.
        tlu: whether a filter response norm has its threshold.
        behind: the children that its output goes through, where `act` is "?".
        note: in what another layer of this description differs from it.
    """

    kind: str
    shape: tuple[int, ...]
    channels_first: bool
    eps: float | None
    groups: int | None = None
    dims: int | None = None
    momentum: float | None = None
    tracks: bool = False
    ghost_size: int | None = None
    act: str | None = None
    process_group: Any = None
    zero_centered_weight: bool = False
    cast_before_affine: bool = False
    memory_format: torch.memory_format | None = None
    tlu: bool = True
    behind: tuple[str, ...] = ()
    note: str = ""

    @property
    def entry(self) -> Entry:
        """What the package knows of its kind."""
        return NORMS[self.kind]


@dataclass(frozen=True)
class Unknown:
    """A module that looks like a norm, and why it isn't taken for one."""

    why: str


def known(module: nn.Module) -> Norm | None:
    """What the class says, where its forward is one that is known."""
    if "forward" in vars(module):
        return None
    runs: Callable[..., Any] = next(
        vars(base)["forward"]
        for base in type(module).__mro__
        if "forward" in vars(base) and base is not Followed
    )
    owner = runs.__qualname__.removesuffix(".forward")
    if runs.__module__ in _OWN:
        kind = name_of(type(module))
        first = kind is not None and NORMS[kind].pool != "row"
    else:
        kind, first = _FORWARDS.get(f"{runs.__module__}.{owner}", (None, False))
    if kind is None:
        return None
    m: Any = module
    if kind == "batch" and is_synchronized(m):
        kind = "sync"
    if hasattr(m, "normalized_shape"):
        shape = tuple(m.normalized_shape)
    else:
        count = getattr(m, "num_channels", getattr(m, "num_features", None))
        shape = (len(m.running_mean) if count is None else count,)
    act, behind = _act(module)
    eps = m.eps if "eps" in vars(m) else None
    return Norm(
        kind,
        shape,
        bool(getattr(m, "channels_first", first)),
        eps,
        getattr(m, "num_groups", None),
        dims_of(module),
        getattr(m, "momentum", None),
        getattr(m, "running_mean", None) is not None,
        getattr(m, "ghost_size", None),
        act,
        process_group_of(module),
        bool(getattr(m, "zero_centered_weight", False)),
        bool(getattr(m, "cast_before_affine", False)),
        getattr(m, "memory_format", None),
        behind=behind,
    )


def name_of_act(module: nn.Module) -> str | None:
    """Which of normkit's activations a module computes; None for all others."""
    for name, kind in ACTIVATIONS.items():
        if type(module) is kind and _constants(module) == _constants(kind()):
            return name
    return None


def _constants(module: nn.Module) -> tuple[Any, ...]:
    return tuple(getattr(module, key, None) for key in ("negative_slope", "approximate"))


_DIMS = {layer.ranks: dims for dims, layer in enumerate(NORMS["batch"].ranked, 1)}  # type: ignore[attr-defined]


def dims_of(module: nn.Module) -> int | None:
    """How many axes follow the channels, where a layer says it, by its class's name too."""
    for digit in "123":
        if any(c.__name__.endswith(f"{digit}d") for c in type(module).__mro__):
            return int(digit)
    return _DIMS.get(getattr(module, "ranks", None))


def is_synchronized(module: nn.Module) -> bool:
    """Whether it merges its statistics with those of other ranks."""
    return isinstance(module, nn.SyncBatchNorm) or getattr(module, "merge", None) is not None


def process_group_of(module: Any) -> Any:
    """Whose ranks a synchronized layer merges."""
    merge = getattr(module, "merge", None)
    return getattr(module if merge is None else merge, "process_group", None)


def holds_state(module: nn.Module) -> str | None:
    """What a layer of normkit does beyond its formula, as no other layer can: in words, or None."""
    if not isinstance(module, _BatchLayer):
        return None
    if module.frozen:
        return "its statistics are frozen"
    return "it accumulates micro-batches" if module.micro_batches > 1 else None


def children_behind(module: nn.Module) -> Mapping[str, nn.Module]:
    """The children that do something, in their order: an activation, a dropout."""
    return {
        name: child
        for name, child in module._modules.items()
        if child is not None and not isinstance(child, nn.Identity) and name != "parametrizations"
    }


def _act(module: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    """The activation inside as in `Norm.act`, and the children that aren't fused."""
    if isinstance(module, _Norm) and module._act is not None:
        return module._act, ()
    act = getattr(module, "act", None)
    if isinstance(act, str) and not isinstance(module, _Norm):
        return act, ()
    return fused(children_behind(module))


def fused(behind: Mapping[str, nn.Module]) -> tuple[str | None, tuple[str, ...]]:
    """The one activation that normkit fuses, else "?" and the names of all."""
    if not behind:
        return None, ()
    names = [name_of_act(child) for child in behind.values()]
    return (names[0], ()) if len(names) == 1 and names[0] else ("?", tuple(behind))
