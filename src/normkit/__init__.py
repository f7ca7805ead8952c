"""Normalization layers, kernels, studies and tools for PyTorch."""

from . import functional
from .dispatch import backends, explain, info
from .layers import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from .tools.fold import fold
from .tools.inspect import inspect
from .tools.recalibrate import recalibrate
from .tools.swap import swap

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "backends",
    "explain",
    "fold",
    "functional",
    "info",
    "inspect",
    "recalibrate",
    "swap",
]
