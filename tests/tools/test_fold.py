"""fold: the same outputs without norms, and refusal where that isn't so."""

import copy
import itertools

import numpy as np
import onnxruntime
import pytest
import torch
from norms_of_others import DetrFrozenBatchNorm2d, SimpleNorm
from states import state_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from zoo import FrozenBatchNorm2d, create, images

import normkit


def shaken(model):
    """The model in evaluation with norms that aren't the identity."""
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 2)
                    module.bias.normal_()
    return model.eval()


CONVS = [
    (nn.Conv1d, nn.BatchNorm1d, (7,)),
    (nn.Conv2d, nn.BatchNorm2d, (7, 6)),
    (nn.Conv3d, nn.BatchNorm3d, (4, 5, 4)),
    (nn.ConvTranspose1d, nn.BatchNorm1d, (7,)),
    (nn.ConvTranspose2d, nn.BatchNorm2d, (7, 6)),
    (nn.ConvTranspose3d, nn.BatchNorm3d, (4, 5, 4)),
]
OPTIONS = list(itertools.product((1, 2), (True, False), (True, False)))


@pytest.mark.parametrize(("groups", "bias", "affine"), OPTIONS)
@pytest.mark.parametrize(("conv", "norm", "shape"), CONVS)
def test_a_norm_after_a_convolution(conv, norm, shape, groups, bias, affine):
    net = nn.Sequential(
        conv(4, 6, 3, stride=2, padding=1, groups=groups, bias=bias), norm(6, affine=affine)
    )
    net = shaken(net.double())
    x = torch.randn(3, 4, *shape).double()
    before = net(x)
    report = normkit.fold(net, x)
    assert type(net[1]) is nn.Identity
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)
    y = torch.randn(2, 4, *shape).double()
    assert report.facts["folded"] == 1
    assert report.rows[0].error < 1e-12
    assert net(y).shape[0] == 2


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("conv", "norm", "shape"), [case for case in CONVS if "Transpose" not in case[0].__name__]
)
def test_a_norm_before_a_convolution_without_zero_padding(conv, norm, shape, groups):
    for more in ({}, {"padding": 1, "padding_mode": "circular"}):
        net = shaken(nn.Sequential(norm(4), conv(4, 6, 3, groups=groups, **more)).double())
        x = torch.randn(3, 4, *shape).double()
        before = net(x)
        assert normkit.fold(net, x).facts["folded"] == 1
        torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def test_a_norm_before_zero_padding_is_left_unless_it_shifts_nothing():
    net = shaken(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)))
    x = torch.randn(3, 4, 6, 6)
    assert "zero padding comes between" in normkit.fold(net, x).rows[0].note
    with torch.no_grad():
        net[0].running_mean.zero_()
        net[0].bias.zero_()
    before = net(x)
    assert normkit.fold(net, x).facts["folded"] == 1
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_a_norm_before_a_transposed_convolution_is_left_unless_it_shifts_nothing():
    net = shaken(nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, groups=2)))
    x = torch.randn(3, 4, 6, 6)
    assert "a shift isn't the same everywhere" in normkit.fold(net, x).rows[0].note
    with torch.no_grad():
        net[0].running_mean.zero_()
        net[0].bias.zero_()
    before = net(x)
    assert normkit.fold(net, x).facts["folded"] == 1
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, normkit.BatchNorm1d, normkit.BatchNorm])
def test_linear_layers_on_both_sides(kind):
    net = shaken(nn.Sequential(nn.Linear(3, 4), kind(4), nn.ReLU(), kind(4), nn.Linear(4, 2)))
    x = torch.randn(5, 3)
    before = net(x)
    report = normkit.fold(net, x)
    assert [row.into for row in report.rows] == ["0", "4"]
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_norms_on_both_sides_of_one_layer():
    net = shaken(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4)))
    x = torch.randn(5, 3)
    before = net(x)
    assert normkit.fold(net, x).facts["folded"] == 2
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_a_filter_leaves_the_others():
    net = shaken(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    )
    x = torch.randn(5, 3)
    before = net(x)
    assert [row.layer for row in normkit.fold(net, x, only="3").rows] == ["3"]
    assert [type(net[1]), type(net[3])] == [nn.BatchNorm1d, nn.Identity]
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_other_axes_are_not_folded():
    """BatchNorm1d on (N, L, C) normalizes L, a linear layer before it puts out C."""
    net = shaken(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5)))
    x = torch.randn(2, 5, 3)
    report = normkit.fold(net, x)
    assert "its channels are not those of 0" in report.rows[0].note


