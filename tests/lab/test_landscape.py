"""Santurkar's probes against float64 formulas, and the rule of the verdicts by simulation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from normkit.lab.results.store import Run
from normkit.lab.studies.landscape import ARMS, MULTIPLES, STUDY, judge, probe
from normkit.lab.study import Evidence, NotApplicable
from normkit.lab.training.batches import Batches
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data
from normkit.lab.training.models import build, check
from normkit.lab.training.probe import Probe, look
from normkit.lab.training.train import Task, advance, make_optimizer, train

CONFIG = Config(steps=60, eval_every=10).resolved("landscape")
DATA = load_data(CONFIG)
ARM = {arm.name: arm for arm in ARMS}


def standing(arm, double=False, optimizer="sgd"):
    """A probe of a network after five steps."""
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    data, model = DATA, build(config, DATA, arm, 0)
    if double:
        data = dataclasses.replace(DATA, train=(DATA.train[0].double(), DATA.train[1]))
        model = model.double()
    optimizer = make_optimizer(model, config, 0.5)
    batches = Batches(data.train, 60, 0)
    torch.manual_seed(0)
    advance(model, optimizer, batches, 0, 5)
    return Probe(model, optimizer, batches, 5, data, config, arm, 0)


def gradients(model, x, y):
    loss = nn.functional.cross_entropy(model(x), y)
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def flat(tensors):
    return np.concatenate([t.detach().numpy().ravel() for t in tensors])


@pytest.mark.parametrize("name", ["none", "batch"])
def test_the_three_probes_are_the_papers(name):
    at = standing(ARM[name], double=True)
    seen = look(probe, at)
    x, y = at.batches[5]
    start = [p.detach().clone() for p in at.model.parameters()]
    loss, gradient = gradients(at.model, x, y)
    g = flat(gradient)
    losses, distances, slopes = [], [], []
    for k in MULTIPLES:
        for p, s, d in zip(at.model.parameters(), start, gradient, strict=True):
            p.data = s - k * 0.5 * d
        value, there = gradients(at.model, x, y)
        losses.append(value)
        distances.append(np.linalg.norm(flat(there) - g))
        slopes.append(distances[-1] / np.linalg.norm(k * 0.5 * g))
    wanted = {
        "loss_here": loss,
        "loss_low": min(losses),
        "loss_high": max(losses),
        "loss_range": np.ptp(losses),
        "gradient_range": np.ptp(distances),
        "beta": max(slopes),
    }
    assert MULTIPLES == (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4)
    assert {key: seen[key] for key in wanted} == pytest.approx(wanted, rel=1e-9)


def test_the_covariate_shift_is_the_papers():
    at = standing(ARM["batch"], double=True)
    seen = look(probe, at)
    x, y = at.batches[5]
    names = [name for name, _ in at.model.named_parameters()]
    start = dict(zip(names, [p.detach().clone() for p in at.model.parameters()], strict=True))
    gradient = dict(zip(names, gradients(at.model, x, y)[1], strict=True))
    # The mlp's modules: linear layers at 1, 4, 7, 10, each norm behind its layer.
    for number, place in ((2, 4), (3, 7), (4, 10)):
        for name, p in at.model.named_parameters():
            below = int(name.split(".")[0]) < place
            p.data = start[name] - 0.5 * gradient[name] * below
        moved = dict(zip(names, gradients(at.model, x, y)[1], strict=True))
        a, b = (flat([found[f"{place}.weight"]]) for found in (gradient, moved))
        distance = np.linalg.norm(b - a)
        assert seen[f"ics_l2.{number}"] == pytest.approx(distance, rel=1e-9)
        assert seen[f"ics_relative.{number}"] == pytest.approx(distance / np.linalg.norm(a))
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert seen[f"ics_cosine.{number}"] == pytest.approx(cosine, rel=1e-9)
    assert "ics_l2.1" not in seen


@pytest.mark.parametrize("name", [arm.name for arm in ARMS])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_probing_leaves_no_trace_the_next_steps_are_bitwise_the_same(name, optimizer):
    ends = []
    for probed in (False, True):
        at = standing(ARM[name], optimizer=optimizer)
        if probed:
            assert all(map(math.isfinite, look(probe, at).values()))
        advance(at.model, at.optimizer, at.batches, 5, 8)
        ends.append((at.model.state_dict(), torch.get_rng_state()))
    (plain, state), (after, other) = ends
    assert all(torch.equal(plain[key], after[key]) for key in plain)
    assert torch.equal(state, other)


def test_noise_is_the_same_at_all_points_of_a_probe():
    at = standing(ARM["noisy"])
    at.optimizer.param_groups[0]["lr"] = 1e-6
    seen = look(probe, at)
    assert seen["loss_range"] < 1e-3
    assert seen["beta"] < 100


def test_the_noisy_arm_goes_on_bitwise_from_a_checkpoint(monkeypatch):
    monkeypatch.setattr("normkit.lab.training.train._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("normkit.lab.training.train._CHECKPOINT_SHARE", 1e9)
    task = Task(1, ARM["noisy"], 0, CONFIG, probe=probe, probes=3)
    reports = list(train(task, DATA))
    whole = {step: row for report in reports for step, row in report.rows.items()}
    cut = next(r for r in reports if r.checkpoint is not None and r.step == 30)
    torch.manual_seed(99)
    rest = list(train(dataclasses.replace(task, checkpoint=cut.checkpoint), DATA))
    rows = {step: row for report in rest for step, row in report.rows.items()}
    assert all(rows[step] == whole[step] for step in (40, 50, 60))
    assert [step for step in sorted(whole) if "beta" in whole[step]] == [20, 40, 60]


JUDGED = Config(steps=3000, eval_every=30).resolved("landscape")
EFFECT = {"rough": 1.0, "l2": 1.0, "cosine": 0.0, "pace": 1.0, "accuracy": 0.0}


def simulated(arm, seed, rng, status="finished", noise=0.15, **effect):
    """A run with the given factors and differences to the network without norm."""
    e = EFFECT | effect
    steps = list(range(30, 3001, 30))
    rise = 1 - np.exp(-np.array(steps) / (300 * e["pace"] * rng.lognormal(0, noise)))
    curves = {"validation_accuracy": (steps, (0.1 + 0.87 * rise).tolist())}
    factor = rng.lognormal(0, noise)
    for curve in ("loss_range", "gradient_range", "beta"):
        level = e["rough"] * factor * np.exp(-np.array(steps) / 1000)
        curves[curve] = (steps, level.tolist())
    curves["loss_here"] = curves["loss_low"] = curves["loss_high"] = curves["loss_range"]
    for layer in (2, 3):
        shift = 0.1 * e["l2"] * rng.lognormal(0, noise)
        curves[f"ics_l2.{layer}"] = curves[f"ics_relative.{layer}"] = (steps, [shift] * 100)
        cosine = 0.9 + e["cosine"] + rng.normal(0, 0.1 * noise)
        curves[f"ics_cosine.{layer}"] = (steps, [cosine] * 100)
    tested = 0.97 + e["accuracy"] + rng.normal(0, 0.02 * noise)
    found = tested if status == "finished" else None
    return Run(seed, arm, seed, status, 3000, 1.0, found, curves)


def verdicts(rng, n=6, **arms):
    runs = {
        arm.name: [simulated(arm.name, seed, rng, **arms.get(arm.name, {})) for seed in range(n)]
        for arm in ARMS
    }
    findings = judge(Evidence(JUDGED, ARMS, runs, runs, dict.fromkeys(runs, 1.0)))
    return {v.claim: v.word for v in findings.verdicts}


def rates(claim, repeats=20, **arms):
    rng = np.random.default_rng(0)
    found = [verdicts(rng, **arms)[claim] for _ in range(repeats)]
    return {word: found.count(word) / repeats for word in set(found)}


SMOOTHER = "Smoother surface"
SHIFT = "Not less internal covariate shift"
NOISY = "With noise it trains nearly as well"
GRADIENT = "The gradient through the statistics matters"


@pytest.mark.parametrize(
    ("claim", "arms", "said"),
    [
        (SMOOTHER, {"batch": {"rough": 0.4}}, "holds"),
        (SMOOTHER, {"batch": {"rough": 2.5}}, "reversed"),
        (SHIFT, {"batch": {"l2": 2.0, "cosine": -0.1}}, "holds"),
        (SHIFT, {"batch": {"l2": 0.3, "cosine": 0.2}}, "reversed"),
        (SHIFT, {"batch": {"l2": 2.0, "cosine": 0.2}}, "inconclusive"),
        (NOISY, {}, "holds"),
        (NOISY, {"noisy": {"accuracy": -0.1}}, "reversed"),
        (NOISY, {"noisy": {"accuracy": 0.02}}, "holds"),
        (GRADIENT, {"detached": {"pace": 3.0}}, "holds"),
        (GRADIENT, {"detached": {"pace": 0.3}}, "reversed"),
    ],
)
def test_planted_effects_are_found(claim, arms, said):
    assert rates(claim, **arms).get(said, 0) >= 0.9


def test_without_an_effect_the_comparisons_are_inconclusive_at_the_stated_rate():
    for claim in (SMOOTHER, GRADIENT):
        assert rates(claim, 40)["inconclusive"] >= 0.85, claim


def test_at_the_margin_the_claims_of_not_less_hold_at_most_at_the_stated_rate():
    at = {"batch": {"l2": 1 / 1.25, "cosine": 0.05}}
    assert rates(SHIFT, 40, **at).get("holds", 0) <= 0.1
    assert rates(NOISY, 40, noisy={"accuracy": -0.02}).get("holds", 0) <= 0.1


def test_one_probe_that_disagrees_makes_it_inconclusive():
    rng = np.random.default_rng(0)
    runs = {arm.name: [simulated(arm.name, seed, rng) for seed in range(6)] for arm in ARMS}
    for run in runs["batch"]:
        for curve, factor in (("loss_range", 0.2), ("gradient_range", 0.2), ("beta", 5.0)):
            steps, values = run.curves[curve]
            run.curves[curve] = (steps, [factor * value for value in values])
    findings = judge(Evidence(JUDGED, ARMS, runs, runs, {}))
    assert findings.verdicts[0].word == "inconclusive"
    assert "The three disagree" in findings.verdicts[0].because


def test_diverged_runs_are_rough_and_do_not_stop_the_verdicts():
    rng = np.random.default_rng(0)
    assert verdicts(rng, none={"status": "diverged"})[SMOOTHER] == "holds"
    assert verdicts(rng, none={"status": "diverged"})[SHIFT] == "inconclusive"
    assert set(verdicts(rng, n=5).values()) == {"range only"}


def test_a_network_of_one_layer_is_not_applicable(tmp_path, monkeypatch):
    (tmp_path / "flatnet.py").write_text(
        "from torch import nn\n"
        "def net(norm):\n"
        "    n = [norm(64)] if norm else []\n"
        "    return nn.Sequential(nn.Flatten(), *n, nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = Config(model="flatnet:net").resolved("landscape")
    with pytest.raises(NotApplicable, match="1 layer with weights"):
        STUDY.arms(config, DATA)


def test_every_arm_builds_in_every_network():
    for model in ("mlp", "cnn", "resnet"):
        config = dataclasses.replace(CONFIG, model=model)
        check(DATA, [(arm, config) for arm in ARMS])


def test_it_runs_from_end_to_end(tmp_path, command):
    words = ("--steps", 20, "--eval-every", 5, "--seeds", 1, "--jobs", 1, "--out", "out")
    ended = command("landscape", *words)
    assert ended.returncode == 0, ended.stderr
    assert "Smoother surface: range only" in ended.stdout
    page = (tmp_path / "out/report.html").read_text("utf-8")
    for figure in ("ratios", "loss", "gradient-range", "beta", "ics-l2", "ics-cosine", "accuracy"):
        assert f'id="figure-landscape-{figure}"' in page
