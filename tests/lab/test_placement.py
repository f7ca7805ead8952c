"""What `placement` and `affine` build and measure, against formulas."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import normkit
from normkit.lab.studies import affine
from normkit.lab.studies.placement import ARMS, STUDY, probe
from normkit.lab.study import NotApplicable
from normkit.lab.training.batches import Batches
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data
from normkit.lab.training.models import build, check, norms
from normkit.lab.training.probe import Probe, look
from normkit.lab.training.train import advance, make_optimizer

GIVEN = Config(steps=60, eval_every=10)
CONFIG = GIVEN.resolved("placement")
DATA = load_data(CONFIG)


def standing(arm, data=DATA):
    """A probe of a network after five steps."""
    config = arm.applied(GIVEN, "placement", 1.0)
    model = build(config, DATA, arm, 0)
    if data.train[0].dtype == torch.float64:
        model = model.double()
    optimizer = make_optimizer(model, config, 1.0)
    batches = Batches(data.train, 60, 0)
    torch.manual_seed(0)
    advance(model, optimizer, batches, 0, 5)
    return Probe(model, optimizer, batches, 5, data, config, arm, 0)


@pytest.mark.parametrize("arm", ARMS, ids=[arm.name for arm in ARMS])
def test_saturated_units_and_gradient_norms_are_those_of_numpy(arm):
    data = dataclasses.replace(DATA, train=(DATA.train[0].double(), DATA.train[1]))
    at = standing(arm, data)
    with torch.no_grad():
        # What feeds the first activation, so that some of its units are flat.
        at.model[2 if arm.name.endswith("before") else 1].weight.mul_(6)
    seen = look(probe, at)
    x, y = at.batches[5]
    slopes = {
        "sigmoid": lambda v: 4 / (1 + np.exp(-v)) / (1 + np.exp(v)),
        "tanh": lambda v: 1 / np.cosh(v) ** 2,
        "relu": lambda v: np.where(v > 0, 1.0, 0.0),
    }
    slope = slopes[arm.options["activation"]]
    number, value = 0, x
    at.model.train()
    for module in at.model:
        if isinstance(module, (nn.Sigmoid, nn.Tanh, nn.ReLU)):
            number += 1
            flat = slope(value.detach().numpy()) < 0.05
            assert seen[f"saturated.{number}"] == pytest.approx(flat.mean(), abs=1e-12)
        value = module(value)
    assert number == 3
    assert seen["saturated.1"] > 0
    at.model.zero_grad()
    nn.functional.cross_entropy(value, y).backward()
    linear = [module for module in at.model if isinstance(module, nn.Linear)]
    for number, module in enumerate(linear, 1):
        wanted = np.sqrt((module.weight.grad.numpy() ** 2).sum())
        assert seen[f"gradient.{number}"] == pytest.approx(wanted, rel=1e-9)
    assert len(seen) == 7


@pytest.mark.parametrize("arm", [ARMS[0], ARMS[5]], ids=lambda arm: arm.name)
def test_probing_leaves_no_trace(arm):
    ends = []
    for probed in (False, True):
        at = standing(arm)
        if probed:
            assert all(map(math.isfinite, look(probe, at).values()))
        advance(at.model, at.optimizer, at.batches, 5, 8)
        ends.append(at.model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_the_norm_stands_where_the_arm_says_at_the_activations_own_rate():
    rates = {"sigmoid": 1.0, "tanh": 0.1, "relu": 0.1}
    for arm in ARMS:
        config = arm.applied(GIVEN, "placement", 1.0)
        activation, place = arm.name.split("-")
        assert config.lr == rates[activation]
        kinds = [type(module).__name__.lower() for module in build(config, DATA, arm, 0)][2:4]
        assert kinds == (
            ["batchnorm", activation] if place == "before" else [activation, "batchnorm"]
        )
    for model in ("mlp", "cnn", "resnet"):
        given = dataclasses.replace(GIVEN, model=model)
        check(
            DATA, [(arm, arm.applied(given, "placement", 1.0)) for arm in STUDY.arms(given, DATA)]
        )


def test_what_a_users_model_cannot_honour_is_not_applicable():
    with pytest.raises(NotApplicable, match="where its norms stand and what its activations are"):
        STUDY.arms(dataclasses.replace(CONFIG, model="mine:net"), DATA)
    with pytest.raises(NotApplicable, match="--placement after: this study places the norms"):
        STUDY.arms(dataclasses.replace(CONFIG, placement="after"), DATA)


def test_what_an_arm_does_not_learn_stays_and_the_rest_moves():
    for arm in affine.arms(CONFIG, DATA):
        at = standing(arm)
        found = look(affine.finish, at)
        assert len(found) == 3
        for name, norm in norms(at.model).items():
            assert isinstance(norm, normkit.BatchNorm)
            for kind, first in (("weight", 1.0), ("bias", 0.0)):
                values = getattr(norm, kind).detach().double().numpy()
                mean, deviation = found[name][kind]
                assert mean == pytest.approx(values.mean())
                assert deviation == pytest.approx(values.std())
                assert (deviation == 0 and mean == first) == (kind in arm.fixed), (arm, kind)


def test_arms_behind_the_activation_only_where_they_can_be_and_are_not_there_already():
    names = [arm.name for arm in affine.arms(CONFIG, DATA)]
    assert names == ["both", "scale", "shift", "neither", "behind-both", "behind-neither"]
    for change in ({"model": "mine:net"}, {"placement": "after"}):
        assert affine.arms(dataclasses.replace(CONFIG, **change), DATA) == affine.ARMS


def test_behind_the_activation_scale_and_shift_change_nothing_that_can_be_represented():
    arm = affine.BEHIND[0]
    model = build(arm.applied(GIVEN, "affine", 1.0), DATA, arm, 0).double().eval()
    x = DATA.test[0].double()
    with torch.no_grad():
        for norm in norms(model).values():
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
        wanted = model(x)
        modules = list(model)
        for norm, after in pairwise(modules):
            if isinstance(norm, normkit.BatchNorm):
                after.bias.add_(after.weight @ norm.bias)
                after.weight.mul_(norm.weight)
                norm.weight.fill_(1)
                norm.bias.zero_()
    assert torch.allclose(model(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("study", "figures"),
    [
        ("placement", ("accuracy", "gains", "paces", "saturated", "gradient")),
        ("affine", ("gains", "paces", "accuracy")),
    ],
)
def test_it_runs_from_end_to_end(study, figures, tmp_path, command):
    words = ("--steps", 10, "--eval-every", 5, "--seeds", 1, "--jobs", 1, "--out", "out")
    ended = command(study, *words)
    assert ended.returncode == 0, ended.stderr
    assert "range only" in ended.stdout
    page = (tmp_path / "out/report.html").read_text("utf-8")
    for figure in figures:
        assert f'id="figure-{study}-{figure}"' in page
