"""swap: the same tensors in another layer, everything around it kept."""

import copy

import pytest
import torch
from states import state_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from zoo import NAMES, FrozenBatchNorm2d, create, images

import normkit
from normkit.tools.build import group_count


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)
    )


@pytest.mark.parametrize("name", NAMES)
def test_timm_models_keep_outputs_keys_and_gradients(name):
    model, x = create(name), images()
    before, keys = model(x), list(model.state_dict())
    tensors = [*model.parameters()]
    report = normkit.swap(model, example=x)
    assert report.facts["left"] == 0
    assert report.facts["swapped"] > 15
    assert report.facts["largest change of the output"] < 1e-4 * before.abs().max()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(tensors, model.parameters(), strict=True))
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in tensors)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_training_of_a_timm_model_is_the_same(name):
    theirs, x = create(name).train(), images(8)
    ours = copy.deepcopy(theirs)
    normkit.swap(ours)
    for model in (theirs, ours):
        torch.manual_seed(3)
        model(x).square().mean().backward()
    for (name, a), b in zip(theirs.named_buffers(), ours.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    norm = torch.stack([p.grad.norm() for p in theirs.parameters()]).norm()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-3 * norm


def last_axis(function, x, *affine):
    return function(x.movedim(1, -1), (8,), *affine).movedim(-1, 1)


@pytest.mark.parametrize("to", ["batch", "instance", "group", "layer", "rms", "group:4"])
@pytest.mark.parametrize(
    "make", [nn.BatchNorm2d, nn.InstanceNorm2d, lambda c, **_: nn.GroupNorm(4, c)]
)
def test_any_to_any_computes_the_target_with_the_old_affine(make, to):
    x, old = torch.randn(4, 8, 5, 5), make(8, affine=True)
    weight, bias = nn.init.uniform_(old.weight), nn.init.uniform_(old.bias)
    expected = {
        "batch": F.batch_norm(x, None, None, weight, bias, True),
        "instance": F.instance_norm(x, None, None, weight, bias),
        "group": F.group_norm(x, 4, weight, bias),
        "group:4": F.group_norm(x, 4, weight, bias),
        "layer": last_axis(F.layer_norm, x, weight, bias),
        "rms": last_axis(F.rms_norm, x, weight, 1e-5),
    }[to]
    net = nn.Sequential(old)
    report = normkit.swap(net, to)
    torch.testing.assert_close(net(x), expected)
    assert net[0].weight is weight
    if to == "rms":
        assert report.rows[0].note.startswith("bias dropped")
    else:
        assert net[0].bias is bias


def test_norms_over_the_last_axes():
    model, x = create("vit_tiny_patch16_224"), images()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.LayerNorm)]
    normkit.swap(model, "rms")
    norms = [m for m in model.modules() if isinstance(m, normkit.RMSNorm)]
    assert [m.weight for m in norms] == weights
    y = torch.randn(3, 192)
    torch.testing.assert_close(norms[0](y), F.rms_norm(y, (192,), weights[0], norms[0].eps))
    normkit.swap(model, "layer", example=x)
    assert all(m.bias is None for m in model.modules() if isinstance(m, normkit.LayerNorm))


def test_there_and_back_gives_the_same_layer():
    net = nn.Sequential(nn.BatchNorm2d(8, eps=1e-3, momentum=0.3)).eval()
    nn.init.uniform_(net[0].weight)
    net[0].running_mean.uniform_()
    x = torch.randn(4, 8, 5, 5)
    before, state = net(x), copy.deepcopy(net.state_dict())
    normkit.swap(net, "sync")
    assert type(net[0]) is normkit.SyncBatchNorm
    assert not net[0].training
    assert net[0].momentum == 0.3
    normkit.swap(net, "batch")
    assert type(net[0]) is normkit.BatchNorm2d
    torch.testing.assert_close(net(x), before)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize(
    ("to", "kind"),
    [
        ("ghost:2", normkit.GhostBatchNorm),
        ("renorm", normkit.BatchRenorm),
        ("frozen", normkit.FrozenBatchNorm),
    ],
)
def test_the_family_of_batch_norm_there_and_back(to, kind):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    nn.init.uniform_(net[1].weight)
    net[1].running_mean.uniform_()
    x = torch.randn(4, 3, 6, 6)
    before, state = net.eval()(x), copy.deepcopy(net.state_dict())
    net.train()
    report = normkit.swap(net, to, optimizer=optimizer)
    assert type(net[1]) is kind
    assert report.rows[0].affine == "weight, bias"
    torch.testing.assert_close(net.eval()(x), before)
    assert sum(map(len, (g["params"] for g in optimizer.param_groups))) == len(
        list(net.parameters())
    )
    net.train()(x)
    normkit.swap(net, "batch", optimizer=optimizer)
    assert type(net[1]) is normkit.BatchNorm2d
    assert isinstance(net[1].weight, nn.Parameter)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} >= {
        id(p) for p in net[0].parameters()
    }
    assert list(net.state_dict()) == list(state)
    if to == "frozen":
        torch.testing.assert_close(net.eval()(x), before)
    if to == "ghost:2":
        assert normkit.swap(net, to).model[1].ghost_size == 2


