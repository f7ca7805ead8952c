"""The factory by name."""

import functools

import pytest
import torch
from torch import nn

import normkit
from normkit.factory import NORMS

EXAMPLES = {
    "batch": normkit.BatchNorm,
    "ghost:2": normkit.GhostBatchNorm,
    "renorm": normkit.BatchRenorm,
    "frozen": normkit.FrozenBatchNorm,
    "sync": normkit.SyncBatchNorm,
    "instance": normkit.InstanceNorm,
    "group:4": normkit.GroupNorm,
    "layer": normkit.LayerNorm,
    "rms": normkit.RMSNorm,
    "dyt": normkit.DyT,
    "frn": normkit.FilterResponseNorm,
    "grn": normkit.GlobalResponseNorm,
}


def test_every_name_has_an_example():
    assert [name.partition(":")[0] for name in EXAMPLES] == list(NORMS)


@pytest.mark.filterwarnings("ignore:no process group is initialized")
@pytest.mark.parametrize("shape", [(3, 8, 5), (3, 8, 4, 5), (2, 8, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_makes_the_layer_for_any_channels_first_input(name, shape):
    norm_layer = functools.partial(normkit.create, name)
    layer = norm_layer(8)
    assert type(layer) is EXAMPLES[name]
    assert layer(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match="8"):
        layer(torch.randn(shape[0], 6, *shape[2:]))


def test_numbers_and_arguments_reach_the_layer():
    assert normkit.create("group:4", 8).num_groups == 4
    assert normkit.create("group:4", 8, affine=False).weight is None
    assert normkit.create("batch", 8, momentum=0.3, act="relu").act == "relu"
    assert normkit.create("batch", 8, momentum=0.3).momentum == 0.3
    assert normkit.create("instance", 8, affine=True).weight.shape == (8,)
    assert normkit.create("ghost:4", 8).ghost_size == 4
    assert normkit.create("renorm", 8, r_max=2.0).r_max == 2.0
    assert list(normkit.create("frozen", 8, act="relu").parameters()) == []
    tokens = torch.randn(2, 5, 8)
    layer = normkit.create("layer", 8, channels_first=False, eps=1e-3)
    torch.testing.assert_close(layer(tokens), nn.functional.layer_norm(tokens, (8,), eps=1e-3))
    assert normkit.create("rms", 8, dtype=torch.float64).weight.dtype == torch.float64


def test_values_are_those_of_the_norm_of_the_name():
    x = torch.randn(4, 8, 5, 5)
    F = nn.functional
    expected = {
        "batch": F.batch_norm(x, None, None, training=True),
        "ghost:2": torch.cat([F.batch_norm(g, None, None, training=True) for g in x.split(2)]),
        "renorm": F.batch_norm(x, None, None, training=True),
        "frozen": x / (1 + 1e-5) ** 0.5,
        "instance": F.instance_norm(x),
        "group:4": F.group_norm(x, 4),
        "layer": F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1),
        "rms": F.rms_norm(x.movedim(1, -1), (8,)).movedim(-1, 1),
    }
    for name, y in expected.items():
        torch.testing.assert_close(normkit.create(name, 8)(x), y)


def test_a_network_in_torchvisions_manner():
    def block(channels, norm_layer):
        return nn.Sequential(nn.Conv2d(3, channels, 3), norm_layer(channels), nn.ReLU())

    net = block(8, functools.partial(normkit.create, "group:2"))
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    assert net[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: normkit.create("bach", 8), ValueError, "norm 'bach'; did you mean 'batch'.*'grn'"),
        (lambda: normkit.create("Group:2", 8), ValueError, "'Group'; did you mean 'group'"),
        (
            lambda: normkit.create("group", 8),
            ValueError,
            "num_groups, as in 'group:8', got 'group'",
        ),
        (lambda: normkit.create("group:two", 8), ValueError, "got 'group:two'"),
        (
            lambda: normkit.create("batch:2", 8),
            ValueError,
            "'batch' takes no number, got 'batch:2'",
        ),
        (lambda: normkit.create("group:3", 8), ValueError, "8 channels in 3 groups"),
        (
            lambda: normkit.create("batch", 8, momentun=0.1),
            TypeError,
            r"create\('batch'\): unknown argument 'momentun'; did you mean 'momentum'",
        ),
        (lambda: normkit.create("group:4", 8, num_groups=2), TypeError, "'num_groups'.*'eps'"),
        (lambda: normkit.create("ghost:0", 8), ValueError, "ghost_size must be an integer >= 1"),
        (lambda: normkit.create("frozen", 8, momentum=0.1), TypeError, "unknown argument 'momen"),
        (lambda: normkit.create("grn", 8, act="relu"), TypeError, "unknown argument 'act'"),
    ],
)
def test_what_it_does_not_know_gets_the_near_match(call, error, says):
    with pytest.raises(error, match=says):
        call()
