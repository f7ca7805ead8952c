"""Norms of other packages: taken where they compute one of normkit's, else listed."""

import copy
import io
import pickle

import norms_of_others as others
import pytest
import torch
import transformers
from norms_of_others import shaken
from states import state_of
from timm.layers import grn, norm, norm_act
from timm.layers.filter_response_norm import FilterResponseNormAct2d, FilterResponseNormTlu2d
from timm.layers.norm_act import BatchNormAct2d, GroupNorm1Act, LayerNormActFp32, RmsNormAct
from torch import nn
from zoo import create, images

import normkit
from normkit.tools.norms import Norm, Unknown, identify, is_norm, read, unknown_norms

ROWS = (4, 3, 16)
IMAGES = (4, 16, 5, 3)

TAKEN = [
    (lambda: others.LlamaRMSNorm(16), ROWS, "rms"),
    (lambda: others.LlamaRMSNorm(16, eps=1e-3), ROWS, "rms"),
    (lambda: others.GemmaRMSNorm(16), ROWS, "rms"),
    (lambda: others.T5LayerNorm(16), ROWS, "rms"),
    (lambda: others.CohereLayerNorm(16), ROWS, "layer"),
    (lambda: others.DebertaLayerNorm(16), ROWS, "layer"),
    (lambda: others.OlmoLayerNorm(16), ROWS, "layer"),
    (lambda: others.LayerNormOfOpenClip(16), ROWS, "layer"),
    (lambda: others.LayerNorm2d(16), IMAGES, "layer"),
    (lambda: others.DetrFrozenBatchNorm2d(16), IMAGES, "frozen"),
    (lambda: others.GlobalLayerNorm(16), IMAGES, "group"),
    (lambda: others.BatchNormMish(16), IMAGES, "batch"),
    (lambda: others.GroupNormPReLU(16), IMAGES, "group"),
    (lambda: grn.GlobalResponseNorm(16), (4, 5, 3, 16), "grn"),
    (lambda: grn.GlobalResponseNorm(16, channels_last=False), IMAGES, "grn"),
    (lambda: FilterResponseNormTlu2d(16), IMAGES, "frn"),
    (lambda: FilterResponseNormAct2d(16, act_layer=nn.ELU), IMAGES, "frn"),
    (lambda: RmsNormAct(16, act_layer=nn.Mish), ROWS, "rms"),
    (lambda: LayerNormActFp32(16), ROWS, "layer"),
    (lambda: GroupNorm1Act(16, act_layer=nn.Hardswish), IMAGES, "group"),
    (lambda: BatchNormAct2d(16, act_layer=nn.Hardswish), IMAGES, "batch"),
    (lambda: BatchNormAct2d(16, act_layer=nn.ReLU6, drop_layer=nn.Dropout), IMAGES, "batch"),
]


@pytest.mark.parametrize(
    ("make", "shape", "kind"), TAKEN, ids=[f"{type(m()).__name__}-{k}" for m, _, k in TAKEN]
)
def test_a_norm_that_is_taken_computes_the_same(make, shape, kind):
    old = shaken(make())
    found = identify(old)
    assert isinstance(found, Norm)
    assert found.kind == kind
    net = nn.Sequential(copy.deepcopy(old))
    tensors = dict(net.named_parameters())
    report = normkit.swap(net)
    assert report.facts == {"swapped": 1, "left": 0}
    assert isinstance(net[0], normkit.layers._Norm)
    assert list(net.named_parameters()) == list(tensors.items())
    assert {f"0.{key}" for key in old.state_dict()} <= set(net.state_dict())
    for training in (False, True):
        for scale in (1.0, 1e-3):
            x = torch.randn(shape, requires_grad=True)
            z = x.detach().clone().requires_grad_()
            results = []
            for module, leaf in ((old.train(training), x), (net.train(training), z)):
                torch.manual_seed(0)
                y = module(leaf * scale)
                y.square().mean().backward()
                results.append(y)
            theirs, ours = results
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(z.grad, x.grad, rtol=1e-3, atol=1e-6)
            assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    "make",
    [
        *(others.LlamaRMSNorm, others.GemmaRMSNorm, others.T5LayerNorm, others.CohereLayerNorm),
        *(others.DebertaLayerNorm, others.OlmoLayerNorm, others.LayerNormOfOpenClip),
    ],
)
def test_the_order_of_casts_is_kept(make, dtype):
    old = shaken(make(64)).to(dtype)
    new = normkit.swap(copy.deepcopy(old)).model
    x = torch.randn(100, 64).to(dtype)
    y = new(x)
    assert y.dtype == dtype
    assert (y != old(x)).float().mean() < 2e-3  # float32 sums in another order


