"""Trains and applies timm models, swapped, fused and folded, in both layouts: for `make sanitize`.

No model whose first convolution is strided and 1x1, as RepVGG's: in channels_last the gradient of
its weight writes beyond oneDNN's scratchpad (github.com/uxlfoundation/oneDNN/issues/6035).
"""

import copy
import sys
import warnings

import torch

sys.path.insert(0, "tests/tools")
import torchvision_on_cpu  # noqa: F401
from zoo import NAMES, create, images

import normkit

OTHERS = ("ghostnet_100", "hrnet_w18_small", "mobilenetv2_100", "regnetx_002")


def variants(model, x):
    """The model in the forms that run on the core, those to train and those to apply."""
    swapped = normkit.swap(copy.deepcopy(model)).model
    fused = normkit.swap(copy.deepcopy(model).train(), fuse=True, example=x).model
    folded = normkit.fold(copy.deepcopy(model), x).model
    return (swapped.train(), fused), (copy.deepcopy(swapped).eval(), folded)


def main():
    torch.set_num_threads(2)
    for name in (*NAMES, *OTHERS):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = images(4, 64).contiguous(memory_format=layout)
            trained, applied = variants(create(name, side=64), x)
            for model in trained:
                model.to(memory_format=layout)(x).square().mean().backward()
                assert all(p.grad.isfinite().all() for p in model.parameters())
            with torch.no_grad():
                for model in applied:
                    assert model.to(memory_format=layout)(x[:1]).isfinite().all()
        print(name, flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
