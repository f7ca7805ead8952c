"""Test the explanations that docs/lab.md gives where a study disagrees with what was published.

    python docs/results/why.py

Writes why.json: median test accuracy of six seeds with its exact 95 % interval, by explanation.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from normkit.common.files import write
from normkit.lab.results.measures import percent, said
from normkit.lab.results.verdict import estimate
from normkit.lab.studies import affine, batch_size, placement
from normkit.lab.studies.optimizer import probe as sharpness
from normkit.lab.training.arms import Arm
from normkit.lab.training.batches import Batches
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data
from normkit.lab.training.models import build, layers, norms
from normkit.lab.training.probe import Probe, look
from normkit.lab.training.train import advance, make_optimizer, score

SEEDS, STEPS = range(6), 750
CONFIGS = {name: Config(data=name, steps=STEPS) for name in ("digits", "fashion-mnist")}
DATA = {name: load_data(config.resolved("why")) for name, config in CONFIGS.items()}


def trained(
    arm: Arm,
    change: Callable[[nn.Module], None],
    rate: float = 1.0,
    data: str = "digits",
    steps: int = STEPS,
) -> dict[str, str]:
    """Return test accuracies of the arm's network, changed before it is trained.

    `steps` are those of batches of 60; an arm of another batch size sees as many samples.
    """
    config = arm.applied(replace(CONFIGS[data], steps=steps), "why", 1.0)
    assert config.steps is not None
    accuracies, saturated = [], []
    for seed in SEEDS:
        model = build(config, DATA[data], arm, seed)
        with torch.no_grad():
            change(model)
        optimizer = make_optimizer(model, config, arm.rate * rate)
        batches = Batches(DATA[data].train, config.batch_size, seed)
        at = Probe(model, optimizer, batches, 0, DATA[data], config, arm, seed)
        seen = look(placement.probe, at)
        saturated.append(sum(seen[f"saturated.{i}"] for i in (1, 2, 3)) / 3)
        advance(model, optimizer, batches, 0, config.steps)
        accuracies.append(score(model, DATA[data].test)[1])
    return {
        "test accuracy": said(estimate(accuracies), percent),
        "saturated at the start": percent(estimate(saturated).median),
    }


def larger(factor: float) -> Callable[[nn.Module], None]:
    """Return what makes the initial weights larger."""

    def change(model: nn.Module) -> None:
        for layer in list(layers(model).values())[:-1]:
            layer.weight.mul_(factor)  # type: ignore[operator]

    return change


def scaled(factor: float) -> Callable[[nn.Module], None]:
    """Return what fixes the norms' scales at another value than 1."""

    def change(model: nn.Module) -> None:
        for norm in norms(model).values():
            norm.weight.mul_(factor)  # type: ignore[operator]

    return change


def unchanged(model: nn.Module) -> None:
    """Change nothing."""


def fixed_before_norms(model: nn.Module) -> None:
    """Keep all layers but the last at their initial weights."""
    for layer in list(layers(model).values())[:-1]:
        for parameter in layer.parameters():
            parameter.register_hook(torch.zeros_like)


def at_equal_loss(arm: Arm, rate: float, level: float = 0.1) -> dict[str, str]:
    """Return the curvature when the loss has come down to `level`, and the weights' size there."""
    config, data = arm.applied(CONFIGS["digits"], "why", 1.0), DATA["digits"]
    curved, sizes = [], []
    for seed in SEEDS:
        model = build(config, data, arm, seed)
        optimizer = make_optimizer(model, config, rate)
        batches = Batches(data.train, config.batch_size, seed)
        for step in range(0, 2 * STEPS, 10):
            advance(model, optimizer, batches, step, step + 10)
            at = Probe(model, optimizer, batches, step + 10, data, config, arm, seed)
            seen = look(sharpness, at)
            if seen["sample_loss"] <= level:
                break
        curved.append(seen["curvature"])
        sizes.append(sum(float(p.detach().square().sum()) for p in model.parameters()))
    relative = [value * size for value, size in zip(curved, sizes, strict=True)]
    values = {"largest eigenvalue": curved, "squared weights": sizes, "their product": relative}
    return {name: said(estimate(each), lambda v: f"{v:.3g}") for name, each in values.items()}


def main() -> None:
    """Write the results."""
    torch.set_num_threads(1)
    arms = {arm.name: arm for arm in (*placement.ARMS, *affine.ARMS)}
    short = Config().resolved("why", batch_size.STUDY.length)
    renorm = {arm.name: arm for arm in batch_size.arms(short, DATA["digits"])}
    small = renorm["renorm-2"]
    at_once = replace(small, arguments={**small.arguments, "r_steps": (0, 0), "d_steps": (0, 0)})
    found = {
        f"placement: norm before or after sigmoid, initial weights larger, {data}": {
            f"{place}, {factor:g}×": trained(arms[f"sigmoid-{place}"], larger(factor), data=data)
            for factor in (1.0, 4.0, 16.0)
            for place in placement.PLACES
        }
        for data in CONFIGS
    } | {
        "batch-size: batch renorm at 0.3 times the scaled rate": {
            name: trained(arm, change, rate=0.3, steps=short.steps or 0)
            for name, arm, change in (
                ("batches of 2", small, unchanged),
                ("batches of 2, limits open at once", at_once, unchanged),
                ("batches of 2, layers before norms fixed", small, fixed_before_norms),
                ("batches of 4", renorm["renorm-4"], unchanged),
                ("batches of 4, layers before norms fixed", renorm["renorm-4"], fixed_before_norms),
            )
        },
        "affine: neither scale nor shift learned, scales fixed at": {
            f"{factor:g}, rate {rate:g}": trained(arms["neither"], scaled(factor), rate)
            for factor in (0.05, 0.2, 1.0)
            for rate in (0.1, 1.0)
        },
        "optimizer: curvature where the training loss came down to 0.1": {
            "no norm, rate 3": at_equal_loss(Arm("none", "no norm"), 3.0),
            "batch norm, rate 1": at_equal_loss(Arm("batch", "batch norm", norm="batch"), 1.0),
        },
    }
    text = json.dumps(found, indent=1, ensure_ascii=False)
    write(Path(__file__).with_name("why.json"), text + "\n")


main()
