"""The networks of a study; each takes `norm=`, a factory `norm(features) -> Module`, or None.

Normalization layers draw no random numbers, so one seed gives every arm the same initial weights. A
user's function that takes no `norm=` returns a network with norms, and an arm's are swapped in.
"""

import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from normkit.common.errors import LabError
from normkit.common.user_code import call, load
from normkit.lab.training import ranks
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.lab.training.norms import create, layer_of
from normkit.parametrizations import spectral_norm, weight_norm, weight_standardization
from normkit.tools.build import group_count
from normkit.tools.norms import is_norm
from normkit.tools.swap import swap

NormFactory = Callable[[int], nn.Module]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}
REPARAMETRIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight": weight_norm,
    "spectral": spectral_norm,
    "weight-standardization": weight_standardization,
}
"""What normalizes weights rather than features: of every layer but the last."""
_GROUPS = 8
_ACTIVATION_LAYERS = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ELU)


def norm_factory(arm: Arm) -> NormFactory | None:
    """Return what makes the arm's norms, their fixed parameters fixed; None where it has none."""
    if arm.norm == "none" or arm.norm in REPARAMETRIZATIONS:
        return None

    def norm(features: int) -> nn.Module:
        name = f"group:{group_count(features, _GROUPS)}" if arm.norm == "group" else arm.norm
        layer = create(name, features, **arm.arguments)
        for name in arm.fixed:
            getattr(layer, name).requires_grad_(False)
        return layer

    return norm


def build(config: Config, data: Data, arm: Arm, seed: int) -> nn.Module:
    """Return the arm's model for `data`, its weights drawn from `seed` and nothing else.

    `config` is the arm's own.
    """
    factory = norm_factory(arm)
    shape = tuple(data.train[0].shape[1:])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _construct(config, shape, data.classes, factory)
        if arm.norm in REPARAMETRIZATIONS:
            for layer in list(layers(model).values())[:-1]:
                REPARAMETRIZATIONS[arm.norm](layer)
    return model.to(config.device)


def check(data: Data, arms: Sequence[tuple[Arm, Config]]) -> None:
    """Build and call the model of every arm once; `arms` come with their own configurations.

    Of several ranks one may call it by itself.

    Raises LabError when it does not return class scores, does not use `norm=`, or starts from
    different weights with and without it, or has norms that its ranks can't sync; UserCodeError
    when it raises.
    """
    weights: dict[str, list[Tensor]] = {}
    for arm, config in arms:
        model = ranks.alone(ranks.synced(build(config, data, arm, 0), config.stats))
        x = data.train[0][: max(2, min(8, config.batch_size))]
        out = call(model, f"calling model {config.model!r} on inputs {tuple(x.shape)}", x)
        if not isinstance(out, Tensor) or out.shape != (len(x), data.classes):
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise LabError(
                f"model {config.model!r} returned {got} for inputs {tuple(x.shape)}; "
                f"it must return class scores of shape {(len(x), data.classes)}"
            )
        bare = arm.norm == "none" or arm.norm in REPARAMETRIZATIONS
        layer = None if bare else layer_of(arm.norm)
        if layer is not None and not any(isinstance(m, layer) for m in model.modules()):
            raise LabError(
                f"model {config.model!r} has no normalization layers though norm= was given; "
                "build them in it with norm(features) wherever it is not None"
            )
        if arm.norm in REPARAMETRIZATIONS:
            continue
        found = [cast(Tensor, layer.weight) for layer in layers(model).values()]
        # Networks with another activation start from weights of another scale.
        first = weights.setdefault(str(config.activation), found)
        if len(first) != len(found) or not all(map(torch.equal, first, found)):
            raise LabError(
                f"model {config.model!r} starts from different weights with and without norm=; "
                "draw the same random numbers in both, so that the arms can be paired by seed"
            )


def last_hidden(model: nn.Module) -> nn.Module:
    """Return the module whose input is followed: the last activation, else the last layer."""
    found = list(activations(model).values()) or list(layers(model).values())
    return (found or [model])[-1]


def activations(model: nn.Module) -> dict[str, nn.Module]:
    """Return the activations by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, _ACTIVATION_LAYERS)}


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that hold weights to learn (linear, convolutions) by name, in order."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the norms by name, in order."""
    return {name: module for name, module in model.named_modules() if is_norm(module)}


def _construct(
    config: Config, shape: tuple[int, ...], classes: int, norm: NormFactory | None
) -> nn.Module:
    act = _ACTIVATIONS[config.activation or "relu"]
    if ":" in config.model:
        return _users(config.model, norm)
    after = config.placement == "after"
    if config.model == "mlp":
        return mlp(int(torch.tensor(shape).prod()), classes, norm, act, after)
    if len(shape) != 3:
        raise LabError(
            f"model {config.model!r} takes images (C, H, W) and the data has shape {shape}; use mlp"
        )
    network = {"cnn": cnn, "resnet": resnet}[config.model]
    return network(shape[0], classes, norm, act, after)


