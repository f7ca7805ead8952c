"""Import this before whatever imports torchvision.

Its wheel is built against CUDA; beside a CPU build of torch its operators don't load, and its
import asks for the schema of two of them. No model here calls them.
"""

import sys

import torch

try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
    schemas = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

assert torchvision.ops
