"""The tools are tested on models of other packages: without those there is nothing to collect."""

import importlib.util

_NEEDS = ("numpy", "timm", "onnxruntime", "playwright", "lightning", "transformers")
_HERE = all(map(importlib.util.find_spec, _NEEDS))
collect_ignore_glob = [] if _HERE else ["test_*.py"]
if _HERE:
    import torchvision_on_cpu  # noqa: F401
