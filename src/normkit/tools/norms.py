"""Which norm a module is, whoever wrote it.

Torch's, timm's, torchvision's and detectron2's are known by the forward that runs. Whatever else
looks like a norm is held against normkit's layers on inputs of its own (`normkit.tools.recognize`),
and is either one of them or listed as unknown, with the reason.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from normkit.tools.known import Norm, Unknown, is_synchronized, known, name_of_act
from normkit.tools.recognize import recognize

__all__ = ["Norm", "Unknown", "identify", "is_frozen", "is_norm", "is_synchronized"]
__all__ += ["name_of_act", "read", "unknown_norms"]

_FAMILIES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def identify(module: nn.Module) -> Norm | Unknown | None:
    """What norm a module is, of any kind of `NORMS`; None for what doesn't look like one."""
    return known(module) or recognize(module)


def read(module: nn.Module) -> Norm | None:
    """What case of the formula a module is; None for all else."""
    norm = identify(module)
    return norm if isinstance(norm, Norm) and norm.entry.pool is not None else None


def is_norm(module: nn.Module) -> bool:
    """Whether it is one of torch's norms, or one that `read` knows."""
    return isinstance(module, _FAMILIES) or read(module) is not None


def unknown_norms(model: nn.Module) -> dict[str, str]:
    """Name -> why it isn't taken, of all that look like norms and aren't known."""
    found = ((name, identify(module)) for name, module in model.named_modules())
    return {name: norm.why for name, norm in found if isinstance(norm, Unknown)}


def is_frozen(model: nn.Module, module: nn.Module) -> bool:
    """Whether a norm keeps its statistics on purpose.

    By its class, by `freeze()`, or by being in evaluation inside a model in training.
    """
    norm = read(module)
    by_class = norm is not None and norm.kind == "frozen"
    own = bool(getattr(module, "frozen", False))
    return by_class or own or (model.training and not module.training)
