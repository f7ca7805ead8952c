"""swap(fuse=True): a norm takes over the activation that alone reads it; all else stays as it was.

Every model here is compared with itself before: outputs, gradients and running statistics, in
training and in evaluation.
"""

import copy
import functools
import pickle

import pytest
import timm
import torch
from small import fuse_rank
from states import state_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import images

import normkit
from normkit.tools.model import ToolError
from ranks import on_ranks


def run(net, x, training):
    """Outputs, gradients of input and parameters, and the buffers, of one seeded run."""
    net = copy.deepcopy(net)
    for module in net.modules():
        module.training = training
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    outputs = net(x)
    outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
    outputs = [y for y in outputs if isinstance(y, torch.Tensor)]
    torch.stack(
        [(y * torch.randn_like(y)).sum() for y in outputs if y.requires_grad]
    ).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return [y.detach() for y in outputs], x.grad, gradients, dict(net.named_buffers())


def fused(net, x, tolerance=1e-5, **arguments):
    """The report of fusing, which leaves the function, the keys and the classes as they were."""
    plain = copy.deepcopy(net)
    normkit.swap(plain)
    classes = [(name, type(m)) for name, m in plain.named_modules()]
    before = [run(plain, x, training) for training in (True, False)]
    report = normkit.swap(net, fuse=True, example=x, **arguments)
    assert report.model is net
    for training, expected in zip((True, False), before, strict=True):
        torch.testing.assert_close(run(net, x, training), expected, rtol=tolerance, atol=tolerance)
    assert list(net.state_dict()) == list(plain.state_dict())
    now = [(name, type(m)) for name, m in net.named_modules()]
    changed = [was for was, is_ in zip(classes, now, strict=True) if was != is_]
    assert all(kind in (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU) for _, kind in changed)
    assert (report.facts["fused"] > 0) == bool(changed)
    return report


def notes(report):
    return {row.layer: row.note for row in report.rows}


def conv(a=3, b=4):
    return nn.Conv2d(a, b, 3, padding=1)


class Block(nn.Module):
    """conv -> norm -> what a test writes, with a residual input and an activation module."""

    def __init__(self, behind, act=nn.ReLU, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm, self.act = conv(), norm(4), act()
        self.behind, self.seen = behind, None

    def forward(self, x):
        x = self.conv(x)
        return self.behind(self, x)


X = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize(
    ("act", "name"), [(nn.ReLU, "relu"), (nn.LeakyReLU, "leaky_relu"), (nn.SiLU, "silu")]
)
def test_an_activation_goes_into_the_norm_before(act, name, inplace):
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), act(inplace=inplace), conv(4, 2))
    report = fused(net, X)
    assert notes(report) == {"1": f"{name} fused"}
    assert (type(net[1]), net[1].act, type(net[2])) == (normkit.BatchNorm2d, name, nn.Identity)


@pytest.mark.parametrize(
    "norm",
    [
        functools.partial(nn.GroupNorm, 2),
        functools.partial(nn.InstanceNorm2d, affine=True),
        functools.partial(normkit.LayerNorm, channels_first=True),
        functools.partial(normkit.GhostBatchNorm, ghost_size=2),
    ],
    ids=["group", "instance", "layer", "ghost"],
)
def test_every_norm_with_an_activation_takes_one(norm):
    assert fused(nn.Sequential(conv(), norm(4), nn.GELU()), X).facts["fused"] == 1


def in_place_function(block, x):
    h = block.norm(x)
    F.relu_(h)
    return block.act(h)


def in_place_sum(block, x):
    h = block.norm(x)
    h.add_(x)
    return block.act(h)


def in_place_through_a_view(block, x):
    h = block.norm(x)
    h[:, 0].mul_(2)
    return block.act(h)


def input_edited_in_between(block, x):
    with torch.no_grad():
        copied = x.clone()
    h = block.norm(copied)
    copied.mul_(0) if not torch.is_grad_enabled() else None
    return block.act(h)


