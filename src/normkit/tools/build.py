"""A new layer in the place of an old norm: made by kind, then given all that the old one had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit import layers
from normkit.factory import create
from normkit.runtime.readers import move_hooks
from normkit.tools.norms import ACTIVATIONS, Norm, is_synchronized, process_group_of

Make = Callable[[int], nn.Module]

KINDS = (
    *("batch", "ghost", "renorm", "frozen", "sync", "instance", "group", "layer", "rms", "none"),
)

_RUNNING = ("batch", "sync", "ghost", "renorm")

_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def group_count(channels: int, most: int = 32) -> int:
    """The largest number of groups <= most that divides the channels, two or more to a group."""
    return max(
        (g for g in range(1, most + 1) if channels % g == 0 and channels // g > 1), default=1
    )


def make(kind: str, norm: Norm, number: int = 32, process_group: Any = None) -> nn.Module:
    """A layer of the kind, with the old norm's shape, eps, momentum and activation.

    `number` is that of "group:8" and "ghost:32". Batch renorm has a momentum of its own.
    """
    (channels, *_), first = norm.shape, norm.channels_first
    eps = 1e-5 if norm.eps is None else norm.eps
    batch: dict[str, Any] = {"eps": eps}
    if norm.kind in _RUNNING or norm.kind == "instance":
        batch["momentum"] = norm.momentum
    if norm.kind in _RUNNING:
        batch["track_running_stats"] = norm.tracks
    match kind:
        case "none":
            return nn.Identity() if norm.act is None else ACTIVATIONS[norm.act]()
        case "batch" if norm.dims is None or norm.act:
            return layers.BatchNorm(channels, **batch, act=norm.act)
        case "ghost":
            return create(f"ghost:{norm.ghost_size or number}", channels, **batch, act=norm.act)
        case "renorm" | "frozen":
            return create(kind, channels, eps=eps, act=norm.act)
        case "batch":
            return getattr(layers, f"BatchNorm{norm.dims}d")(channels, **batch)
        case "sync":
            batch["process_group"] = norm.process_group if process_group is None else process_group
            new = layers.SyncBatchNorm(channels, **batch, act=norm.act)
            if norm.dims is not None:
                new.ranks = getattr(layers, f"BatchNorm{norm.dims}d").ranks
            return new
        case "instance":
            tracks = norm.kind == "instance" and norm.tracks
            batch |= {"affine": True, "track_running_stats": tracks, "act": norm.act}
            return getattr(layers, f"InstanceNorm{f'{norm.dims}d' if norm.dims else ''}")(
                channels, **batch
            )
        case "group":
            return layers.GroupNorm(
                norm.groups or group_count(channels, number), channels, eps, act=norm.act
            )
        case "layer":
            return layers.LayerNorm(norm.shape, eps, channels_first=first, act=norm.act)
        case "rms":
            return layers.RMSNorm(norm.shape, norm.eps, channels_first=first, act=norm.act)
    raise AssertionError(kind)


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
    if isinstance(new, layers.GhostBatchNorm | layers.BatchRenorm) and is_synchronized(old):
        new.synchronize(process_group_of(old))
        notes.append("synchronized, as it was")
    if isinstance(new, layers.BatchRenorm) and getattr(old, "momentum", None) != new.momentum:
        notes.append(f"momentum is {new.momentum:g}, renorm's own")
    for module in new.modules():
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
