"""timm's models with random weights, small, and inputs for them."""

import timm
import torch
from torchvision.ops import FrozenBatchNorm2d

__all__ = ["NAMES", "FrozenBatchNorm2d", "create", "images"]

NAMES = ("resnet18", "convnext_atto", "efficientnet_b0", "vit_tiny_patch16_224")


def create(name, seed=0, side=32):
    """A model of timm's with 10 classes, in evaluation, its norms moved away from the identity."""
    torch.manual_seed(seed)
    more = {"img_size": side, "patch_size": 8} if name.startswith("vit") else {}
    model = timm.create_model(name, pretrained=False, num_classes=10, **more).eval()
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__ and hasattr(module, "eps"):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                if hasattr(module, "running_mean"):
                    module.running_mean.uniform_(-0.2, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
    return model


def images(n=2, side=32, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))