@pytest.mark.parametrize(
    "make",
    [
        *(others.LlamaRMSNorm, others.GemmaRMSNorm, others.LayerNorm2d, norm.LayerNorm2d),
        *(norm.LayerNormExp2d, norm_act.LayerNormAct2dFp32, norm.RmsNorm2d),
    ],
)
def test_outputs_keep_their_strides(make):
    old = shaken(make(16))
    new = normkit.swap(copy.deepcopy(old)).model
    assert isinstance(new, normkit.layers._Norm)
    if identify(old).channels_first:
        x = torch.randn(2, 16, 5, 3)
        inputs = [x, x.contiguous(memory_format=torch.channels_last)]
    else:
        inputs = [torch.randn(2, 3, 16), torch.randn(3, 2, 16).transpose(0, 1)]
        inputs += [torch.randn(16, 5).T, torch.randn(5, 32)[:, ::2]]
    for x in inputs:
        assert new(x).stride() == old(x).stride()
        torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-5)


LEFT = [
    (others.UnbiasedLayerNorm, "the nearest is layer, off by"),
    (others.ScaleNorm, "with an eps that isn't found"),
    (others.NoisyNorm, "in training"),
    (others.DetachedNorm, "its gradients or running statistics differ"),
    (others.SimpleNorm, "computes no norm of normkit's"),
    (others.GatedRMSNorm, "its forward takes x, gate=None, not a tensor alone"),
    (others.GammaNorm, "it has gamma, and a swap would change names in the state dict"),
    (others.TrainableFrozenBatchNorm, "in training"),
    (nn.LocalResponseNorm, "no weight and no normalized_shape"),
]


@pytest.mark.parametrize(("make", "why"), LEFT, ids=[make.__name__ for make, _ in LEFT])
def test_what_computes_something_else_is_listed_and_left(make, why):
    net = nn.Sequential(shaken(make(16)))
    old = net[0]
    report = normkit.swap(net)
    assert net[0] is old
    assert report.facts == {"swapped": 0, "left": 1, "unknown norms": 1}
    assert report.rows[0].note.startswith("left: unknown norm: ")
    assert why in report.rows[0].note
    assert read(old) is None
    assert why in unknown_norms(net)["0"]


def test_a_forward_that_was_replaced_on_the_module_is_not_trusted():
    for layer in (nn.LayerNorm(8), others.LlamaRMSNorm(8)):
        layer.forward = lambda x: x
        assert identify(layer) == Unknown("its forward was replaced on the module")


def test_what_is_made_of_norms_is_no_norm():
    net = nn.Sequential(others.PreNorm(8), nn.Linear(8, 8), nn.ReLU())
    torch.nn.utils.parametrizations.weight_norm(net[1])
    assert [name for name, m in net.named_modules() if identify(m)] == ["0.norm"]
    assert normkit.swap(net).facts == {"swapped": 1, "left": 0}


class Counting(others.LlamaRMSNorm):
    def __init__(self, size):
        super().__init__(size)
        self.calls = []

    def forward(self, x):
        self.calls.append(len(x))
        torch.rand(1)
        return super().forward(x)


def test_to_be_looked_at_leaves_no_trace():
    net = nn.Sequential(Counting(8), nn.BatchNorm1d(8), others.BatchNormMish(8)).train()
    net[0].register_forward_hook(lambda *_: net[0].calls.append("hook"))
    before = state_of(net)
    assert all(is_norm(module) for module in net)
    assert state_of(net) == before
    assert net[0].calls == []


def test_a_verdict_is_that_of_equal_modules_alone():
    assert identify(others.LlamaRMSNorm(16)).eps == 1e-6
    assert identify(others.LlamaRMSNorm(16, eps=1e-4)).eps == 1e-4
    assert identify(others.LlamaRMSNorm(8)).shape == (8,)
    assert identify(others.GemmaRMSNorm(16)).zero_centered_weight


def test_on_the_meta_device_too():
    with torch.device("meta"):
        old = others.LlamaRMSNorm(16)
        assert identify(old).kind == "rms"
    new = normkit.swap(old).model
    assert new.weight is old.weight
    assert new.weight.device.type == "meta"


