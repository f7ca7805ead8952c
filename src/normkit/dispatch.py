"""What would run, and why: `backends`, `explain` and `info`."""

from __future__ import annotations

import copy
import platform
from typing import Any

import torch
from torch import nn

from normkit import backend, layers
from normkit.common.version import VERSION
from normkit.runtime import eager


def backends() -> dict[str, str | None]:
    """The backends in order of preference: name -> why it can't be used here, None where it can."""
    return {name: module.available() for name, module in backend.BACKENDS.items()}


def explain(layer: nn.Module, *args: Any, **kwargs: Any) -> str:
    """Which backend `layer(*args, **kwargs)` would run on, and why not the others.

    The layer stays as it is: a copy of it is called, without gradients.

    Raises:
        TypeError: the layer isn't one of normkit's.
    """
    if not isinstance(layer, layers._Norm):
        raise TypeError(f"explain takes a normkit layer, got {type(layer).__name__}")
    alone = copy.deepcopy(layer)
    if isinstance(alone, layers._BatchLayer):
        alone.merge = None
    with torch.no_grad(), backend.watch() as calls:
        alone(*args, **kwargs)
    if not calls:
        return f"{layer} runs on: torch's operators; it is no case of the formula"
    spec, inputs = calls[0]
    chosen = backend.name_of(backend.choose(spec, inputs))
    x = inputs.x
    head = f"{layer} on {x.dtype} {tuple(x.shape)} ({x.device}) runs on: {chosen}"
    return "\n  ".join([head, *backend.reasons(spec, inputs)])


def info() -> str:
    """Versions, machine and the state of every backend, a line each."""
    rows = {
        "normkit": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else "not available",
    }
    rows |= {f"backend {name}": why or "available" for name, why in backends().items()}
    if backends()["cpu"] is None:
        rows["backend cpu"] += f", {backend.cpu.instructions()}"
    rows["eager calls"] = f"by Python: {eager.missing}" if eager.missing else "by the extension"
    width = max(map(len, rows))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())