def read_by_a_branch(block, x):
    h = block.norm(x)
    return block.act(h) * h.mean((2, 3), keepdim=True).sigmoid()


def read_before(block, x):
    h = block.norm(x)
    scale = h.flatten(2).amax(-1)
    return block.act(h) + scale[..., None, None]


def returned_too(block, x):
    h = block.norm(x)
    return block.act(h), h


def kept_in_an_attribute(block, x):
    block.seen = block.norm(x)
    return block.act(block.seen)


class Box:
    pass


def returned_inside_an_object(block, x):
    box = Box()
    box.h = block.norm(x)
    return block.act(box.h), box


def functional_activation(block, x):
    return F.relu(block.norm(x))


def method(block, x):
    return block.norm(x).relu_()


def residual(block, x):
    return block.act(block.norm(x) + x)


def dropout_between(block, x):
    return block.act(F.dropout(block.norm(x), 0.5, block.training))


def only_in_training(block, x):
    h = block.norm(x)
    return block.act(h) if block.training else h


def only_in_evaluation(block, x):
    h = block.norm(x)
    return h * 1 if block.training else block.act(h)


def detached(block, x):
    return block.act(block.norm(x).detach()) + x


def without_gradients(block, x):
    h = block.norm(x)
    with torch.no_grad():
        h = block.act(h)
    return h + x


def norm_without_gradients(block, x):
    with torch.no_grad():
        h = block.norm(x)
    return block.act(h) + x


def hooked_tensor(block, x):
    h = block.norm(x)
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 2)
    return block.act(h)


def shared_activation(block, x):
    return block.act(block.conv.bias[:, None, None] + block.act(block.norm(x)))


def twice_with_two_fates(block, x):
    return block.act(block.norm(x)) + block.norm(-x)


def by_forward(block, x):
    return block.act(block.norm.forward(x))


LEFT = {
    in_place_function: "its output goes to relu_",
    in_place_sum: "its output goes to add_",
    in_place_through_a_view: "its output goes to __getitem__ and act",
    read_by_a_branch: "its output goes to act and mean",
    read_before: "its output goes to flatten and act",
    returned_too: "its output goes to act and the output",
    kept_in_an_attribute: "its output is kept after the activation has run",
    returned_inside_an_object: "its output is kept after the activation has run",
    functional_activation: "its output goes to relu",
    method: "its output goes to relu_",
    residual: "its output goes to add",
    dropout_between: "its output goes to dropout",
    only_in_training: "its output goes to the output",
    only_in_evaluation: "its output goes to mul",
    detached: "its output goes to detach",
    without_gradients: "gradients are on in only one of it and act",
    norm_without_gradients: "gradients are on in only one of it and act",
    hooked_tensor: "its output goes to register_hook and act",
    shared_activation: "act is also called on other values",
    twice_with_two_fates: "its output goes to add",
    by_forward: "the example doesn't reach it",
}


@pytest.mark.parametrize("behind", LEFT, ids=lambda behind: behind.__name__.replace("_", " "))
def test_what_is_not_seen_to_be_safe_is_left(behind):
    net = Block(behind)
    assert notes(fused(net, X)) == {"norm": f"not fused: {LEFT[behind]}"}
    assert type(net.act) is nn.ReLU


def renamed(block, x):
    x = block.norm(x)
    h = x
    del x
    return block.act(h)


def result_edited_in_place(block, x):
    h = block.act(block.norm(x))
    h += x
    return h.mul_(2)


def asked_for_its_shape(block, x):
    h = block.norm(x)
    assert (h.shape[1], h.dim(), h.dtype) == (4, 4, torch.float32)
    return block.act(h)


def twice(block, x):
    return block.act(block.norm(x)) + block.act(block.norm(-x))


def checkpointed(block, x):
    return checkpoint(lambda x: block.act(block.norm(x)), x, use_reentrant=False)


