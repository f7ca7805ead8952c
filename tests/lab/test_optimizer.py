"""The curvature of `optimizer` against dense Hessians, and its rules by simulation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from simulate import paced, share, words

from normkit.lab.studies.optimizer import STUDY, arms, at_loss, judge, matched, probe
from normkit.lab.study import Evidence, NotApplicable
from normkit.lab.training.batches import Batches
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data
from normkit.lab.training.models import build
from normkit.lab.training.probe import Probe, look
from normkit.lab.training.train import advance, make_optimizer

GIVEN = Config(steps=400)
CONFIG = GIVEN.resolved("optimizer")
DATA = load_data(CONFIG)
ARMS = arms(CONFIG, DATA)
WAY, SURFACE = "Optimizers change the way down", "Normalization changes the surface more"


def standing(arm):
    """A probe of a network after five steps."""
    config = arm.applied(GIVEN, "optimizer", 1.0)
    model, batches = build(config, DATA, arm, 0), Batches(DATA.train, 60, 0)
    optimizer = make_optimizer(model, config, 1.0)
    torch.manual_seed(0)
    advance(model, optimizer, batches, 0, 5)
    return Probe(model, optimizer, batches, 5, DATA, config, arm, 0)


@pytest.mark.parametrize("name", ["adam-batch", "momentum-none"])
def test_probing_leaves_no_trace_and_looks_at_the_same_samples_each_time(name):
    arm = next(arm for arm in ARMS if arm.name == name)
    ends = []
    for probed in (False, True):
        at = standing(arm)
        if probed:
            first = look(probe, at)
            assert first["curvature"] > 0
            assert look(probe, dataclasses.replace(at, step=3, seed=5)) == first
        advance(at.model, at.optimizer, at.batches, 5, 8)
        ends.append(at.model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_every_optimizer_starts_at_its_own_rate_and_a_given_one_is_of_the_configurations():
    rates = {"sgd": 1.0, "momentum": 0.1, "rmsprop": 0.001, "adam": 0.001}
    for arm in ARMS:
        config = arm.applied(GIVEN, "optimizer", 1.0)
        assert config.optimizer == arm.name.partition("-")[0]
        assert config.lr == rates[config.optimizer]
    given = dataclasses.replace(GIVEN, lr=0.5)
    for arm in arms(given.resolved("optimizer"), DATA):
        config = arm.applied(given, "optimizer", 1.0)
        assert config.lr == (rates | {"sgd": 0.5})[config.optimizer]


def test_too_few_samples_are_said():
    few = dataclasses.replace(DATA, train=tuple(part[:200] for part in DATA.train))
    with pytest.raises(NotApplicable, match=r"200 training samples; .* 4 batches of 60"):
        arms(CONFIG, few)


def test_the_curvature_at_a_loss_is_interpolated_in_logarithms():
    each = paced(np.random.default_rng(0), "sgd-none", 1)[0]
    each.curves["sample_loss"] = ([1, 2, 3], [4.0, 1.0, 2.0])
    each.curves["curvature"] = ([1, 2, 3], [1.0, 100.0, 7.0])
    assert at_loss(each, 2.0) == pytest.approx(math.log(10.0))
    assert at_loss(each, 4.0) == pytest.approx(0.0)
    assert at_loss(each, 5.0) == pytest.approx(0.0)
    assert at_loss(each, 1.0) == pytest.approx(math.log(100.0))
    assert math.isnan(at_loss(each, 0.5))
    assert math.isnan(at_loss(dataclasses.replace(each, status="diverged"), 2.0))


def evidence(rng, n=6, paces=None, sharp=None, noise=0.15, status="finished"):
    """Runs whose loss falls evenly in steps, whose curvature rises as it falls."""
    found = {}
    for arm in ARMS:
        runs = paced(rng, arm.name, n, pace=(paces or {}).get(arm.name, 40))
        floor = 0.01 * rng.lognormal(0, 0.5)
        for each in runs:
            losses = np.geomspace(2.3, floor, 30)
            level = (sharp or {}).get(arm.name, 1.0) * rng.lognormal(0, noise)
            at = list(range(10, 310, 10))
            each.curves["sample_loss"] = (at, losses.tolist())
            each.curves["curvature"] = (at, (level * losses**-0.3).tolist())
        found[arm.name] = runs
    if status != "finished":
        found["sgd-none"][0] = dataclasses.replace(found["sgd-none"][0], status=status)
    return Evidence(CONFIG, ARMS, found, found, dict.fromkeys(found, 1.0))


def by(kind, factor):
    """A factor for every arm whose name has `kind`."""
    return {arm.name: factor for arm in ARMS if kind in arm.name}


@pytest.mark.parametrize(
    ("claim", "word", "planted"),
    [
        (WAY, "holds", {"paces": {"adam-batch": 20}}),
        (WAY, "holds", {"paces": {"momentum-none": 90}}),
        (SURFACE, "holds", {"sharp": by("batch", 0.2)}),
        (SURFACE, "holds", {"sharp": by("batch", 5.0)}),
        (SURFACE, "reversed", {"sharp": by("adam", 5.0) | by("momentum", 0.3)}),
        (SURFACE, "holds", {"sharp": by("batch", 20.0) | by("adam-none", 3.0)}),
    ],
)
def test_planted_effects_are_found(claim, word, planted):
    assert share(judge, lambda rng: evidence(rng, **planted), claim, word, 5) == 1


def test_without_an_effect_the_words_are_wrong_at_most_at_the_stated_rate():
    rng = np.random.default_rng(0)
    ways, surfaces = [], []
    for _ in range(60):
        found = words(judge(evidence(rng)))
        ways.append(found[WAY])
        surfaces.append(found[SURFACE])
    assert ways.count("holds") <= 7
    assert surfaces.count("holds") + surfaces.count("reversed") <= 6


def test_optimizers_that_are_as_quick_are_a_little_difference():
    quiet = dict.fromkeys((arm.name for arm in ARMS), 40)
    rng = np.random.default_rng(3)
    found = [words(judge(evidence(rng, paces=quiet)))[WAY] for _ in range(10)]
    assert found.count("little difference") >= 8


def test_the_loss_that_all_are_compared_at_is_the_lowest_that_all_reached():
    made = evidence(np.random.default_rng(0), noise=0.0)
    seeds = matched(made.tuned)
    for seed, each in seeds.items():
        floors = [runs[seed].curves["sample_loss"][1][-1] for runs in made.tuned.values()]
        assert each.level == max(floors)
        assert len(each.curvatures) == 8
        wanted = math.log(each.level**-0.3)
        assert list(each.curvatures.values()) == pytest.approx([wanted] * 8)
        assert each.by_norm() == pytest.approx([0.0] * 4, abs=1e-9)
        assert len(each.by_optimizer()) == 12


def test_a_seed_with_a_diverged_run_is_left_out_and_said():
    rng = np.random.default_rng(0)
    found = judge(evidence(rng, n=7, status="diverged", sharp=by("batch", 0.2)))
    assert words(found)[SURFACE] == "holds"
    assert any("1 seeds with a diverged run are left out" in note for note in found.notes)
    assert set(words(judge(evidence(rng, n=5))).values()) == {"range only"}


def test_it_runs_from_end_to_end(tmp_path, command):
    words = ("--steps", 4, "--eval-every", 2, "--seeds", 1, "--jobs", 1, "--out", "out")
    ended = command("optimizer", *words, "--arms", "sgd-none,adam-none,sgd-batch,adam-batch")
    assert ended.returncode == 0, ended.stderr
    assert f"{SURFACE}: range only" in ended.stdout
    page = (tmp_path / "out/report.html").read_text("utf-8")
    for figure in ("curvature", "trajectory", "accuracy", "paces"):
        assert f'id="figure-optimizer-{figure}"' in page
    assert STUDY.tuned