def test_an_activation_inside_stays():
    net = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), normkit.BatchNorm(4, act="gelu")))
    x = torch.randn(2, 3, 6, 6)
    before = net(x)
    normkit.fold(net, x)
    assert type(net[1]) is nn.GELU
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_frozen_norms_fold():
    net = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4)))
    x = torch.randn(2, 3, 6, 6)
    before = net(x)
    assert normkit.fold(net, x).facts["folded"] == 1
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_bfloat16():
    net = shaken(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))).bfloat16()
    x = torch.randn(2, 3, 6, 6).bfloat16()
    before = net(x)
    report = normkit.fold(net, x)
    assert net[0].weight.dtype == torch.bfloat16
    assert 0 < report.rows[0].error < 0.05
    torch.testing.assert_close(net(x), before, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(("name", "folded"), [("resnet18", 20), ("efficientnet_b0", 49)])
def test_timm_models(name, folded):
    model, x = create(name), images()
    before = model(x)
    report = normkit.fold(model, x)
    assert (report.facts["folded"], report.facts["left"]) == (folded, 0)
    y = images(3, seed=1)
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(y), create(name)(y), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224"])
def test_norms_of_the_input_are_left(name):
    model, x = create(name), images()
    before = model(x)
    report = normkit.fold(model, x)
    assert report.facts["folded"] == 0
    assert {row.note for row in report.rows} == {"left: its statistics come from the input"}
    assert torch.equal(model(x), before)


class Branching(nn.Module):
    """The convolution's output is used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y.relu()


class Untraceable(Branching):
    def forward(self, x):
        y = self.conv(x) if x.sum() > -1e9 else x
        assert y.shape[0] > 0
        return self.norm(y).relu_()


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.a(self.b(x)))


class Own(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).abs()


def hooked():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    net[0].register_forward_hook(lambda module, args, output: output * 2)
    return net


def parametrized():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    parametrize.register_parametrization(net[0], "weight", nn.Tanh())
    return net


def reused():
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Conv2d(3, 3, 1), norm)


@pytest.mark.parametrize(
    ("net", "shape", "said"),
    [
        (Branching(), (2, 3, 4, 4), "the output of conv is also used by relu"),
        (Shared(), (2, 3), "the weight of a is shared"),
        (nn.Sequential(Own(3, 3, 1), nn.BatchNorm2d(3)), (2, 3, 4, 4), "isn't linear in its"),
        (hooked(), (2, 3, 4, 4), "0 has hooks"),
        (parametrized(), (2, 3, 4, 4), "remove_parametrizations makes its weight plain"),
        (reused(), (2, 3, 4, 4), "called 2 times"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (2, 3, 4, 4), "no convolution or linear"),
        (
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
            (2, 3, 4, 4),
            "its statistics come from the input",
        ),
    ],
)
def test_what_is_left_is_named_and_computes_the_same(net, shape, said):
    net = shaken(net)
    x = torch.randn(*shape)
    before = net(x)
    report = normkit.fold(net, x)
    assert said in report.rows[0].note
    torch.testing.assert_close(net(x), before)


def test_a_model_that_cannot_be_traced_is_folded():
    net = shaken(Untraceable())
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(net)
    before = net(x)
    assert normkit.fold(net, x).facts["folded"] == 1
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


def test_an_error_over_the_tolerance_is_refused_by_name_and_undone():
    net = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 6, 6)
    before = state_of(net)
    with pytest.raises(ValueError, match=r"folding 0 -> 1 changes its output by .* more than 0"):
        normkit.fold(net, x, tolerance=0.0)
    assert state_of(net) == before


def test_an_error_that_the_model_enlarges_is_refused_and_undone():
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
            self.other = None

        def forward(self, x):
            return self.layers(x) - self.other

    net, x = shaken(Difference()), torch.randn(2, 3, 6, 6)
    net.other = net.layers(x).detach() + 1e-6
    before = state_of(net)
    with pytest.raises(ValueError, match=r"changes the model's output .* layers.0 -> layers.1"):
        normkit.fold(net, x)
    assert state_of(net) == before


def test_a_tiny_variance_shows_up_as_an_error():
    """A fold that loses digits is found by running it: y = 1e6 (c - c') + ..."""
    net = shaken(nn.Sequential(nn.Conv2d(3, 4, 1, bias=True), nn.BatchNorm2d(4, eps=1e-14)))
    with torch.no_grad():
        net[0].weight.mul_(1e-7)
        net[0].bias.fill_(1.0)
        net[1].running_mean.fill_(1.0)
        net[1].running_var.fill_(1e-14)
    before = state_of(net)
    with pytest.raises(ValueError, match="folding 0 -> 1"):
        normkit.fold(net, torch.randn(2, 3, 6, 6))
    assert state_of(net)[0] == before[0]


def test_an_exception_of_the_model_leaves_no_trace():
    class Broken(nn.Sequential):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            if self.calls > 3:
                raise KeyError("broken")
            return super().forward(x)

    net = shaken(Broken(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()))
    x = torch.randn(2, 3, 6, 6)
    before = state_of(net)
    with pytest.raises(KeyError):
        normkit.fold(net, x)
    assert state_of(net) == before
    assert Broken.calls == 4


def test_a_model_in_training_is_refused():
    with pytest.raises(ValueError, match=r"call \.eval\(\) first"):
        normkit.fold(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), torch.ones(2, 2))


def test_a_copy_leaves_the_model_alone():
    net = shaken(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 6, 6)
    before = state_of(net)
    report = normkit.fold(net, x, copy=True)
    assert state_of(net) == before
    assert type(report.model[1]) is nn.Identity


def test_no_norms_says_so():
    assert "no norms here" in str(normkit.fold(nn.Linear(2, 2).eval(), torch.ones(1, 2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_folded_model_runs_in_onnxruntime_without_a_norm(tmp_path):
    net = shaken(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            normkit.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 4, 3, groups=2),
            nn.BatchNorm2d(4),
        )
    )
    x = torch.randn(2, 3, 6, 6)
    before = copy.deepcopy(net)(x)
    assert normkit.fold(net, x).facts["folded"] == 2
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    path = tmp_path / "folded.onnx"
    program.save(path)
    assert not [n for n in program.model.graph if "BatchNorm" in n.op_type]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, before.detach().numpy(), rtol=1e-4, atol=1e-4)


class PaddedConv2d(nn.Conv2d):
    """It pads its input itself, as TensorFlow's and EfficientNet's do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class StandardizedConv2d(nn.Conv2d):
    """Its weight is standardized, so that a scaled weight changes nothing."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.bias)


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return F.linear(2 * x, self.weight, self.bias)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(PaddedConv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), (2, 3, 5, 5)),
        (nn.Sequential(PaddedConv2d(3, 8, 3, 2), DetrFrozenBatchNorm2d(8)), (2, 3, 5, 5)),
    ],
    ids=["batch norm", "frozen batch norm"],
)
def test_a_convolution_that_pads_by_itself_is_folded_into(net, shape):
    net, x = shaken(net), torch.randn(shape)
    before = net(x)
    report = normkit.fold(net, x)
    assert report.facts["folded"] == 1
    assert type(net[1]) is nn.Identity
    y = torch.randn(shape)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    assert net(y).shape == before.shape