def checkpointed_by_recursion(block, x):
    return checkpoint(lambda x: block.act(block.norm(x)), x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    "behind",
    [
        *(renamed, result_edited_in_place, asked_for_its_shape, twice, input_edited_in_between),
        *(checkpointed, checkpointed_by_recursion),
    ],
    ids=lambda behind: behind.__name__.replace("_", " "),
)
def test_what_is_safe_is_fused(behind):
    assert notes(fused(Block(behind, nn.SiLU), X)) == {"norm": "silu fused"}


class Two(nn.Module):
    """Two norms and one activation module."""

    def __init__(self, behind):
        super().__init__()
        self.behind, self.act = behind, nn.ReLU(inplace=True)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.behind(self, x)


def test_a_shared_activation_goes_where_all_its_calls_follow_norms():
    net = Two(lambda net, x: net.act(net.second(net.act(net.first(x)))))
    assert fused(net, X).facts["fused"] == 2
    net = Two(lambda net, x: net.act(net.second(net.act(net.first(x))) + x))
    assert notes(fused(net, X)) == {
        "first": "not fused: act is also called on other values",
        "second": "not fused: its output goes to add",
    }


def test_one_norm_that_is_left_leaves_those_that_share_its_activation():
    net = Two(lambda net, x: net.act(net.second(net.act(net.first(x)))))
    net.second.register_forward_hook(lambda *_: None)
    assert notes(fused(net, X)) == {
        "first": "not fused: act also follows second, which is not fused",
        "second": "not fused: it has hooks",
    }


def test_norms_that_share_weights_are_fused_each():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.SiLU())
    net[2].weight = net[0].weight
    assert fused(net, X).facts["fused"] == 2
    assert net[2].weight is net[0].weight


def test_an_activation_at_two_places_of_the_tree():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Sequential())
    net[2].alias = net[1]
    net[2].forward = lambda x: x
    assert fused(net, X).facts["fused"] == 1
    assert type(net[1]) is nn.Identity
    assert net[2].alias is net[1]


def with_parameter(act):
    act.scale = nn.Parameter(torch.ones(()))


def with_forward(act):
    act.forward = lambda x: x.relu() * 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda act: act.register_forward_hook(lambda *_: None), "1 has hooks"),
        (lambda act: act.register_forward_pre_hook(lambda *_: None), "1 has hooks"),
        (lambda act: act.register_full_backward_hook(lambda *_: None), "1 has hooks"),
        (with_forward, "1 has a forward of its own"),
        (lambda act: act.register_parameter("scale", nn.Parameter(torch.ones(()))), "1 holds"),
    ],
    ids=["forward hook", "pre-hook", "backward hook", "patched forward", "parameter"],
)
def test_an_activation_with_something_of_its_own_is_left(change, said):
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    change(net[1])
    report = normkit.swap(net, fuse=True, example=X)
    assert report.rows[0].note.startswith(f"not fused: {said}")
    assert type(net[1]) is nn.ReLU


@pytest.mark.parametrize(
    "act",
    [nn.LeakyReLU(0.2), nn.GELU("tanh"), nn.Hardswish(), nn.ReLU6(), type("R", (nn.ReLU,), {})()],
)
def test_an_activation_of_another_kind_is_left(act):
    assert notes(fused(nn.Sequential(nn.BatchNorm2d(3), act), X)) == {
        "0": "not fused: its output goes to 1"
    }


def test_only_chosen_layers_are_fused_and_normkits_own_too():
    net = nn.Sequential(normkit.BatchNorm2d(3), nn.ReLU(), normkit.BatchNorm2d(3), nn.ReLU())
    assert fused(net, X, only="2").facts["fused"] == 1
    assert (net[0].act, net[2].act) == (None, "relu")


class Rest(nn.Module):
    """What graphs lost: an attribute, an optional argument, a branch on the class of the input."""

    f = -1

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
        self.stride = 2

    def forward(self, x, scale=None):
        if not isinstance(x, torch.Tensor):
            raise TypeError(x)
        x = self.inner(x)
        return x if scale is None else x * scale


