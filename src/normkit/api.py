"""What `import normkit` offers."""

from normkit import functional, parametrizations
from normkit.dispatch import backends, explain, info
from normkit.factory import create, register
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
from normkit.runtime import recompute
from normkit.runtime.state import functional_call
from normkit.standalone import DyT, FilterResponseNorm, GlobalResponseNorm
from normkit.standardize import Standardize
from normkit.tools.fold import fold
from normkit.tools.inspect import inspect
from normkit.tools.recalibrate import recalibrate
from normkit.tools.swap import swap

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
    "register",
    "swap",
]
