"""Normalization layers, kernels, studies and tools for PyTorch."""

from . import functional, parametrizations, recompute
from .beside import DyT, FilterResponseNorm, GlobalResponseNorm
from .dispatch import backends, explain, info
from .factory import create
from .layers import (
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
from .standardize import Standardize
from .state import functional_call
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
    "BatchRenorm",
    "DyT",
    "FilterResponseNorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "GlobalResponseNorm",
    "GroupNorm",
    "InstanceNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "RMSNorm",
    "Standardize",
    "SyncBatchNorm",
    "backends",
    "create",
    "explain",
    "fold",
    "functional",
    "functional_call",
    "info",
    "inspect",
    "parametrizations",
    "recalibrate",
    "recompute",
    "swap",
]
