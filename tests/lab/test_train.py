"""Runs are paired by seed, and a resumed run is bitwise the unbroken one."""

import dataclasses

import pytest
import torch
from torch import nn

import normkit
from normkit.common.errors import LabError
from normkit.lab.results.store import Run
from normkit.lab.run import best_factor
from normkit.lab.studies.speed import ARMS
from normkit.lab.training.arms import GRID, Arm
from normkit.lab.training.batches import Batches
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data
from normkit.lab.training.models import build, check, last_hidden
from normkit.lab.training.train import Task, advance, make_optimizer, measure, train

CONFIG = Config(steps=60, eval_every=10).resolved("speed")
DATA = load_data(CONFIG)
NONE, BATCH = Arm("none", ""), Arm("batch", "", norm="batch")


def weights(model):
    kinds = (nn.Linear, nn.Conv2d)
    return [p for m in model.modules() if isinstance(m, kinds) for p in m.parameters()]


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet"])
def test_every_arm_starts_from_the_same_weights_of_its_seed(model):
    config = dataclasses.replace(CONFIG, model=model)
    none, batch = (weights(build(config, DATA, arm, 3)) for arm in (NONE, BATCH))
    other = weights(build(config, DATA, NONE, 4))
    assert len(none) == len(batch) > 0
    assert all(map(torch.equal, none, batch))
    assert not torch.equal(none[0], other[0])


