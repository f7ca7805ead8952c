"""inspect: each rule finds its planted fault; healthy models have none; nothing is left behind."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from planted import CATALOGUE
from small import data, healthy, inspect_rank, network
from states import state_of
from torch import nn
from zoo import NAMES, create, images

import normkit
from normkit.tools.rules import RULES
from ranks import on_ranks


def found(report):
    return {(f.name, f.layer) for f in report.rows}


def loss(output, batch):
    return output.square().mean()


def test_a_healthy_network_has_no_findings():
    net = healthy()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    report = normkit.inspect(net, data(), loss, optimizer, validation=data(seed=2))
    assert found(report) == set()
    assert str(report) == "no findings (2 norms, 8 batches)"


@pytest.mark.parametrize("name", NAMES)
def test_healthy_timm_models_have_no_findings(name):
    model = create(name).train()
    batches = [images(16, seed=i) for i in range(8)]
    normkit.recalibrate(model, batches)
    report = normkit.inspect(model, batches, validation=[images(16, seed=9 + i) for i in range(8)])
    assert str(report.rows) == "[]"
    assert report.facts["norms"] > 15


def shifted(net):
    net[1].running_mean.add_(2 * net[1].running_var.sqrt())


def hot(net):
    net[0].weight.data.mul_(1e19)


def test_a_finding_is_printed_whole():
    net, right = healthy(), healthy().eval()
    shifted(net)
    report = normkit.inspect(net, data(), lambda y, x: (y - right(x)).square().mean())
    (finding,) = report.rows
    assert str(report).startswith(f"'1' (BatchNorm2d): NK04 stale: {finding.measured}\n    costs: ")
    assert f"fix: {finding.fix}\n" in str(report)


def test_layers_with_the_same_fault_are_one_finding_that_names_each():
    net = healthy()
    for at in (1, 5):
        net[at].reset_running_stats()
    report = normkit.inspect(net, data())
    (finding,) = report.rows
    assert finding.layers == ("1", "5")
    assert "'1' (BatchNorm2d), '5' (BatchNorm2d): NK03 never-updated" in str(report)


@pytest.mark.parametrize("what", ["constant", "never above 0"])
def test_channels_that_carry_nothing_are_a_note_without_a_fix(what):
    net = healthy()
    with torch.no_grad():
        if what == "constant":
            net[0].weight[3] = 0
        else:
            net[1].bias[3] = -50.0
    normkit.recalibrate(net, data())
    report = normkit.inspect(net, data(), loss)
    assert report.rows == []
    (note,) = report.notes
    assert (note.layers, note.fix) == (("1",), "")
    assert f"1 of 8 channels of '1' are {what}" in note.measured
    assert "fix" not in str(report)


def test_channels_below_eps_are_compared_with_eps():
    net = healthy()
    with torch.no_grad():
        net[0].weight[3] *= 1e-9
    normkit.recalibrate(net, data())
    net[1].running_var[3] = 1e-12
    assert found(normkit.inspect(net, data(), loss)) == set()


def test_too_few_values_are_measured_and_found():
    net = nn.Sequential(nn.Linear(3, 16, bias=False), nn.BatchNorm1d(16)).train()
    small = [torch.randn(3, 3) for _ in range(16)]
    normkit.recalibrate(net, small)
    report = normkit.inspect(net, small, batches=16)
    (finding,) = [f for f in report.rows if f.name == "few-values"]
    # The standard error of the mean of 3 values is 3^-1/2 = 0.58.
    error = float(finding.measured.split("errors of ")[1].split()[0])
    assert error == pytest.approx(3**-0.5, rel=0.3)
    large = [torch.randn(64, 3) for _ in range(16)]
    assert "few-values" not in {f.name for f in normkit.inspect(net, large, batches=16).rows}


def test_too_short_a_memory_is_found_and_its_mend_mends():
    net = nn.Sequential(nn.Linear(3, 16, bias=False), nn.BatchNorm1d(16, momentum=0.9)).train()
    batches = [torch.randn(12, 3) for _ in range(16)]
    normkit.recalibrate(net, batches)
    (finding,) = [f for f in normkit.inspect(net, batches).rows if f.name == "short-memory"]
    exec(finding.fix, {"model": net, "loader": batches, "normkit": normkit})
    assert net[1].momentum <= 0.1
    assert "short-memory" not in {f.name for f in normkit.inspect(net, batches).rows}


def test_weight_decay_on_norms_is_found():
    net = healthy()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    report = normkit.inspect(net, data(), optimizer=optimizer)
    assert found(report) == {("weight-decay", "optimizer.param_groups[0]")}
    assert "weight_decay=0.05 on 4 weights and biases" in report.rows[0].measured
    norms = [*net[1].parameters(), *net[5].parameters()]
    rest = [*net[0].parameters(), *net[4].parameters(), *net[8].parameters()]
    mended = torch.optim.AdamW([{"params": rest}, {"params": norms, "weight_decay": 0}])
    assert found(normkit.inspect(net, data(), optimizer=mended)) == set()


def test_half_precision_near_its_largest_value():
    net = nn.Sequential(nn.BatchNorm1d(4)).half()
    batches = [torch.randn(64, 4).half() * 9000 for _ in range(4)]
    normkit.recalibrate(net, batches)
    assert ("near-overflow", "0") in found(normkit.inspect(net, batches))
    fine = [batch / 100 for batch in batches]
    assert ("near-overflow", "0") not in found(normkit.inspect(net, fine))


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 8, 1, bias=False), normkit.BatchNorm1d(8)
        self.masked = False

    def forward(self, batch):
        x, mask = batch
        return self.norm(self.conv(x), mask=mask[:, None] if self.masked else None)


def sequences(lengths):
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), 3, 20).where(mask[:, None], 0), mask


def test_padding_inside_the_statistics_is_found_and_a_mask_mends_it():
    net, run = Sequences(), lambda model, batch: model(batch)
    batches = [sequences([20, 5, 8, 12, 15, 7]) for _ in range(8)]
    normkit.recalibrate(net, batches, run)
    assert ("padding", "norm") in found(normkit.inspect(net, batches, forward=run))
    net.masked = True
    normkit.recalibrate(net, batches, run)
    assert ("padding", "norm") not in found(normkit.inspect(net, batches, forward=run))
    net.masked = False
    full = [sequences([20] * 6) for _ in range(8)]
    normkit.recalibrate(net, full, run)
    assert ("padding", "norm") not in found(normkit.inspect(net, full, forward=run))


def test_other_validation_data_are_found():
    net = healthy()
    bright = [x * 2 + 1 for x in data(seed=2)]
    (finding,) = normkit.inspect(net, data(), validation=bright).rows
    assert (finding.name, finding.layer) == ("validation-shift", "1")


def test_local_statistics_on_two_ranks_are_found_at_small_batches():
    assert on_ranks(inspect_rank, 4) == {0: ["local-statistics"], 1: ["local-statistics"]}
    assert on_ranks(inspect_rank, 16) == {0: [], 1: []}


@pytest.mark.parametrize("to", ["ghost:16", "renorm", "frozen", "group", "layer"])
def test_healthy_networks_of_other_norms_have_no_findings(to):
    net = healthy()
    normkit.swap(net, to)
    before = state_of(net)
    assert found(normkit.inspect(net, data(), loss, validation=data(seed=2))) == set()
    assert state_of(net) == before


def test_ghosts_are_judged_by_their_own_size():
    net = nn.Sequential(nn.Linear(3, 16, bias=False), normkit.GhostBatchNorm(16, 3)).train()
    batches = [torch.randn(48, 3) for _ in range(8)]
    normkit.recalibrate(net, batches)
    (finding,) = [f for f in normkit.inspect(net, batches).rows if f.name == "few-values"]
    assert finding.measured.startswith("3 values a statistic")
    plain = normkit.swap(net, "batch").model
    assert "few-values" not in {f.name for f in normkit.inspect(plain, batches).rows}


def test_frozen_layers_are_not_blamed_for_their_statistics():
    net = healthy()
    with torch.no_grad():
        shifted(net)
    net[1].eval()
    normkit.recalibrate(net, data(seed=1))
    assert found(normkit.inspect(net, data())) == set()


def test_the_gap_is_measured_with_the_statistics_that_the_model_came_with():
    net = nn.Sequential(*(nn.BatchNorm1d(8) for _ in range(10))).train()
    batches = [torch.randn(256, 8) for _ in range(8)]
    normkit.recalibrate(net, batches)
    for norm in net:
        norm.running_mean.add_(0.2)
    (gap,) = normkit.inspect(net, batches).rows
    # No layer is far off alone.
    assert (gap.code, gap.fix) == ("NK02", "normkit.recalibrate(model, loader)")
    assert float(gap.measured.split("differ by ")[1].split()[0]) == pytest.approx(2.0, rel=0.05)
    normkit.recalibrate(net, batches)
    assert found(normkit.inspect(net, batches)) == set()


def test_every_rule_has_a_planted_fault_and_its_own_code():
    here = {"train-eval-gap", "constant-channels", "padding", "local-statistics"}
    assert {rule.name for rule in RULES} == {fault.rule for fault in CATALOGUE} | here
    assert len({rule.code for rule in RULES}) == len(RULES)


def noisy(output, batch):
    return output.square().mean() + random.random() + np.random.rand() + torch.rand(())


def test_it_leaves_no_trace():
    net = healthy()
    net[5].eval()
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer = torch.optim.Adam(net.parameters(), weight_decay=0.1)
    optimizer.step()
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(
        torch.randn(64, 3, 8, 8), 16, shuffle=True, generator=generator
    )
    before, drawn = state_of(net, optimizer), generator.get_state()
    normkit.inspect(net, loader, noisy, optimizer, validation=loader)
    assert state_of(net, optimizer) == before
    assert torch.equal(generator.get_state(), drawn)


@pytest.mark.parametrize("at", [1, 4, 9, 20])
def test_an_exception_leaves_no_trace(at):
    net, calls = healthy(), []
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    batches = data()

    def forward(model, batch):
        calls.append(1)
        if len(calls) == at:
            raise KeyError("broken")
        with torch.no_grad():
            model[8].weight.add_(0)
        return model(batch)

    before = state_of(net)
    with pytest.raises(KeyError, match="broken"):
        normkit.inspect(net, batches, loss, forward=forward)
    assert state_of(net) == before


def test_fix_recalibrates_and_swaps_and_says_what_went_away():
    net = healthy()
    with torch.no_grad():
        shifted(net)
        hot(net)
    report = normkit.inspect(net, data(), fix=True)
    assert type(net[1]) is normkit.BatchNorm2d
    assert {f.name for f in report.mended} >= {"near-overflow", "stale"}
    assert not {f.name for f in report.rows} & {"near-overflow", "stale", "train-eval-gap"}
    assert "mended '1' (BatchNorm2d): NK11 near-overflow" in str(report)


def test_fix_changes_nothing_where_nothing_can_be_mended_safely():
    net = healthy()
    net[4] = nn.Conv2d(8, 8, 3)
    normkit.recalibrate(net, data())
    before = state_of(net)
    report = normkit.inspect(net, data(), fix=True)
    assert found(report) == {("redundant-bias", "4")}
    assert state_of(net) == before


def test_the_report_is_json_and_text():
    net = network()
    report = normkit.inspect(net, data())
    said = json.loads(json.dumps(report.to_dict()))
    assert [row["name"] for row in said["rows"]] == ["never-updated"]
    assert str(report).splitlines()[-1] == "1 finding (2 norms, 8 batches)"
    ignored = normkit.inspect(net, data(), ignore=["NK02", "NK03"])
    assert ignored.rows == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: normkit.inspect(network(), []), "the loader is empty"),
        (lambda: normkit.inspect(network(), data(), ignore=["NK99"]), "unknown code 'NK99'"),
        (lambda: normkit.inspect(network(), [{"x": 1}]), "forward=lambda"),
        (lambda: normkit.inspect(network(), iter(data()), fix=True), "read only once"),
    ],
)
def test_what_cannot_be_inspected_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_one_short_batch_is_enough_and_no_norms_say_so():
    assert normkit.inspect(healthy(), data(1)).facts["batches"] == 1
    report = normkit.inspect(nn.Linear(3, 2), [torch.ones(2, 3)])
    assert str(report) == "no norms here; nothing to inspect"


def test_gradients_are_measured_with_a_loss_and_a_shared_layer_is_one():
    norm = nn.BatchNorm1d(4)
    net = nn.Sequential(norm, nn.Linear(4, 4), norm)
    batches = [torch.randn(32, 4) for _ in range(4)]
    report = normkit.inspect(net, batches, loss)
    (layer,) = report.layers
    assert len(layer.gradients) == 8
    assert len(layer.weight_gradients) == 4
    other = copy.deepcopy(net)
    other.zero_grad()
    loss(other(batches[0]), None).backward()
    expected = torch.stack([p.grad.norm() for p in other[0].parameters()]).norm()
    assert layer.weight_gradients[0] == pytest.approx(float(expected), rel=1e-4)


def test_a_model_without_gradients_is_inspected_with_a_loss():
    net = healthy().requires_grad_(False)
    assert found(normkit.inspect(net, data(), loss)) == set()


class Block(nn.Module):
    """A residual block whose norm starts at 0, where the skip goes on."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return x + self.norm(self.conv(x))


def test_a_weight_of_zero_beside_a_skip_is_not_blamed():
    net = nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(192, 4))
    normkit.recalibrate(net, data(seed=1))
    assert found(normkit.inspect(net, data(), loss)) == set()


def test_several_weights_of_zero_one_behind_the_other_are_one_finding():
    net, right = healthy(), healthy().eval()
    with torch.no_grad():
        net[1].weight.zero_()
        net[5].weight.fill_(1e-4)
    (finding,) = normkit.inspect(net, data(), lambda y, x: (y - right(x)).square().mean()).rows
    assert (finding.name, finding.layers) == ("vanished-weight", ("1", "5"))


def test_a_negative_variance_is_found_and_recalibrated_away():
    net = healthy()
    net[1].running_var[2] = -1.0
    (finding,) = normkit.inspect(net, data(), loss).rows
    assert (finding.layers, finding.fix) == (("1",), "normkit.recalibrate(model, loader)")
