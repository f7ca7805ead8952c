"""The table of cases: a norm, a shape, a layout, a dtype, a mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normkit

IMAGES: tuple[tuple[int, ...], ...] = (
    (32, 64, 56, 56),
    (32, 256, 28, 28),
    (64, 512, 7, 7),
    (128, 64, 32, 32),
    (128, 16, 28, 28),
    (8, 32, 16, 48, 48),
)
ROWS: tuple[tuple[int, ...], ...] = (
    (60, 100),
    (4096, 100),
    (4096, 768),
    (8192, 1024),
    (2048, 4096),
)
MODES = ("evaluation", "training", "forward+backward")


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """What users of torch write: the channels moved last and back."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.movedim(1, -1)
        y = F.layer_norm(rows, self.normalized_shape, self.weight, self.bias, self.eps)
        return y.movedim(-1, 1)


@dataclass(frozen=True)
class Norm:
    """A norm as torch's users write it, and as normkit's do: each a layer and a call of it."""

    name: str
    torch_layer: Callable[[tuple[int, ...]], nn.Module]
    normkit_layer: Callable[[tuple[int, ...]], nn.Module]
    second: bool = False
    multiple: int = 1
    """What the number of channels must be a multiple of."""
    torch_call: Callable[..., Tensor] = lambda layer, x: layer(x)
    normkit_call: Callable[..., Tensor] = lambda layer, x: layer(x)

    @property
    def fused(self) -> bool:
        return "+" in self.name


def _batch(shape: tuple[int, ...], module: object = nn) -> nn.Module:
    name = {2: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(shape)]
    return getattr(module, name)(shape[1])


def _instance(shape: tuple[int, ...], module: object = nn) -> nn.Module:
    name = {4: "InstanceNorm2d", 5: "InstanceNorm3d"}[len(shape)]
    return getattr(module, name)(shape[1], affine=True)


def _add_rms(layer: nn.Module, x: Tensor, add: Tensor) -> tuple[Tensor, Tensor]:
    total = x + add
    return layer(total), total


def _group(groups: int) -> Norm:
    return Norm(
        f"GN({groups})",
        lambda s: nn.GroupNorm(groups, s[1]),
        lambda s: normkit.GroupNorm(groups, s[1]),
        multiple=groups,
    )


IMAGE_NORMS = (
    Norm("BN", _batch, lambda s: _batch(s, normkit)),
    Norm(
        "BN+relu",
        _batch,
        lambda s: normkit.BatchNorm(s[1], act="relu"),
        torch_call=lambda layer, x: layer(x).relu_(),
    ),
    Norm(
        "BN+add+relu",
        _batch,
        lambda s: normkit.BatchNorm(s[1], act="relu"),
        second=True,
        torch_call=lambda layer, x, z: layer(x).add_(z).relu_(),
        normkit_call=lambda layer, x, z: layer(x, residual=z),
    ),
    Norm("IN", _instance, lambda s: _instance(s, normkit)),
    _group(8),
    _group(32),
    Norm(
        "LN over channels",
        lambda s: ChannelsFirstLayerNorm(s[1]),
        lambda s: normkit.LayerNorm(s[1], channels_first=True),
    ),
)
ROW_NORMS = (
    Norm("BN", _batch, lambda s: _batch(s, normkit)),
    Norm("LN", lambda s: nn.LayerNorm(s[1]), lambda s: normkit.LayerNorm(s[1])),
    Norm("RMS", lambda s: nn.RMSNorm(s[1]), lambda s: normkit.RMSNorm(s[1])),
    Norm(
        "add+RMS",
        lambda s: nn.RMSNorm(s[1]),
        lambda s: normkit.RMSNorm(s[1]),
        second=True,
        torch_call=_add_rms,  # type: ignore[arg-type]
        normkit_call=lambda layer, x, z: layer(x, add=z),
    ),
)


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    norm: Norm
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    mode: str

    @property
    def bytes(self) -> int:
        """The size of the input."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.norm.name} {shape} {self.layout} {dtype} {self.mode}"

    def tensor(self, device: str = "cpu") -> Tensor:
        x = torch.randn(self.shape, dtype=self.dtype, device=device)
        if self.layout == "channels_last":
            last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            x = x.contiguous(memory_format=last)
        return x


def cases() -> Iterator[Case]:
    """All rows."""
    for dtype in (torch.float32, torch.bfloat16):
        for mode in MODES:
            for shape in IMAGES:
                for layout in ("contiguous", "channels_last"):
                    for norm in IMAGE_NORMS:
                        if shape[1] % norm.multiple == 0:
                            yield Case(norm, shape, layout, dtype, mode)
            for shape in ROWS:
                for norm in ROW_NORMS:
                    yield Case(norm, shape, "contiguous", dtype, mode)