def test_building_a_model_leaves_the_global_random_state():
    before = torch.get_rng_state()
    build(CONFIG, DATA, BATCH, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_the_mlp_is_the_papers():
    linear = [m for m in build(CONFIG, DATA, NONE, 0) if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in linear] == [(100, 64), (100, 100), (100, 100), (10, 100)]
    assert abs(float(linear[1].weight.detach().std()) - 0.1) < 0.005
    assert all(float(m.bias.detach().abs().max()) == 0 for m in linear)


def test_resnet_20_has_its_twenty_layers():
    config = dataclasses.replace(CONFIG, model="resnet")
    model = build(config, DATA, BATCH, 0)
    threes = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(threes) == 19


def test_the_batch_of_a_step_depends_on_seed_and_step_alone_and_covers_an_epoch():
    walked, jumped = (Batches(DATA.train, 60, 5) for _ in range(2))
    per_epoch = walked.per_epoch
    assert per_epoch == 1078 // 60
    seen = [walked[step] for step in range(per_epoch + 3)]
    x, y = jumped[per_epoch + 2]
    assert torch.equal(x, seen[-1][0])
    assert torch.equal(y, seen[-1][1])
    assert len(torch.cat([walked[step][0] for step in range(per_epoch)]).unique(dim=0)) > 0.98 * (
        per_epoch * 60
    )
    assert not torch.equal(Batches(DATA.train, 60, 6)[0][0], seen[0][0])
    assert not torch.equal(seen[0][0], seen[per_epoch][0])


def collect(task):
    reports = list(train(task, DATA))
    rows = {step: row for report in reports for step, row in report.rows.items()}
    return rows, reports


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "rmsprop", "adam"])
def test_a_run_from_a_checkpoint_is_bitwise_the_unbroken_run(optimizer, monkeypatch):
    monkeypatch.setattr("normkit.lab.training.train._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("normkit.lab.training.train._CHECKPOINT_SHARE", 1e9)
    config = Config(steps=60, eval_every=10, optimizer=optimizer).resolved("speed")
    task = Task(1, BATCH, 0, config)
    whole, reports = collect(task)
    cut = next(r for r in reports if r.checkpoint is not None and r.step == 30)
    torch.manual_seed(99)
    rest, ended = collect(dataclasses.replace(task, checkpoint=cut.checkpoint))
    assert sorted(rest) == [40, 50, 60]
    assert all(rest[step] == whole[step] for step in rest)
    assert ended[-1].test_accuracy == reports[-1].test_accuracy


def test_dropout_too_goes_on_where_it_was(monkeypatch, tmp_path):
    (tmp_path / "dropping.py").write_text(
        "from torch import nn\n"
        "def net(norm):\n"
        "    n = [norm(8)] if norm else []\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), *n, nn.Dropout(), nn.Tanh(),\n"
        "                         nn.Linear(8, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("normkit.lab.training.train._CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("normkit.lab.training.train._CHECKPOINT_SHARE", 1e9)
    config = Config(steps=40, eval_every=10, model="dropping:net").resolved("speed")
    task = Task(1, NONE, 0, config)
    whole, reports = collect(task)
    rest, _ = collect(dataclasses.replace(task, checkpoint=reports[0].checkpoint))
    assert rest[40] == whole[40]


def test_a_diverging_run_is_recorded_as_diverged_and_stops():
    config = Config(steps=60, eval_every=10, lr=1e30, activation="relu").resolved("speed")
    rows, reports = collect(Task(1, NONE, 0, config))
    assert reports[-1].status == "diverged"
    assert reports[-1].step == 10 == max(rows)
    assert reports[-1].test_accuracy is None


def test_measuring_leaves_no_trace_the_next_step_is_bitwise_the_same():
    def after(measured):
        model = build(CONFIG, DATA, BATCH, 0)
        optimizer = make_optimizer(model, CONFIG, 1.0)
        batches = Batches(DATA.train, 60, 0)
        advance(model, optimizer, batches, 0, 5)
        if measured:
            measure(model, DATA.validation)
        advance(model, optimizer, batches, 5, 6)
        return model.state_dict()

    plain, probed = after(False), after(True)
    assert all(torch.equal(plain[key], probed[key]) for key in plain)


def test_the_percentiles_are_of_the_first_units_input_to_the_last_activation():
    model = build(CONFIG, DATA, BATCH, 0).eval()
    assert last_hidden(model) is model[9]
    with torch.no_grad():
        values = model[:9](DATA.validation[0])[:, 0].double()
        scores = model(DATA.validation[0])
    found = measure(model, DATA.validation)
    wanted = torch.quantile(
        values, torch.tensor([0.15, 0.5, 0.85]).double(), interpolation="nearest"
    )
    assert [found["p15"], found["p50"], found["p85"]] == pytest.approx(wanted.tolist(), abs=0.02)
    assert found["validation_loss"] == pytest.approx(
        float(nn.functional.cross_entropy(scores, DATA.validation[1])), rel=1e-5
    )


def test_the_arms_are_those_of_the_claim():
    known = {arm.name: (arm.norm, arm.rate, arm.other_seeds) for arm in ARMS}
    assert known == {
        "none": ("none", 1, False),
        "batch": ("batch", 1, False),
        "batch-x5": ("batch", 5, False),
        "batch-x30": ("batch", 30, False),
        "none-x5": ("none", 5, False),
        "none-x30": ("none", 30, False),
        "none-again": ("none", 1, True),
    }


BAD_MODELS = """
import torch
from torch import nn
def ignores(norm):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def draws(norm):
    if norm:
        torch.rand(1)
    n = [norm(8)] if norm else []
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), *n, nn.Linear(8, 10))
def shaped(norm):
    return nn.Flatten()
def nothing(norm):
    return None
"""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("ignores", "has no normalization layers though norm= was given"),
        ("draws", "different weights with and without norm="),
        ("shaped", r"must return class scores of shape \(8, 10\)"),
        ("nothing", "returned a NoneType"),
    ],
)
def test_a_model_that_cannot_be_studied_is_refused(function, said, tmp_path, monkeypatch):
    (tmp_path / "badmodels.py").write_text(BAD_MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    config = Config(model=f"badmodels:{function}").resolved("speed")
    with pytest.raises(LabError, match=said):
        check(DATA, [(NONE, config), (BATCH, config)])


def test_a_norm_is_any_that_the_factory_makes():
    arms = [Arm(name, name, norm=name) for name in ("none", "batch", "group:4", "layer")]
    check(DATA, [(arm, CONFIG) for arm in arms])
    model = build(CONFIG, DATA, arms[2], seed=0)
    assert [type(m) for m in model.modules()].count(normkit.GroupNorm) == 3
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        build(CONFIG, DATA, Arm("", "", norm="bacth"), seed=0)


SWAPPED = """
from torch import nn
def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(),
                         nn.Linear(8, 10))
def bare():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


def test_a_model_without_norm_argument_has_its_norms_swapped(tmp_path, monkeypatch):
    (tmp_path / "swapped.py").write_text(SWAPPED)
    monkeypatch.syspath_prepend(tmp_path)
    config = Config(model="swapped:net").resolved("speed")
    arms = [Arm(name, name, norm=name) for name in ("none", "batch", "layer", "group", "weight")]
    check(DATA, [(arm, config) for arm in arms])
    kinds = [type(build(config, DATA, arm, 0)[2]) for arm in arms]
    wanted = [nn.Identity, normkit.BatchNorm, normkit.LayerNorm, normkit.GroupNorm, nn.Identity]
    assert kinds == wanted
    with pytest.raises(LabError, match="takes no norm= and has no norms that could be swapped"):
        build(Config(model="swapped:bare").resolved("speed"), DATA, BATCH, 0)


def test_parameters_that_an_arm_fixes_stay_and_placement_moves_the_norm():
    arm = dataclasses.replace(BATCH, fixed=("weight",))
    model = build(CONFIG, DATA, arm, 0)
    assert [p.requires_grad for p in model[2].parameters()] == [False, True]
    after = build(dataclasses.replace(CONFIG, placement="after"), DATA, BATCH, 0)
    assert [type(m) for m in after[1:4]] == [nn.Linear, nn.Sigmoid, normkit.BatchNorm]


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_a_probe_that_changes_everything_leaves_the_next_step_bitwise_the_same(optimizer):
    config = Config(steps=40, eval_every=10, optimizer=optimizer).resolved("speed")

    def meddle(at):
        advance(at.model, at.optimizer, at.batches, at.step, at.step + 3)
        at.optimizer.param_groups[0]["lr"] = 1e9
        at.model[0].register_forward_hook(lambda *args: None)
        torch.rand(5)
        at.model.eval()
        return {"seen": float(at.step)}

    plain, _ = collect(Task(1, BATCH, 0, config))
    looked, reports = collect(Task(1, BATCH, 0, config, probe=meddle, finish=meddle))
    assert {step: row.pop("seen") for step, row in looked.items()} == {s: s for s in plain}
    assert looked == plain
    assert reports[-1].found == {"seen": 40.0}


def test_the_rate_of_the_grid_is_the_one_that_ends_best_and_of_equals_the_nearest_to_one():
    def tried(**finals):
        return {
            BATCH.at(factor).name: [
                Run(1, "", 0, "finished", 10, 1.0, None, {"validation_accuracy": ([10], [final])})
            ]
            for factor, final in zip(GRID, finals["at"], strict=True)
        }

    assert best_factor(tried(at=(0.1, 0.2, 0.3, 0.9, 0.2)), BATCH, GRID) == 3.0
    assert best_factor(tried(at=(0.5, 0.9, 0.5, 0.9, 0.5)), BATCH, GRID) == 3.0
    assert best_factor(tried(at=(0.9, 0.5, 0.9, 0.9, 0.9)), BATCH, GRID) == 1.0
