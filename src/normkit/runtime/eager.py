"""Eager calls in one crossing into C++, where the extension for this torch is built.

Layers and functions ask the function of their family first. It does all of an ordinary call, the
autograd node included, or answers `NotImplemented`, having touched nothing; then Python's path
goes on. `docs/design.md` says what is ordinary.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from normkit import backend
from normkit.backend import cpu
from normkit.runtime import autograd, state

BUILD = "pip install --no-build-isolation -e ."
"""The command that builds it, in a checkout."""

_FILE = f"_eager.torch-{torch.version.git_version[:12]}{EXTENSION_SUFFIXES[0]}"
"""The extension of this torch and this Python; another torch lays its objects out otherwise."""


def _load() -> ModuleType | str:
    """The extension, or why there is none."""
    if os.environ.get("NORMKIT_NO_EAGER") == "1":
        return "switched off by NORMKIT_NO_EAGER=1"
    if (missing := cpu.available()) is not None:
        return missing
    folder = Path(__file__).parent.parent
    if not (folder / _FILE).exists():
        others = ", ".join(sorted(other.name for other in folder.glob("_eager.*")))
        found = f"built for another torch or Python ({others})" if others else "not built"
        return f"{found}; build it for this one by: {BUILD}"
    spec = importlib.util.spec_from_file_location("normkit._eager", folder / _FILE)
    assert spec is not None
    assert spec.loader is not None
    try:
        extension = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(extension)
    except ImportError as error:
        return f"can't be loaded: {error}; build it anew by: {BUILD}"
    extension.connect(state._written, backend._watching, vars(backend), cpu, _backward)
    return sys.modules.setdefault("normkit._eager", extension)


def _backward(
    constants: tuple[Any, ...],
    saved: tuple[Tensor | None, ...],
    has_residual: bool,
    has_add: bool,
    dy: Tensor,
    dtotal: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """A backward that isn't ordinary: differentiated, batched, traced."""
    spec = cpu.spec_of(*constants)
    context = SimpleNamespace(spec=spec, has_residual=has_residual, saved_tensors=saved)
    found = autograd.gradients_of(context, None, dy, dtotal)
    return *found, found.x if has_add else None


class _None:
    """Stands in for the extension."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return _takes_none


def _takes_none(*arguments: object) -> Any:
    return NotImplemented


_loaded = _load()
missing: str | None = _loaded if isinstance(_loaded, str) else None
"""Why all calls go Python's path, or None."""
calls: Any = _None() if isinstance(_loaded, str) else _loaded
"""The families' functions."""
