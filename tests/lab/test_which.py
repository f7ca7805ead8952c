"""The rule of `norms` by simulation, and the bytes that it counts."""

import numpy as np
import torch
from simulate import run, runs, share, words
from torch import nn

from normkit.lab.studies.norms import ARMS, arms, finish, judge
from normkit.lab.study import Evidence
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data

CONFIG = Config(steps=100).resolved("norms")
DATA = load_data(CONFIG)
FEW = [arm for arm in ARMS if arm.name in ("none", "batch", "layer", "weight")]


def evidence(rng, n=6, **means):
    found = {arm.name: runs(rng, arm.name, n, means.get(arm.name, 0.9)) for arm in FEW}
    return Evidence(CONFIG, FEW, found, found, dict.fromkeys(found, 1.0))


def test_one_that_is_better_than_all_is_best():
    found = words(judge(evidence(np.random.default_rng(0), layer=0.97)))
    assert found["Normalization helps"] == "holds"
    assert found["One norm is best"] == "holds"


def test_two_that_are_alike_cannot_be_told_apart_and_are_named():
    findings = judge(evidence(np.random.default_rng(0), layer=0.97, batch=0.97))
    verdict = next(v for v in findings.verdicts if v.claim == "One norm is best")
    assert verdict.word == "inconclusive"
    assert "can't be told apart from" in verdict.because
    assert "no norm" not in verdict.because


def test_where_all_norms_are_worse_the_claim_is_reversed():
    found = words(judge(evidence(np.random.default_rng(0), layer=0.8, batch=0.8, weight=0.8)))
    assert found["Normalization helps"] == "reversed"


def test_without_an_effect_no_norm_helps_and_none_is_best_though_one_is_picked_out():
    for claim in ("Normalization helps", "One norm is best"):
        assert share(judge, evidence, claim, "holds", 200) <= 0.08, claim


def test_fastest_is_by_the_steps_to_the_target():
    rng = np.random.default_rng(0)
    made = evidence(rng)
    for seed, each in enumerate(made.tuned["batch"]):
        made.tuned["batch"][seed] = run("batch", seed, each.test_accuracy)
    for name in ("none", "layer", "weight"):
        for each in made.tuned[name]:
            values = each.curves["validation_accuracy"][1]
            values[:50] = [0.1] * 50
    assert words(judge(made))["One norm is fastest"] == "holds"


def test_what_does_not_fit_the_network_is_left_out_and_said():
    flat = [arm.name for arm in arms(CONFIG, DATA)]
    assert "instance" not in flat
    assert {"none", "batch", "group", "dyt", "weight", "spectral"} <= set(flat)
    images = [arm.name for arm in arms(Config(model="cnn").resolved("norms"), DATA)]
    assert {"instance", "frn", "grn"} <= set(images)
    notes = judge(evidence(np.random.default_rng(0))).notes
    assert any("Doesn't fit this network: " in note and "instance norm" in note for note in notes)


def test_saved_bytes_are_counted_once_and_without_weights():
    class At:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
        x = torch.randn(8, 1, 8, 8)
        batches = ((x, torch.zeros(8, dtype=torch.long)),)
        step = 0

    # The input, the log-softmax of 8 x 10, the 8 labels, and the loss's total weight.
    assert finish(At)["saved_bytes"] == 8 * 64 * 4 + 8 * 10 * 4 + 8 * 8 + 4