def test_attributes_and_optional_arguments_stay():
    net = nn.ModuleDict({"rest": Rest()})
    net.forward = lambda x: net["rest"](x)
    report = normkit.swap(net, fuse=True, example=X)
    assert report.facts["fused"] == 1
    rest = net["rest"]
    assert (type(rest), rest.f, rest.stride) == (Rest, -1, 2)
    torch.testing.assert_close(rest(X, scale=2.0), 2 * rest(X))


def test_pickles_copies_and_isinstance_hold():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
    normkit.swap(net, fuse=True, example=X)
    assert isinstance(net[1], nn.BatchNorm2d)
    for again in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
        torch.testing.assert_close(again(X), net(X))
        assert again[1].act == "relu"
    other = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU())
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other.eval()(X), net.eval()(X))


def test_the_runs_leave_no_trace():
    net = nn.Sequential(conv(), normkit.BatchNorm2d(4), nn.ReLU6(), nn.Dropout(), nn.BatchNorm2d(4))
    net[1].eval()
    net(X).sum().backward()
    normkit.swap(net)
    before = state_of(net)
    normkit.swap(net, fuse=True, example=X)
    assert state_of(net) == before


def test_an_example_that_the_model_edits_is_run_on_copies():
    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sub_(1).div_(2))

    net, x = Net(conv(), nn.BatchNorm2d(4), nn.SiLU()), X.clone()
    report = normkit.swap(net, fuse=True, example=x)
    assert report.facts["fused"] == 1
    assert report.facts["largest change of the output"] < 1e-5
    assert torch.equal(x, X)


def test_a_module_in_another_mode_than_the_rest_keeps_it():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()).eval()
    net[3].train()
    net[2].train()
    assert fused(net, X).facts["fused"] == 1
    assert [m.training for m in net] == [False, False, True, True]


def test_inside_distributed_data_parallel_ranks_do_not_wait():
    assert on_ranks(fuse_rank) == {0: (None, True), 1: ("relu", True)}


class Scripted(nn.Module):
    """Reads the norm's output by what no observer of torch's functions sees."""

    def __init__(self):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(3), nn.SiLU()
        self.read = torch.jit.script(shifted)

    def forward(self, x):
        h = self.norm(x)
        return self.read(h) + self.act(h)


def shifted(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def test_what_is_seen_too_late_is_refused_and_undone():
    net = Scripted()
    before = state_of(net)
    with pytest.raises(ToolError, match=r"run as the model is, .* puts out something else"):
        normkit.swap(net, fuse=True, example=X)
    assert state_of(net) == before
    assert type(net.norm) is nn.BatchNorm2d


class NeedsTargets(nn.Sequential):
    def forward(self, x, targets=None):
        if self.training and targets is None:
            raise ValueError("give targets")
        return super().forward(x)


@pytest.mark.parametrize(
    ("net", "arguments", "said"),
    [
        (nn.Sequential(nn.BatchNorm2d(3)), {}, "give example="),
        (NeedsTargets(nn.BatchNorm2d(3)).eval(), {"example": X}, "in training, and that raised"),
        (
            nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()),
            {"example": X, "forward": lambda net, x: str(net(x))},
            "puts out no tensor",
        ),
    ],
    ids=["no example", "needs targets", "no tensor"],
)
def test_what_cannot_be_fused_is_refused_and_undone(net, arguments, said):
    before = state_of(net)
    with pytest.raises(ToolError, match=said):
        normkit.swap(net, fuse=True, **arguments)
    assert state_of(net) == before


@pytest.mark.parametrize(
    ("name", "more", "count", "layout"),
    [
        ("resnet10t", {"drop_path_rate": 0.3}, 7, torch.contiguous_format),
        ("resnet10t", {"drop_path_rate": 0.3}, 7, torch.channels_last),
        ("ghostnet_050", {}, 33, torch.channels_last),
    ],
    ids=["resnet", "resnet channels last", "ghostnet channels last"],
)
def test_families_of_timm(name, more, count, layout):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **more).to(memory_format=layout)
    x = images(4).to(memory_format=layout)
    assert fused(net, x, tolerance=1e-4).facts["fused"] == count