def test_frozen_by_the_method_stays_frozen():
    net = nn.Sequential(normkit.BatchNorm2d(4).freeze())
    normkit.swap(net, "ghost:2")
    assert net[0].frozen
    net = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    report = normkit.swap(net, "frozen")
    assert report.rows[0].note == "left: it has no running statistics to freeze"


def test_other_names_of_the_factory():
    net = nn.Sequential(nn.BatchNorm2d(4))
    weight = net[0].weight
    normkit.swap(net, "frn")
    assert type(net[0]) is normkit.FilterResponseNorm
    assert net[0].weight is weight


def test_a_function_gets_the_channels_and_its_layer_the_old_affine():
    net = network()
    weight = net[1].weight
    normkit.swap(net, lambda channels: nn.GroupNorm(4, channels), only="1")
    assert (net[1].num_groups, net[1].weight) == (4, weight)
    assert type(net[3]) is nn.GroupNorm


def test_none_leaves_the_identity():
    net = network()
    assert normkit.swap(net, "none").facts["swapped"] == 3
    assert [type(m) for m in net[1::2]] == [nn.Identity, nn.Identity]


@pytest.mark.parametrize(
    ("channels", "most", "groups"),
    [(64, 32, 32), (32, 32, 16), (48, 32, 24), (37, 32, 1), (1, 32, 1), (64, 8, 8), (6, 4, 3)],
)
def test_the_rule_for_groups(channels, most, groups):
    assert group_count(channels, most) == groups


@pytest.mark.parametrize("to", [None, "group", "sync"])
def test_mode_hooks_dtype_and_requires_grad_are_kept(to):
    net = network().double()
    net[1].eval()
    net[1].weight.requires_grad_(False)
    calls = []
    handle = net[1].register_forward_hook(lambda *_: calls.append("hook"))
    weight = net[1].weight
    normkit.swap(net, to, only="1")
    assert not net[1].training
    assert net.training
    assert net[1].weight is weight
    assert not weight.requires_grad
    assert {t.dtype for t in net[1].state_dict().values()} <= {torch.float64, torch.int64}
    net(torch.randn(2, 3, 6, 6).double())
    assert calls == ["hook"]
    handle.remove()
    net(torch.randn(2, 3, 6, 6).double())
    assert calls == ["hook"]


def test_new_statistics_lie_where_the_layer_lies():
    net = nn.Sequential(nn.GroupNorm(2, 4)).to("meta", torch.float64)
    normkit.swap(net, "batch")
    assert net[0].running_var.device.type == "meta"
    assert net[0].running_var.dtype == torch.float64


def test_a_shared_layer_stays_one_layer():
    norm = nn.BatchNorm1d(4)
    net = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, nn.Linear(4, 4))})
    report = normkit.swap(net)
    assert net["a"] is net["b"][0]
    assert type(net["a"]) is normkit.BatchNorm1d
    assert len(report.rows) == 1


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("to", [None, "group"])
def test_parametrizations_are_kept(to):
    net = nn.Sequential(nn.BatchNorm2d(4)).eval()
    parametrize.register_parametrization(net[0], "weight", Doubled())
    original = net[0].parametrizations.weight.original
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    keys = set(net.state_dict())
    normkit.swap(net, to, optimizer=optimizer)
    assert net[0].parametrizations.weight.original is original
    torch.testing.assert_close(net[0].weight, 2 * original)
    if to is None:
        assert set(net.state_dict()) == keys
    net(torch.randn(2, 4, 3, 3)).sum().backward()
    assert original.grad is not None


def test_the_optimizer_drops_what_is_gone_and_takes_what_is_new():
    net = network()
    net[1].register_parameter("weight", nn.Parameter(torch.ones(8)))
    optimizer = torch.optim.Adam(
        [{"params": net[0].parameters()}, {"params": [*net[1].parameters(), *net[3].parameters()]}]
    )
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    gone, kept = net[1].bias, net[1].weight
    state = optimizer.state[kept]
    report = normkit.swap(net, "rms", only="1", optimizer=optimizer)
    assert gone not in optimizer.state
    assert optimizer.state[kept] is state
    assert [p is kept for p in optimizer.param_groups[1]["params"]] == [True, False, False]
    assert report.facts["optimizer"] == "1 parameters removed with their state, 0 added"
    report = normkit.swap(net, lambda c: nn.Conv2d(c, c, 1), only="3", optimizer=optimizer)
    params = optimizer.param_groups[1]["params"]
    assert any(p is net[3].weight for p in params)
    assert report.facts["optimizer"].startswith("1 parameters removed with their state, 1 added")
    assert "give optimizer=" in normkit.swap(net, "none").facts["optimizer"]


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_is_left_is_named_with_the_reason():
    net = nn.Sequential(Own(4), nn.LayerNorm(4), normkit.GroupNorm(2, 4), nn.SyncBatchNorm(4))
    notes = [row.note for row in normkit.swap(net, "group").rows]
    assert notes[0].startswith("left: unknown norm: it computes no norm of normkit's")
    assert "normalizes the last axes" in notes[1]
    report = normkit.swap(net)
    assert [row.now for row in report.rows] == ["-", "LayerNorm", "-", "-"]
    assert type(net[0]) is Own
    assert type(net[1]) is normkit.LayerNorm


