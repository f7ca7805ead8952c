"""A new layer in the place of an old norm: made by kind, then given all that the old one had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit import layers
from normkit.factory import NORMS, Entry, arguments, name_of
from normkit.runtime.readers import move_hooks
from normkit.tools.followed import of_torch
from normkit.tools.known import (
    ACTIVATIONS,
    Norm,
    holds_state,
    is_synchronized,
    process_group_of,
)

Make = Callable[[int], nn.Module]

KINDS = (*(name for name, entry in NORMS.items() if entry.pool is not None), "torch", "none")
"""What a norm becomes by its description; a function of the channels makes all others."""

TARGETS = (*KINDS, *(name for name in NORMS if name not in KINDS))

_TENSORS = ("weight", "bias", "tau", "running_mean", "running_var", "num_batches_tracked")


def group_count(channels: int, most: int = 32) -> int:
    """The largest number of groups <= most that divides the channels, two or more to a group."""
    return max(
        (g for g in range(1, most + 1) if channels % g == 0 and channels // g > 1), default=1
    )


def make(kind: str, norm: Norm, number: int = 32, process_group: Any = None) -> nn.Module:
    """A layer of the kind, with the old norm's shape, eps, momentum and activation.

    `number` is that of "group:8" and "ghost:32". Batch renorm has a momentum of its own. "torch"
    makes torch's layer of the norm's own kind, and "none" the identity; neither has the activation.
    """
    if kind == "none":
        return nn.Identity()
    target = norm.kind if kind == "torch" else kind
    entry = NORMS[target]
    act = norm.act if norm.act != "?" and kind != "torch" else None
    layer = _class_for(entry, norm.dims, act)
    if kind == "torch":
        found = of_torch(layer)
        assert found is not None
        layer = found
    channels = norm.shape[0]
    given = {
        "num_features": channels,
        "num_channels": channels,
        "normalized_shape": norm.shape,
        "num_groups": norm.groups or group_count(channels, number),
        "ghost_size": norm.ghost_size or number,
        "process_group": norm.process_group if process_group is None else process_group,
        "channels_first": norm.channels_first,
        "zero_centered_weight": norm.zero_centered_weight,
        "cast_before_affine": norm.cast_before_affine,
        "memory_format": norm.memory_format,
        "tlu": norm.tlu,
        "affine": True,
        "act": act,
    }
    if norm.eps is not None or target == norm.kind:
        given["eps"] = norm.eps
    if norm.entry.removes_channel_means and not entry.own_momentum:
        given["momentum"] = norm.momentum
    if norm.entry.pool == entry.pool:
        given["track_running_stats"] = norm.tracks
    new = layer(**{name: given[name] for name in arguments(layer) if name in given})
    if isinstance(new, layers._BatchLayer) and norm.dims is not None:
        new.ranks = NORMS["batch"].ranked[norm.dims - 1].ranks  # type: ignore[attr-defined]
    return new


def _class_for(entry: Entry, dims: int | None, act: str | None) -> type[nn.Module]:
    """The class named as torch's where the number of axes is known, if it takes the activation."""
    if dims is not None and entry.ranked:
        ranked = entry.ranked[dims - 1]
        if act is None or "act" in arguments(ranked):
            return ranked
    return entry.layer


def why_not_torch(module: nn.Module, norm: Norm) -> str | None:
    """Why torch has no layer that computes what this one does."""
    if why := holds_state(module):
        return f"{why}, which torch's can't"
    if norm.channels_first and norm.entry.pool == "row":
        return "torch's normalizes the last axes, and its channels lie on axis 1"
    if norm.zero_centered_weight:
        return "torch's has no 1 + weight"
    if norm.cast_before_affine:
        return "torch's doesn't round before weight and bias"
    if norm.memory_format is not None:
        return f"torch's gives other strides ({norm.memory_format})"
    if of_torch(_class_for(norm.entry, norm.dims, None)) is None:
        if norm.entry.ranked:
            return "torch's is made for a number of axes, which this layer doesn't say"
        return "torch has none of its kind"
    return None


def behind(old: nn.Module, norm: Norm) -> dict[str, nn.Module]:
    """The modules that must follow a layer without an activation inside, by their names."""
    children = {name: child for name in norm.behind if (child := old._modules[name]) is not None}
    if norm.act not in (None, "?"):
        own = old._modules.get("act")
        children["act"] = ACTIVATIONS[norm.act]() if own is None else own
    return children


def adopt(
    old: nn.Module, new: nn.Module, like: Tensor | None, keep_affine: bool = True
) -> tuple[list[str], str]:
    """Give the old layer's tensors, mode, hooks and parametrizations to the new one.

    An affine that the old layer lacks is taken from the new one too, unless the new layer is the
    user's own (`keep_affine=False`). Returns the names of the affine's tensors that went along, and
    what could not be given, in words.
    """
    notes, went = [], []
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    for key in _TENSORS:
        affine = key in ("weight", "bias")
        value, slot = getattr(old, key, None), getattr(new, key, None)
        if value is None:
            if slot is not None and affine and keep_affine:
                setattr(new, key, None)
            continue
        if not isinstance(slot, Tensor):
            if affine and not isinstance(new, nn.Identity):
                notes.append(f"{key} dropped")
            continue
        if slot.shape != value.shape:
            notes.append(f"{key} is new: {tuple(slot.shape)} instead of {tuple(value.shape)}")
            continue
        if affine:
            went.append(key)
        if parametrize.is_parametrized(old, key):
            _move_parametrizations(old, new, key)
        elif key in new._parameters:
            new._parameters[key] = (
                value if isinstance(value, nn.Parameter) else nn.Parameter(value.clone())
            )
        else:
            new._buffers[key] = value.detach()
    was, now = (isinstance(getattr(m, "running_mean", None), Tensor) for m in (old, new))
    if now and not was:
        notes.append("running statistics start anew: normkit.recalibrate fills them")
    if was and not now:
        notes.append("running statistics dropped")
    if isinstance(new, layers._BatchLayer) and isinstance(old, layers._BatchLayer):
        if old.frozen and not isinstance(old, layers.FrozenBatchNorm):
            new.freeze()
        if old.micro_batches > 1 and not isinstance(new, layers.FrozenBatchNorm):
            new.accumulate(old.micro_batches)
    kind = name_of(type(new))
    if kind is not None and NORMS[kind].variant and is_synchronized(old):
        new.synchronize(process_group_of(old))  # type: ignore[operator]
        notes.append("synchronized, as it was")
    momentum = getattr(new, "momentum", None)
    if kind is not None and NORMS[kind].own_momentum and getattr(old, "momentum", None) != momentum:
        notes.append(f"momentum is {momentum:g}, {kind}'s own")
    theirs = set(old.modules())
    for module in new.modules():
        if module not in theirs:
            module.training = old.training
    move_hooks(old, new)
    return went, "; ".join(notes)


def _move_parametrizations(old: nn.Module, new: nn.Module, key: str) -> None:
    held: Any = old.parametrizations[key]  # type: ignore[index]
    for each in held:
        parametrize.register_parametrization(new, key, each, unsafe=True)
    moved: Any = new.parametrizations[key]  # type: ignore[index]
    moved._parameters.update(held._parameters)
    moved._buffers.update(held._buffers)


def tensor_like(*modules: nn.Module) -> Tensor | None:
    """The first floating-point parameter or buffer, for its device and dtype."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if torch.is_floating_point(tensor):
                return tensor
    return None
