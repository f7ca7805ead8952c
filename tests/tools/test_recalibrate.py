"""recalibrate: exact statistics, nothing else touched, nothing left after a failure."""

import random

import numpy as np
import pytest
import torch
from small import dropping as network
from small import recalibrate_rank
from states import state_of
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import normkit
from normkit.tools.model import ToolError, first_input
from ranks import on_ranks


def batches(sizes=(5, 3, 8), offset=0.0):
    return [torch.randn(n, 2, 4, 4) * 2 + offset for n in sizes]


def population(values):
    """Mean and unbiased variance of the channels, by NumPy in float64."""
    rows = np.moveaxis(values.detach().double().numpy(), 1, 0).reshape(values.shape[1], -1)
    return rows.mean(1), rows.var(1, ddof=1)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, normkit.BatchNorm2d])
def test_uneven_batches_give_the_population_of_all_values(kind):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), kind(3))
    data = batches(offset=1000.0)
    report = normkit.recalibrate(net, data)
    mean, var = population(net[0](torch.cat(data)))
    np.testing.assert_allclose(net[1].running_mean.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(net[1].running_var.numpy(), var, rtol=1e-5)
    assert report.model is net
    assert net[1].num_batches_tracked == 3
    assert report.rows[0].values == 16 * 4


def test_in_one_pass_the_layers_before_normalize_by_the_batch():
    net = network()
    data = batches()
    normkit.recalibrate(net, data)
    with torch.no_grad():
        inputs = []
        for x in data:
            y = net[0](x)
            y = (y - y.mean((0, 2, 3), keepdim=True)) / (
                y.var((0, 2, 3), keepdim=True, correction=0) + 1e-5
            ).sqrt()
            inputs.append(net[5](y.relu().flatten(1)))
    mean, var = population(torch.cat(inputs))
    np.testing.assert_allclose(net[6].running_mean.numpy(), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(net[6].running_var.numpy(), var, rtol=1e-4)


def test_sequential_layers_see_the_new_statistics_of_those_before():
    net = network()
    data = batches()
    normkit.recalibrate(net, data, sequential=True)
    net.eval()
    with torch.no_grad():
        inputs = torch.cat([net[:6](x) for x in data])
    mean, var = population(inputs)
    np.testing.assert_allclose(net[6].running_mean.numpy(), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(net[6].running_var.numpy(), var, rtol=1e-4)


@pytest.mark.parametrize(
    "frozen", [normkit.FrozenBatchNorm(3), normkit.BatchNorm2d(3).freeze(), FrozenBatchNorm2d(3)]
)
def test_frozen_layers_stay_and_are_named(frozen):
    net = nn.Sequential(frozen, nn.BatchNorm2d(3))
    net.eval()
    report = normkit.recalibrate(net, [torch.randn(4, 3, 5, 5) * 3 + 1])
    assert {row.layer: row.note for row in report.rows} == {"0": "left: frozen", "1": ""}
    assert bool((frozen.running_mean == 0).all())
    assert net[1].running_mean.abs().min() > 0.1


def test_renorm_and_ghosts_get_the_population_too():
    data = [torch.randn(n, 3) * 2 + 1 for n in (8, 5)]
    every = torch.cat(data).double()
    for layer in (normkit.BatchRenorm(3), normkit.GhostBatchNorm(3, 4)):
        net = nn.Sequential(layer)
        layer.num_batches_tracked.fill_(7)
        normkit.recalibrate(net, data)
        renorm = isinstance(layer, normkit.BatchRenorm)
        var = every.var(0, correction=0 if renorm else 1)
        torch.testing.assert_close(layer.running_mean.double(), every.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=1e-6)
        # Renorm's limits open with the number of batches: that is not recalibrate's to move.
        assert layer.num_batches_tracked == (7 if renorm else 2)


def test_a_mask_keeps_padding_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = normkit.BatchNorm1d(3)

        def forward(self, batch):
            return self.norm(*batch)

    mask = torch.arange(6) < torch.tensor([[[2]], [[6]], [[4]]])
    x = torch.randn(3, 3, 6).where(mask, 1e9)
    net = Net()
    normkit.recalibrate(net, [(x, mask)], lambda model, batch: model(batch))
    kept = x.movedim(1, 0)[:, mask[:, 0]].double().numpy()
    np.testing.assert_allclose(net.norm.running_mean.numpy(), kept.mean(1), rtol=1e-5)
    np.testing.assert_allclose(net.norm.running_var.numpy(), kept.var(1, ddof=1), rtol=1e-5)


def test_only_buffers_change_and_train_is_never_called(monkeypatch):
    net = network()
    net[6].eval()  # frozen: in evaluation inside a model in training
    (net[5].weight.sum() * 2).backward()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    optimizer.step()
    monkeypatch.setattr(nn.Module, "train", lambda *_: pytest.fail("train() was called"))
    loader = torch.utils.data.DataLoader(torch.randn(9, 2, 4, 4), 4, shuffle=True)

    def evaluate(model):
        assert not any(m.training for m in model.modules())
        return float(torch.rand(()) + random.random() + np.random.rand())

    before = state_of(net, optimizer)
    report = normkit.recalibrate(net, loader, evaluate=evaluate)
    after = state_of(net, optimizer)
    assert before[1:] == after[1:]
    changed = {name for name in before[0] if before[0][name] != after[0][name]}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert [before[0][n][0] for n in changed] == [after[0][n][0] for n in changed]
    assert "frozen" in next(row.note for row in report.rows if row.layer == "6")


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("where", ["loader", "forward", "evaluate"])
def test_an_exception_leaves_everything_as_it_was(where, sequential):
    net = network()
    before = state_of(net)
    calls = []

    def loader():
        yield from batches((4, 4))
        if where == "loader":
            raise KeyError("broken")

    def forward(model, x):
        with torch.no_grad():
            model[0].weight.add_(1)
        calls.append(model(x))
        if where == "forward" and len(calls) > 1:
            raise KeyError("broken")

    def evaluate(model):
        if where == "evaluate" and calls:
            raise KeyError("broken")
        return 0.0

    class Data:
        def __iter__(self):
            return loader()

    with pytest.raises(KeyError, match="broken"):
        normkit.recalibrate(net, Data(), forward, sequential=sequential, evaluate=evaluate)
    # The data were drawn here, outside: the random state is the tool's to keep, and it kept it.
    assert state_of(net) == before


def test_it_stops_at_the_tolerance_and_not_before():
    net = nn.Sequential(nn.BatchNorm1d(4))
    data = [torch.randn(64, 4) for _ in range(400)]
    report = normkit.recalibrate(net, data, tolerance=0.02)
    used = report.facts["batches"]
    # The standard error of n values is n^-1/2: 0.02 after 2,500, which is 39 batches.
    assert 20 < used < 80
    assert report.rows[0].standard_error <= 0.02
    assert report.facts["tolerance reached"] is True
    assert normkit.recalibrate(net, data).facts["batches"] == 400
    early = normkit.recalibrate(net, data[:9], tolerance=0.02).facts
    assert (early["batches"], early["tolerance reached"]) == (9, False)


def test_the_standard_error_is_that_of_the_batch_means():
    net = nn.Sequential(nn.BatchNorm1d(1))
    data = [torch.randn(50, 1) for _ in range(500)]
    error = normkit.recalibrate(net, data).rows[0].standard_error
    assert error == pytest.approx(25_000**-0.5, rel=0.15)


def test_a_copy_leaves_the_model_alone():
    net, data = network(), batches()
    before = state_of(net)
    report = normkit.recalibrate(net, data, copy=True)
    assert state_of(net) == before
    assert report.model is not net
    assert report.model[1].num_batches_tracked == 3


def test_the_report_is_a_table_and_a_dictionary():
    net = network()
    report = normkit.recalibrate(net, batches(), evaluate=lambda model: 0.5)
    said = report.to_dict()
    assert said["batches"] == 3
    assert said["evaluated after"] == 0.5
    assert [row["layer"] for row in said["rows"]] == ["1", "6"]
    assert str(report).splitlines()[0].split()[:2] == ["layer", "values"]
    assert "batches: 3" in str(report)


def test_a_shared_layer_gets_one_statistic_of_all_its_inputs():
    norm = nn.BatchNorm1d(2)
    net = nn.Sequential(norm, nn.Linear(2, 2), norm)
    x = torch.randn(20, 2)
    report = normkit.recalibrate(net, [x])
    assert "called 2 times a batch" in report.rows[0].note
    first = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    mean, var = population(torch.cat([x, net[1](first)]))
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.running_var.numpy(), var, rtol=1e-4)


def scripted():
    return torch.jit.script(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("net", "loader", "said"),
    [
        (network, [], "the loader is empty"),
        (network, [{"x": torch.ones(1)}], r"a dict, .*forward=lambda"),
        (network, [(["a"], 1)], r"tuple that starts with a list.*forward="),
        (lambda: nn.Sequential(scripted()), batches(), r"0 \(.*\) is scripted"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), batches(), r"0 \(LazyBatch.*is lazy"),
        (network, [torch.full((2, 2, 4, 4), torch.nan)], "1: running_mean isn't finite"),
        (
            lambda: nn.Sequential(torch.ao.nn.quantized.BatchNorm2d(2)),
            batches(),
            "0 .*is quantized",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(net, loader, said):
    net = net()
    with pytest.raises(ValueError, match=said):
        normkit.recalibrate(net, loader)


def test_an_iterator_is_refused_only_where_it_is_read_twice():
    net = network()
    with pytest.raises(ValueError, match="read only once; give the DataLoader itself"):
        normkit.recalibrate(net, iter(batches()), sequential=True)
    assert normkit.recalibrate(net, iter(batches())).facts["batches"] == 3


def test_one_value_a_channel_is_refused():
    net = nn.Sequential(nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="0: 1 value in a channel"):
        normkit.recalibrate(net, [torch.randn(1, 2)], sequential=True)


def test_batches_go_to_the_models_device():
    assert first_input(nn.Linear(2, 2, device="meta"), torch.ones(1, 2)).device.type == "meta"


def test_progress_counts_the_batches(capsys):
    normkit.recalibrate(network(), batches(), progress=True)
    assert capsys.readouterr().err.endswith("\r3/3 batches\n")


def test_a_model_without_norms_says_so():
    report = normkit.recalibrate(nn.Linear(2, 2), [torch.randn(3, 2)])
    assert report.facts["note"] == "no layer keeps running statistics; nothing to do"


def test_a_filter_takes_names_or_a_predicate():
    net = network()
    normkit.recalibrate(net, batches(), only="1")
    assert net[6].num_batches_tracked == 0
    assert net[1].num_batches_tracked == 3
    normkit.recalibrate(net, batches(), only=lambda name, module: module.num_features == 4)
    assert net[6].num_batches_tracked == 3


@pytest.mark.parametrize(("sizes", "wrap"), [(([4, 3], [5]), False), (([4, 4, 4], []), True)])
def test_two_ranks_give_the_statistics_of_all_their_data(sizes, wrap):
    got = on_ranks(recalibrate_rank, sizes, False, wrap)
    assert got[0] == got[1]
    torch.manual_seed(0)
    alone = network()
    data = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    normkit.recalibrate(alone, [data], sequential=True)
    for found, i in zip(got[0], (1, 6), strict=True):
        expected = alone[i].running_mean.tolist() + alone[i].running_var.tolist()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_failure_of_one_rank_ends_the_others_too():
    got = on_ranks(recalibrate_rank, ([4], [8]), True)
    assert got == {0: "KeyError: 'broken'", 1: "ToolError: rank 0 failed: KeyError: 'broken'"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"loader": list(torch.randn(3, 4).split(1))},
            "batch 1 has one value per channel.*drop_last",
        ),
        ({"only": "1.x"}, "no layer's name fits only='1.x'; the nearest is '1'"),
        ({"tolerance": 0}, "tolerance must be positive, got 0"),
        ({"loader": torch.randn(8, 4)}, r"expected a loader of batches, got a tensor of shape"),
        ({"loader": [((torch.randn(8, 4), 1), 2)]}, r"model\(batch\[0\]\[0\]\)"),
    ],
)
def test_a_refusal_names_what_was_met_and_the_remedy(change, message):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = {"loader": [torch.randn(8, 4)] * 2} | change
    with pytest.raises(ToolError, match=message):
        normkit.recalibrate(model, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_batch_reaches_no_tolerance():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    report = normkit.recalibrate(model, [torch.randn(8, 4)], tolerance=0.5)
    assert report.facts["tolerance reached"] is False
