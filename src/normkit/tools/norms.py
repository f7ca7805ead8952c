"""Which norm a module is, whoever wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normkit import layers

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
    "normkit.layers._BatchLayer": ("batch", _FIRST),
    "normkit.layers._InstanceLayer": ("instance", _FIRST),
    "normkit.layers.GroupNorm": ("group", _FIRST),
    "normkit.layers.LayerNorm": ("layer", _LAST),
    "normkit.layers.RMSNorm": ("rms", _LAST),
    f"{_TIMM}.norm.GroupNorm": ("group", _FIRST),
    f"{_TIMM}.norm.GroupNorm1": ("group", _FIRST),
    f"{_TIMM}.norm.LayerNorm": ("layer", _LAST),
    f"{_TIMM}.norm.LayerNormFp32": ("layer", _LAST),
    f"{_TIMM}.norm.LayerNorm2d": ("layer", _FIRST),
    f"{_TIMM}.norm.LayerNorm2dFp32": ("layer", _FIRST),
    f"{_TIMM}.norm.RmsNorm": ("rms", _LAST),
    f"{_TIMM}.norm.RmsNormFp32": ("rms", _LAST),
    f"{_TIMM}.norm.RmsNorm2d": ("rms", _FIRST),
    f"{_TIMM}.norm.RmsNorm2dFp32": ("rms", _FIRST),
    f"{_TIMM}.norm_act.BatchNormAct2d": ("batch", _FIRST),
    f"{_TIMM}.norm_act.SyncBatchNormAct": ("sync", _FIRST),
    f"{_TIMM}.norm_act.FrozenBatchNormAct2d": ("frozen", _FIRST),
    f"{_TIMM}.norm_act.GroupNormAct": ("group", _FIRST),
    f"{_TIMM}.norm_act.LayerNormAct": ("layer", _LAST),
    f"{_TIMM}.norm_act.LayerNormAct2d": ("layer", _FIRST),
    "torchvision.models.convnext.LayerNorm2d": ("layer", _FIRST),
    "torchvision.ops.misc.FrozenBatchNorm2d": ("frozen", _FIRST),
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": ("frozen", _FIRST),
}
"""Class whose forward runs -> (kind, whether channels lie on axis 1).

By the forward and not by the class: a subclass that overrides it is another function.
"""

_OF_BATCH_LAYERS = {
    layers.FrozenBatchNorm: "frozen",
    layers.GhostBatchNorm: "ghost",
    layers.BatchRenorm: "renorm",
}
"""normkit's layers that share BatchNorm's forward."""

_FAMILIES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Norm:
    """A norm, apart from its tensors.

    Attributes:
        kind: "batch", "sync", "frozen", "ghost", "renorm", "instance", "group", "layer" or "rms".
        shape: the normalized shape; (C,) where channels lie on axis 1.
        channels_first: whether they lie there.
        dims: how many axes follow them, where the layer says it.
        ghost_size: of ghost batch norm.
        act: the activation inside: None, one that `normkit` fuses, or "?".
        process_group: of synchronized layers.
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


def read(module: nn.Module) -> Norm | None:
    """What norm a module is; None for anything else, and for a norm with a forward of its own."""
    forward = type(module).forward
    owner = forward.__qualname__.removesuffix(".forward")
    found = _FORWARDS.get(f"{forward.__module__}.{owner}")
    if found is None:
        return None
    kind, first = found
    m: Any = module
    kind = next((k for t, k in _OF_BATCH_LAYERS.items() if isinstance(module, t)), kind)
    if kind == "batch" and is_synchronized(m):
        kind = "sync"
    if kind in ("layer", "rms"):
        shape = tuple(m.normalized_shape)
    elif kind == "group":
        shape = (m.num_channels,)
    else:
        shape = (len(m.running_mean) if kind == "frozen" else m.num_features,)
    return Norm(
        kind,
        shape,
        first or bool(getattr(m, "channels_first", False)),
        m.eps,
        getattr(m, "num_groups", None),
        _dims(module),
        getattr(m, "momentum", None),
        getattr(m, "running_mean", None) is not None,
        getattr(m, "ghost_size", None),
        _act(module),
        process_group_of(module),
    )


def is_norm(module: nn.Module) -> bool:
    """Whether it is one of torch's norms, or one that `read` knows."""
    return isinstance(module, _FAMILIES) or read(module) is not None


def is_frozen(model: nn.Module, module: nn.Module) -> bool:
    """Whether a norm keeps its statistics on purpose.

    By its class, by `freeze()`, or by being in evaluation inside a model in training.
    """
    norm = read(module)
    by_class = norm is not None and norm.kind == "frozen"
    own = bool(getattr(module, "frozen", False))
    return by_class or own or (model.training and not module.training)


def name_of_act(module: nn.Module) -> str | None:
    """Which of normkit's activations a module computes; None for all others."""
    for name, kind in ACTIVATIONS.items():
        if type(module) is kind and _constants(module) == _constants(kind()):
            return name
    return None


def _constants(module: nn.Module) -> tuple[Any, ...]:
    return tuple(getattr(module, key, None) for key in ("negative_slope", "approximate"))


_DIMS = {
    layer.ranks: dims
    for dims, layer in enumerate((layers.BatchNorm1d, layers.BatchNorm2d, layers.BatchNorm3d), 1)
}


def _dims(module: nn.Module) -> int | None:
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


def _act(module: nn.Module) -> str | None:
    if isinstance(module, layers._Norm):
        return module._act
    act, drop = getattr(module, "act", None), getattr(module, "drop", None)
    if isinstance(drop, nn.Module) and not isinstance(drop, nn.Identity):
        return "?"
    if act is None or isinstance(act, str):
        return act
    return None if isinstance(act, nn.Identity) else name_of_act(act) or "?"
