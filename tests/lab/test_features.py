"""The spectrum against dense Hessians, the contour, and the rule of the verdicts by simulation."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from normkit.lab.numerics import unevenness
from normkit.lab.results.store import Run
from normkit.lab.studies.features import (
    ARMS,
    contour,
    finish,
    judge,
)
from normkit.lab.studies.features import STUDY as FEATURES
from normkit.lab.study import Evidence, NotApplicable
from normkit.lab.training.batches import Batches
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data, scaled
from normkit.lab.training.models import build
from normkit.lab.training.probe import Probe, look
from normkit.lab.training.train import advance, make_optimizer

CONFIG = Config(data="wine", steps=3000, eval_every=30).resolved("features")
DATA = load_data(CONFIG)
ARM = {arm.name: arm for arm in ARMS}


def standing(name, data=DATA, config=CONFIG, seed=0):
    arm = ARM[name]
    own = dataclasses.replace(config, **arm.options)
    fed = scaled(data, own.inputs)
    model = build(own, fed, arm, seed)
    optimizer = make_optimizer(model, own, 1.0)
    batches = Batches(fed.train, 60, seed)
    advance(model, optimizer, batches, 0, 3)
    return Probe(model, optimizer, batches, 3, fed, own, arm, seed)


@pytest.mark.parametrize("name", ["standardized", "raw"])
def test_the_contour_is_the_loss_at_moved_weights(name):
    at = standing(name)
    found = contour(at)
    deviations = scaled(DATA, "raw").train[0].std(0)
    assert found["wide"] == int(deviations.argmax()) == 12
    assert found["middle"] == int(deviations.argsort()[6])
    x, y = at.data.train
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(at.model(x), y))
    assert found["at"][12] == 0
    assert found["loss"][12][12] == pytest.approx(loss, rel=1e-6)
    size = float(x.double()[:, 12].square().mean().sqrt())
    signs = 2.0 * torch.randint(0, 2, (100,), generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        at.model[1].weight[:, 12] += found["at"][20] * signs / size
        at.model[1].weight[:, found["middle"]] += found["at"][3] * signs / size
        moved = float(nn.functional.cross_entropy(at.model(x), y))
    assert found["loss"][3][20] == pytest.approx(moved, rel=1e-5)


@pytest.mark.parametrize("name", [arm.name for arm in ARMS])
def test_looking_at_the_end_leaves_no_trace(name):
    at = standing(name)
    state = torch.get_rng_state()
    before = {key: value.clone() for key, value in at.model.state_dict().items()}
    found = look(finish, at)
    assert all(torch.equal(value, before[key]) for key, value in at.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert found["start"] > 1
    assert ("contour" in found) == (name in ("standardized", "raw"))
    assert "contour" not in look(finish, dataclasses.replace(at, seed=1))


def test_the_start_is_of_the_first_weights_of_the_runs_seed():
    at = standing("raw", seed=3)
    x, y = at.data.train
    fresh = build(at.config, at.data, at.arm, 3).train()
    assert look(finish, at)["start"] == unevenness(fresh, x, y, 3)


def simulated(arm, seed, rng, pace=200, final=0.97, uneven=1.0, spread=1000.0, status="finished"):
    steps = np.arange(30, 3001, 30)
    accuracy = 0.1 + (final - 0.1) * (1 - np.exp(-steps / (pace * rng.lognormal(0, 0.15))))
    curves = {"validation_accuracy": (steps.tolist(), accuracy.tolist())}
    levels = {when: 500 * uneven * rng.lognormal(0, 0.3) for when in ("start", "end")}
    found = {**levels, "spread": spread} if status == "finished" else {}
    tested = final if status == "finished" else None
    return Run(seed, arm, seed, status, 3000, 1.0, tested, curves, found)


def judged(rng, n=6, **arms):
    runs = {
        arm.name: [simulated(arm.name, seed, rng, **arms.get(arm.name, {})) for seed in range(n)]
        for arm in ARMS
    }
    return judge(Evidence(CONFIG, ARMS, runs, runs, dict.fromkeys(runs, 1.0)))


def rates(claim, repeats=20, **arms):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(repeats):
        found += [v.word for v in judged(rng, **arms).verdicts if v.claim == claim]
    return {word: found.count(word) / repeats for word in set(found)}


@pytest.mark.parametrize(
    ("claim", "raw", "said"),
    [
        ("Fewer steps", {"pace": 600}, "holds"),
        ("Fewer steps", {"pace": 70}, "reversed"),
        ("Fewer steps", {"final": 0.5}, "holds"),
        ("Fewer steps", {"status": "diverged"}, "holds"),
        ("Rounder surface", {"uneven": 10}, "holds"),
        ("Rounder surface", {"uneven": 0.1}, "reversed"),
        ("Rounder surface", {"status": "diverged"}, "inconclusive"),
    ],
)
def test_planted_effects_are_found(claim, raw, said):
    assert rates(claim, raw=raw).get(said, 0) >= 0.9


def test_without_an_effect_both_are_inconclusive_at_the_stated_rate():
    for claim in ("Fewer steps", "Rounder surface"):
        assert rates(claim, 40)["inconclusive"] >= 0.87, claim


def test_an_effect_at_the_start_alone_is_inconclusive():
    rng = np.random.default_rng(0)
    runs = {arm.name: [simulated(arm.name, seed, rng) for seed in range(6)] for arm in ARMS}
    for run in runs["raw"]:
        run.found["start"] *= 100
    findings = judge(Evidence(CONFIG, ARMS, runs, runs, {}))
    assert findings.verdicts[1].word == "inconclusive"


def test_the_table_names_slower_and_faster_arms():
    rng = np.random.default_rng(0)
    rows = judged(rng, raw={"pace": 900}, whitened={"pace": 50}).rows
    told = {row[0]: row[4] for row in rows}
    assert told["raw"].startswith("slower, p = ")
    assert told["whitened"].startswith("faster, p = ")
    assert told["standardized"] == ""


def test_one_range_is_said_in_verdicts_and_notes():
    rng = np.random.default_rng(0)
    one = judged(rng, raw={"spread": 1.0})
    assert all("All features come in one range here" in v.because for v in one.verdicts)
    assert "says nothing about features of unequal ranges" in " ".join(one.notes)
    assert "one range here" not in judged(rng).verdicts[0].because


def test_five_seeds_give_ranges():
    words = {v.word for v in judged(np.random.default_rng(0), n=5).verdicts}
    assert words == {"range only"}


def test_where_it_cannot_be_done_it_says_why():
    with pytest.raises(NotApplicable, match="--inputs raw: this study scales"):
        FEATURES.arms(dataclasses.replace(CONFIG, inputs="raw"), DATA)
    one = dataclasses.replace(DATA, train=(DATA.train[0][:, :1], DATA.train[1]))
    with pytest.raises(NotApplicable, match="has one feature"):
        FEATURES.arms(CONFIG, one)
    wide = dataclasses.replace(DATA, train=(torch.zeros(2, 2001), DATA.train[1]))
    assert "whitened" not in [arm.name for arm in FEATURES.arms(CONFIG, wide)]


def test_it_runs_from_end_to_end(tmp_path, command):
    words = ("--steps", 20, "--eval-every", 5, "--seeds", 1, "--jobs", 1, "--out", "out")
    ended = command("features", "--data", "wine", *words)
    assert ended.returncode == 0, ended.stderr
    assert "Fewer steps: range only" in ended.stdout
    page = (tmp_path / "out/report.html").read_text("utf-8")
    for figure in ("accuracy", "unevenness", "contour"):
        assert f'id="figure-features-{figure}"' in page
