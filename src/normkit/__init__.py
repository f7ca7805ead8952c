"""Normalization layers, kernels, studies and tools for PyTorch."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from normkit.common.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from normkit.api import *  # noqa: F403
else:

    def __getattr__(name):
        """Import at the first use, since torch takes seconds and `normkit --help` needs none."""
        public = name.isidentifier() and not name.startswith("_")
        if public and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        api = importlib.import_module(f"{__name__}.api")
        if name not in ("__all__", *api.__all__):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(api, name)
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