def takes_norm(reference: str) -> bool:
    """Say whether the user's function takes `norm=`, rather than returning a network with norms."""
    parameters = inspect.signature(load(reference, "model")).parameters.values()
    return any(p.name == "norm" or p.kind is p.VAR_KEYWORD for p in parameters)


def _users(reference: str, norm: NormFactory | None) -> nn.Module:
    doing = f"building model {reference!r}"
    if takes_norm(reference):
        model = call(load(reference, "model"), doing, norm=norm)
    else:
        model = call(load(reference, "model"), doing)
    if not isinstance(model, nn.Module):
        raise LabError(f"model {reference!r} returned a {type(model).__name__}, no nn.Module")
    if takes_norm(reference):
        return model
    report = swap(model, norm or "none")
    if not report.facts["swapped"]:
        raise LabError(
            f"model {reference!r} takes no norm= and has no norms that could be swapped; give it "
            "an argument norm, a factory norm(features) -> Module or None, or build norms into it"
        )
    if left := [f"{row.layer} ({row.note})" for row in report.rows if row.left]:
        raise LabError(f"model {reference!r}: norms that can't be swapped: {', '.join(left)}")
    return report.model


def mlp(
    features: int,
    classes: int,
    norm: NormFactory | None,
    act: type[nn.Module] = nn.Sigmoid,
    after: bool = False,
) -> nn.Module:
    """The paper's network: 3 hidden layers of 100 units, small Gaussian weights, zero biases."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise([features, 100, 100, 100]):
        layers += [_drawn(nn.Linear(inputs, outputs), act), *_normed(norm, outputs, act, after)]
    return nn.Sequential(*layers, _drawn(nn.Linear(100, classes), act))


def cnn(
    channels: int,
    classes: int,
    norm: NormFactory | None,
    act: type[nn.Module] = nn.ReLU,
    after: bool = False,
) -> nn.Module:
    """A small VGG: 3x3 convolutions of 16, 32 and 64 channels, halved between, averaged, linear."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([channels, 16, 32, 64]):
        conv = _drawn(nn.Conv2d(inputs, outputs, 3, padding=1), act)
        layers += [conv, *_normed(norm, outputs, act, after), nn.MaxPool2d(2, ceil_mode=True)]
    head = _drawn(nn.Linear(64, classes), act)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def resnet(
    channels: int,
    classes: int,
    norm: NormFactory | None,
    act: type[nn.Module] = nn.ReLU,
    after: bool = False,
) -> nn.Module:
    """ResNet-20 after He et al. 2015: three stages of three blocks, 16, 32, 64 channels.

    `after` moves the norms behind the two activations that follow one at once, the stem's and the
    first of each block; a norm in front of a sum stays.
    """
    layers: list[nn.Module] = [
        _drawn(nn.Conv2d(channels, 16, 3, padding=1), act),
        *_normed(norm, 16, act, after),
    ]
    for inputs, outputs in [(16, 16), (16, 32), (32, 64)]:
        for inner in (inputs, outputs, outputs):
            layers.append(_Block(inner, outputs, norm, act, after))
    head = _drawn(nn.Linear(64, classes), act)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the channel count changes (and halves)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm: NormFactory | None,
        act: type[nn.Module],
        after: bool,
    ) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.body = nn.Sequential(
            _drawn(nn.Conv2d(inputs, outputs, 3, stride, padding=1), act),
            *_normed(norm, outputs, act, after),
            _drawn(nn.Conv2d(outputs, outputs, 3, padding=1), act),
            *_maybe(norm, outputs),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(
                _drawn(nn.Conv2d(inputs, outputs, 1, stride), act), *_maybe(norm, outputs)
            )
        )
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


def _normed(
    norm: NormFactory | None, features: int, act: type[nn.Module], after: bool
) -> list[nn.Module]:
    return [act(), *_maybe(norm, features)] if after else [*_maybe(norm, features), act()]


def _maybe(norm: NormFactory | None, features: int) -> list[nn.Module]:
    return [] if norm is None else [norm(features)]


def _drawn(layer: nn.Linear | nn.Conv2d, act: type[nn.Module]) -> nn.Module:
    """Draw the weights from N(0, gain / fan-in), gain 2 for ReLU (He) else 1 (LeCun); biases 0."""
    fan_in = layer.weight[0].numel()
    gain = 2.0 if act is nn.ReLU else 1.0
    nn.init.normal_(layer.weight, 0.0, (gain / fan_in) ** 0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
