"""Whole training steps: small nets of the usual kinds, with torch's norms and with normkit's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normkit
from normkit.bench.cases import ChannelsFirstLayerNorm

Make = Callable[[int], nn.Module]


class _Residual(nn.Module):
    """ResNet's basic block; `fused` where the norm takes activation and sum with it."""

    def __init__(self, inside: int, outside: int, stride: int, norm: Make, fused: Make | None):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = (fused or norm)(outside), (fused or norm)(outside)
        self.fused = fused is not None
        same = stride == 1 and inside == outside
        self.short = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside))
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.norm2(self.conv2(self.norm1(self.conv1(x))), residual=self.short(x))
        y = F.relu_(self.norm1(self.conv1(x)))
        return F.relu_(self.norm2(self.conv2(y)).add_(self.short(x)))


def _resnet18(norm: Make, fused: Make | None = None) -> nn.Module:
    blocks: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), norm(64), nn.ReLU(True)]
    inside = 64
    for outside, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [
            _Residual(inside, outside, stride, norm, fused),
            _Residual(outside, outside, 1, norm, fused),
        ]
        inside = outside
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class _Bottleneck(nn.Module):
    """ResNet's bottleneck block."""

    def __init__(self, inside: int, width: int, stride: int, norm: Make):
        super().__init__()
        outside = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inside, width, 1, bias=False), norm(width), nn.ReLU(True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width), nn.ReLU(True)),
            *(nn.Conv2d(width, outside, 1, bias=False), norm(outside)),
        )
        self.short = (
            nn.Identity()
            if stride == 1 and inside == outside
            else nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


def resnet50(
    norm: Make = nn.BatchNorm2d, depths: tuple[int, int, int, int] = (3, 4, 6, 3)
) -> nn.Module:
    """ResNet-50 (arXiv 1512.03385), 1000 classes; other depths make other ResNets."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.ReLU(True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inside = 64
    for width, depth, stride in zip((64, 128, 256, 512), depths, (1, 2, 2, 2), strict=True):
        for i in range(depth):
            layers.append(_Bottleneck(inside, width, stride if i == 0 else 1, norm))
            inside = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int, norm: Make):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            norm(width),
            nn.Conv2d(width, 4 * width, 1),
            nn.GELU(),
            nn.Conv2d(4 * width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _convnext(norm: Make) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 48, 4, 4), norm(48)),
        *(_ConvNeXtBlock(48, norm) for _ in range(2)),
        *(norm(48), nn.Conv2d(48, 96, 2, 2)),
        *(_ConvNeXtBlock(96, norm) for _ in range(2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10)),
    )


class _UNet3d(nn.Module):
    def __init__(self, norm: Make):
        super().__init__()

        def block(inside: int, outside: int) -> nn.Module:
            return nn.Sequential(
                *(nn.Conv3d(inside, outside, 3, padding=1), norm(outside), nn.LeakyReLU(0.01)),
                *(nn.Conv3d(outside, outside, 3, padding=1), norm(outside), nn.LeakyReLU(0.01)),
            )

        self.down, self.bottom, self.up = block(1, 16), block(16, 32), block(48, 16)
        self.last = nn.Conv3d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        low = F.interpolate(self.bottom(F.max_pool3d(high, 2)), scale_factor=2.0)
        return self.last(self.up(torch.cat([high, low], 1)))


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, norm: Make):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, c))
        return x + self.mlp(self.norm2(x))


def _transformer(norm: Make) -> nn.Module:
    return nn.Sequential(*(_TransformerBlock(256, norm) for _ in range(6)), norm(256))


@dataclass(frozen=True)
class Model:
    """A net by its norm, its input, and the norms of both sides."""

    name: str
    build: Callable[..., nn.Module]
    shape: tuple[int, ...]
    layout: torch.memory_format
    theirs: tuple[Make, ...]
    ours: tuple[Make, ...]


_CONTIGUOUS, _LAST, _LAST_3D = (
    torch.contiguous_format,
    torch.channels_last,
    torch.channels_last_3d,
)
_IMAGES = (128, 3, 32, 32)
MODELS = (
    *(
        Model(
            f"ResNet-18{how}, {layout}", _resnet18, _IMAGES, memory_format, (nn.BatchNorm2d,), ours
        )
        for layout, memory_format in (("contiguous", _CONTIGUOUS), ("channels_last", _LAST))
        for how, ours in (
            ("", (normkit.BatchNorm2d,)),
            (" fused", (normkit.BatchNorm2d, lambda c: normkit.BatchNorm(c, act="relu"))),
        )
    ),
    Model(
        *("ConvNeXt-style", _convnext, (32, 3, 64, 64), _CONTIGUOUS),
        (ChannelsFirstLayerNorm,),
        (lambda c: normkit.LayerNorm(c, channels_first=True),),
    ),
    Model(
        *("3d U-Net, instance norm, channels_last", _UNet3d, (2, 1, 16, 48, 48), _LAST_3D),
        (lambda c: nn.InstanceNorm3d(c, affine=True),),
        (lambda c: normkit.InstanceNorm3d(c, affine=True),),
    ),
    Model(
        *("6-layer transformer, RMSNorm", _transformer, (8, 128, 256), _CONTIGUOUS),
        (nn.RMSNorm,),
        (normkit.RMSNorm,),
    ),
)


def training_step(model: Model, norms: tuple[Make, ...]) -> Callable[[], object]:
    """Forward, backward and a plain SGD step."""
    torch.manual_seed(0)
    net = model.build(*norms).to(memory_format=model.layout)  # type: ignore[call-overload]
    x = torch.randn(model.shape)
    if model.layout is not _CONTIGUOUS:
        x = x.contiguous(memory_format=model.layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()

    return step