@pytest.mark.parametrize(
    ("net", "shape", "said"),
    [
        (
            nn.Sequential(StandardizedConv2d(3, 8, 3), nn.BatchNorm2d(8)),
            (2, 3, 5, 5),
            "0 (StandardizedConv2d) has a forward that isn't linear in its weight",
        ),
        (
            nn.Sequential(DoubledLinear(3, 8), nn.BatchNorm1d(8)),
            (4, 3),
            "",
        ),
        (
            nn.Sequential(nn.BatchNorm2d(3), PaddedConv2d(3, 8, 3)),
            (2, 3, 5, 5),
            "PaddedConv2d may pad what it gets, and the norm has a shift",
        ),
    ],
    ids=["standardized weight", "scaled input", "padding behind a shift"],
)
def test_a_forward_of_its_own_is_tried(net, shape, said):
    net, x = shaken(net), torch.randn(shape)
    before = net(x)
    report = normkit.fold(net, x)
    assert said in report.rows[0].note
    assert report.facts["folded"] == (said == "")
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)


class Branches(nn.Module):
    """RepVGG's: a convolution and an identity, each normalized, and split convolutions."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.identity = nn.BatchNorm2d(4)
        self.a, self.b, self.joined = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(4)
        self.listed = SimpleNorm(5)

    def forward(self, x):
        x = (self.norm(self.conv(x)) + self.identity(x)).relu()
        return self.listed(self.joined(torch.cat([self.a(x), self.b(x)], 1)).sigmoid())


def test_what_lies_around_a_norm_that_is_left_is_named():
    net, x = shaken(Branches()), torch.randn(2, 4, 3, 5)
    report = normkit.fold(net, x)
    notes = {row.layer: row.note for row in report.rows}
    assert notes["norm"] == ""
    assert notes["identity"].endswith("its output goes to 'add'")
    assert notes["joined"].endswith("its input comes from 'cat', its output goes to 'sigmoid'")
    assert notes["listed"].startswith("left: unknown norm: it computes no norm of normkit's")


@pytest.mark.parametrize("name", ["tf_mobilenetv3_small_minimal_100", "lcnet_050"])
def test_models_with_padding_and_activations_of_their_own(name):
    model, x = create(name), images()
    before = model(x)
    report = normkit.fold(model, x)
    assert report.facts["left"] == 0
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


class Nan(nn.Module):
    def forward(self, x):
        return x * float("nan")


def test_outputs_that_are_not_numbers_are_no_fault_of_a_fold_that_did_nothing():
    net = nn.Sequential(nn.LayerNorm(4), Nan()).eval()
    assert normkit.fold(net, torch.randn(2, 4)).facts["folded"] == 0