def test_one_plus_weight_goes_to_no_other_scale():
    net = nn.Sequential(others.GemmaRMSNorm(16))
    assert "scales by 1 + weight" in normkit.swap(net, "layer").rows[0].note
    normkit.swap(net)
    assert "scales by 1 + weight" in normkit.swap(net, "layer").rows[0].note
    x = torch.randn(3, 16)
    torch.testing.assert_close(normkit.swap(net, "rms").model(x), others.GemmaRMSNorm(16)(x))


TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 20}
TINY |= {"num_attention_heads": 2, "pad_token_id": 0}
MODELS = {
    "LlamaConfig": TINY | {"num_key_value_heads": 2},
    "Qwen3Config": TINY | {"num_key_value_heads": 2, "head_dim": 16},
    "GemmaConfig": TINY | {"num_key_value_heads": 2, "head_dim": 16},
    "DebertaConfig": TINY,
}


@pytest.mark.parametrize(
    ("name", "norms"),
    [("LlamaConfig", 5), ("Qwen3Config", 9), ("GemmaConfig", 5), ("DebertaConfig", 5)],
)
def test_models_of_transformers(name, norms):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**MODELS[name])
    model = transformers.AutoModel.from_config(config).eval()
    shaken(nn.ModuleList(m for m in model.modules() if is_norm(m)))
    ids = torch.randint(1, 20, (2, 7))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        old = copy.deepcopy(model).to(dtype)
        new = copy.deepcopy(old)
        report = normkit.swap(new, example=ids, forward=lambda m, x: m(input_ids=x)[0])
        assert report.facts["swapped"] == norms
        assert report.facts["left"] == 0
        assert list(new.state_dict()) == list(old.state_dict())
        y, z = old(input_ids=ids)[0], new(input_ids=ids)[0]
        assert (y.dtype, y.stride()) == (z.dtype, z.stride())
        assert (y - z).abs().max() <= tolerance * y.abs().max()


def test_activations_that_are_not_fused_follow_the_norm():
    model, x = create("lcnet_050"), images()
    before, keys = model(x), list(model.state_dict())
    report = normkit.swap(model, example=x)
    assert report.facts["left"] == 0
    assert report.rows[0].now == "BatchNorm2d, Hardswish"
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), before)
    restored = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(restored(x), before)
    normkit.swap(model, "group", groups=4)
    assert isinstance(model.bn1, normkit.GroupNorm)
    assert model.bn1.num_groups == 4
    assert (model.bn1(torch.randn(2, 8, 4, 4)) >= -0.375).all()  # the least of hard swish


def test_a_layer_that_learns_behind_the_norm_keeps_its_key():
    net = nn.Sequential(others.GroupNormPReLU(8))
    slope = net[0].act.weight
    normkit.swap(net)
    assert dict(net.named_parameters())["0.act.weight"] is slope
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    nn.Sequential(others.GroupNormPReLU(8)).load_state_dict(torch.load(file))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "vit_tiny_patch16_224"])
def test_torchs_layers_come_back_with_one_word(name):
    model, x = create(name), images()
    before, keys = model(x), list(model.state_dict())
    normkit.swap(model)
    report = normkit.swap(model, "torch")
    assert report.facts["left"] == 0
    assert not [m for m in model.modules() if isinstance(m, normkit.layers._Norm)]
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    notes = {row.note for row in normkit.swap(model, "torch").rows}
    assert notes == {"left: torch's already"}


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (normkit.GhostBatchNorm(8, 2), "torch has none of its kind"),
        (normkit.BatchNorm2d(8).freeze(), "its statistics are frozen"),
        (normkit.BatchNorm2d(8).accumulate(2), "it accumulates micro-batches"),
        (normkit.LayerNorm(8, channels_first=True), "its channels lie on axis 1"),
        (normkit.RMSNorm(8, zero_centered_weight=True), "no 1 + weight"),
        (normkit.LayerNorm(8, cast_before_affine=True), "doesn't round before"),
        (normkit.BatchNorm(8), "made for a number of axes"),
        (normkit.DyT(8), "torch has none of its kind"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_torch_lacks_is_left_with_the_reason(layer, why):
    net = nn.Sequential(layer)
    assert why in normkit.swap(net, "torch").rows[0].note
    assert net[0] is layer


def test_inspect_lists_what_it_does_not_know():
    net = nn.Sequential(nn.Linear(4, 16), others.SimpleNorm(16), others.LlamaRMSNorm(16))
    report = normkit.inspect(net, [torch.randn(8, 4)])
    assert list(report.facts["unknown norms"]) == ["1"]
    assert report.facts["norms"] == 1
    assert "1: unknown norm: it computes no norm of normkit's" in str(report)