def test_an_activation_inside_is_never_lost():
    model = create("efficientnet_b0")
    report = normkit.swap(model, lambda channels: nn.BatchNorm2d(channels))
    inside = [row for row in report.rows if "would lose the activation inside (silu)" in row.note]
    assert inside
    assert all(row.now == "-" for row in inside)
    normkit.swap(model, "sync")
    assert type(model.bn1) is normkit.SyncBatchNorm
    assert model.bn1.act == "silu"
    normkit.swap(model, "group")
    assert model.bn1.act == "silu"


def test_frozen_layers_of_others_become_normkits():
    frozen = FrozenBatchNorm2d(4)
    frozen.running_mean.uniform_()
    net, x = nn.Sequential(frozen), torch.randn(2, 4, 3, 3)
    before, keys = net(x), list(net.state_dict())
    normkit.swap(net)
    assert type(net[0]) is normkit.FrozenBatchNorm
    torch.testing.assert_close(net(x), before)
    assert set(keys) <= set(net.state_dict())
    assert not list(net.parameters())


def test_frozen_layers_of_others_become_trainable_batch_norm():
    frozen = FrozenBatchNorm2d(4)
    frozen.running_mean.uniform_()
    frozen.weight.uniform_()
    net = nn.Sequential(frozen).eval()
    x = torch.randn(2, 4, 3, 3)
    before = net(x)
    normkit.swap(net, "batch")
    assert isinstance(net[0].weight, nn.Parameter)
    torch.testing.assert_close(net(x), before)


def test_detectron2s_frozen_norm_is_known_by_its_name():
    """detectron2 isn't on PyPI: a class of torchvision's interface under its path."""

    def forward(self, x):
        return FrozenBatchNorm2d.forward(self, x)

    forward.__module__ = "detectron2.layers.batch_norm"
    forward.__qualname__ = "FrozenBatchNorm2d.forward"
    theirs = type("FrozenBatchNorm2d", (FrozenBatchNorm2d,), {"forward": forward})(4)
    theirs.running_var.uniform_(1, 2)
    net, x = nn.Sequential(theirs).eval(), torch.randn(2, 4, 3, 3)
    before = net(x)
    assert normkit.swap(net, "batch").facts["swapped"] == 1
    torch.testing.assert_close(net(x), before)


def test_a_model_that_is_a_norm_is_returned():
    report = normkit.swap(nn.BatchNorm1d(3))
    assert type(report.model) is normkit.BatchNorm1d


def test_an_exception_leaves_the_model_as_it_was():
    net, x = network(), torch.randn(2, 3, 6, 6)
    before = state_of(net)
    with pytest.raises(ValueError, match="input has 8 channels"):
        normkit.swap(net, lambda channels: normkit.BatchNorm2d(5), example=x)
    assert state_of(net) == before

    def fails(channels):
        if channels == 8:
            raise KeyError(channels)
        return nn.Identity()

    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(8))
    before = state_of(net)
    with pytest.raises(KeyError):
        normkit.swap(net, fails)
    assert state_of(net) == before


def test_the_example_leaves_no_trace():
    net, x = network().append(nn.Dropout()), torch.randn(2, 3, 6, 6)
    before = state_of(net)
    normkit.swap(net, only=lambda name, module: False, example=x)
    assert state_of(net) == before


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: normkit.swap(network(), "grup"), "unknown to='grup'; known: None, batch"),
        (lambda: normkit.swap(network(), "batch:3"), "a number belongs to 'ghost:32'"),
        (lambda: normkit.swap(network(), "ghost"), "a number belongs to 'ghost:32'"),
        (
            lambda: normkit.swap(
                network(), copy=True, optimizer=torch.optim.SGD(network().parameters(), 1)
            ),
            "not a copy's",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_a_copy_leaves_the_model_alone():
    net = network()
    before = state_of(net)
    report = normkit.swap(net, "group", copy=True)
    assert state_of(net) == before
    assert type(report.model[1]) is normkit.GroupNorm


def test_no_norms_says_so():
    assert "no norms here" in str(normkit.swap(nn.Linear(2, 2)))


def test_the_hook_that_keeps_torchs_fast_path_away_goes_with_its_layer():
    net = nn.Sequential(normkit.LayerNorm(4, act="relu"), nn.LayerNorm(4))
    calls = []
    handle = net[1].register_forward_pre_hook(lambda module, args: calls.append(1))
    net[0].register_forward_pre_hook(lambda module, args: calls.append(0))
    normkit.swap(net, "rms", example=torch.randn(2, 4))
    calls.clear()
    net(torch.randn(2, 4))
    assert calls == [0, 1]
    assert [len(layer._forward_pre_hooks) for layer in net] == [1, 1]
    handle.remove()
    net(torch.randn(2, 4))
    assert calls == [0, 1, 0]
