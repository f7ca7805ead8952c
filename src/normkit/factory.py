"""One factory for every normalization layer, by name."""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit import layers
from normkit.formula.spec import unknown
from normkit.layers import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchRenorm,
    FrozenBatchNorm,
    GhostBatchNorm,
    GroupNorm,
    InstanceNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
    SyncBatchNorm,
)
from normkit.standalone import DyT, FilterResponseNorm, GlobalResponseNorm


@dataclass(frozen=True, slots=True)
class Entry:
    """One norm: what its name makes, and all that other modules have to know of it.

    Attributes:
        layer: its class.
        number: the argument that stands behind the colon, as in "group:32".
        features: the argument that takes num_features.
        preset: what differs from the layer's own defaults.
        ranked: its classes for one, two and three position axes, named as torch's.
        pool: the values that share statistics: "batch" (with the positions), "positions", "group"
            (of channels, with the positions) or "row" (the last axes, or the channels); None for
            what isn't a case of the formula.
        by_batch: training normalizes by the batch, and evaluation by running statistics.
        variant: of batch norm; synchronization is asked of it by `synchronize`.
        own_momentum: its momentum means something else than torch's 0.1.
    """

    layer: type[nn.Module]
    number: str | None = None
    features: str = "num_features"
    preset: dict[str, Any] = field(default_factory=dict)
    ranked: tuple[type[nn.Module], ...] = ()
    pool: str | None = None
    by_batch: bool = False
    variant: bool = False
    own_momentum: bool = False

    @property
    def removes_channel_means(self) -> bool:
        """Whether a constant that is added to a channel changes nothing in training."""
        return self.by_batch or self.pool == "positions"


_CHANNELS_FIRST = {"channels_first": True}

NORMS = {
    "batch": Entry(
        BatchNorm, ranked=(BatchNorm1d, BatchNorm2d, BatchNorm3d), pool="batch", by_batch=True
    ),
    "ghost": Entry(GhostBatchNorm, "ghost_size", pool="batch", by_batch=True, variant=True),
    "renorm": Entry(BatchRenorm, pool="batch", by_batch=True, variant=True, own_momentum=True),
    "frozen": Entry(FrozenBatchNorm, pool="batch"),
    "sync": Entry(SyncBatchNorm, pool="batch", by_batch=True),
    "instance": Entry(
        InstanceNorm, ranked=(InstanceNorm1d, InstanceNorm2d, InstanceNorm3d), pool="positions"
    ),
    "group": Entry(GroupNorm, "num_groups", "num_channels", pool="group"),
    "layer": Entry(LayerNorm, None, "normalized_shape", _CHANNELS_FIRST, pool="row"),
    "rms": Entry(RMSNorm, None, "normalized_shape", _CHANNELS_FIRST, pool="row"),
    "dyt": Entry(DyT, preset=_CHANNELS_FIRST),
    "frn": Entry(FilterResponseNorm),
    "grn": Entry(GlobalResponseNorm),
}
"""Every name that `create` knows. To add a norm, add its entry here, its function and its class."""

_NAMES = {layer: name for name, e in NORMS.items() for layer in (e.layer, *e.ranked)}


def name_of(layer: type[nn.Module]) -> str | None:
    """The name in `NORMS` of a class, or of the nearest class that it derives from."""
    return next((_NAMES[base] for base in layer.__mro__ if base in _NAMES), None)


def create(name: str, num_features: int, **kwargs: Any) -> nn.Module:
    """The normalization layer of this name, for inputs (N, C, *) with C = num_features.

    `functools.partial(normkit.create, "group:8")` is a `norm_layer=` of timm and torchvision.
    Layer norm, RMS norm and DyT take the channels on axis 1 here, unlike by their constructors;
    `channels_first=False` takes them on the last axis, as in transformers.

    Args:
        name: one of `normkit.factory.NORMS`; "group:8" says the number of groups.
        num_features: C.
        **kwargs: further arguments of the layer's constructor.

    Returns:
        The layer.

    Raises:
        ValueError: an unknown name; a number where none belongs, or none where one does; whatever
            the constructor refuses.
        TypeError: an unknown argument.
    """
    kind, colon, number = name.partition(":")
    if kind not in NORMS:
        raise ValueError(unknown("norm", kind, NORMS))
    entry = NORMS[kind]
    if entry.number is None and colon:
        raise ValueError(f"{kind!r} takes no number, got {name!r}")
    if entry.number is not None and not number.isdecimal():
        raise ValueError(f"{kind!r} needs its {entry.number}, as in '{kind}:8', got {name!r}")
    given = {entry.features: num_features}
    if entry.number is not None:
        given[entry.number] = int(number)
    known = [argument for argument in arguments(entry.layer) if argument not in given]
    for argument in kwargs:
        if argument not in known:
            raise TypeError(f"create({name!r}): " + unknown("argument", argument, known))
    return entry.layer(**given, **entry.preset | kwargs)


def register(registry: MutableMapping[type, Any]) -> None:
    """Give normkit's layers the entries that a registry has for torch's, by exact type.

    Libraries that ask `type(module) in REGISTRY` don't see that a layer of normkit is a batch norm.
    Where that would cost a guarantee, hand them the registry:

        normkit.register(opacus.validators.ModuleValidator.VALIDATORS)

    Each layer gets the entry of the nearest class of torch's that it derives from, those for any
    number of axes that of 2d; an entry of its own is kept. It suits registries that ask what a
    layer is, not those that compute from its attributes: they know no mask, act or channels_first.

    Args:
        registry: from layer classes to whatever the library keeps; changed in place.
    """
    for layer in vars(layers).values():
        if not (isinstance(layer, type) and issubclass(layer, layers._Norm)):
            continue
        bases = list(layer.__mro__[1:])
        if issubclass(layer, _BatchNorm):
            bases.append(nn.BatchNorm2d)
        elif issubclass(layer, _InstanceNorm):
            bases.append(nn.InstanceNorm2d)
        entries = [registry[base] for base in bases if base in registry]
        if entries:
            registry.setdefault(layer, entries[0])


def arguments(layer: type[nn.Module]) -> list[str]:
    """The names of a constructor's arguments."""
    return list(inspect.signature(layer).parameters)
