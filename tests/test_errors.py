"""Bad input: the error names the value, the layer and the remedy, and nothing has moved."""

import pytest
import torch
from torch import nn

import normkit
from normkit import functional as F

X = torch.randn(4, 6, 5)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: normkit.BatchNorm1d(5)(X), ValueError, r"BatchNorm1d\(5.*6 channels.*\(5,\)"),
        (lambda: normkit.BatchNorm2d(6)(X), ValueError, r"BatchNorm2d\(6.*4D.*3D.*\(4, 6, 5\)"),
        (
            lambda: normkit.BatchNorm1d(6)(X[:1, :, 0]),
            ValueError,
            r"BatchNorm1d\(6.*more than 1 value per channel.*\(1, 6\).*drop_last.*GroupNorm",
        ),
        (lambda: normkit.BatchNorm(6)(X.long()), TypeError, r"BatchNorm\(6.*int64.*float\(\)"),
        (lambda: normkit.BatchNorm(6)(X.to(torch.complex64)), TypeError, "complex64"),
        (lambda: normkit.InstanceNorm1d(6)(X[..., :1]), ValueError, r"1 position.*\(4, 6, 1\)"),
        (lambda: normkit.InstanceNorm1d(5)(X), ValueError, r"expected 5 channels, got 6"),
        (lambda: normkit.GroupNorm(4, 6), ValueError, "6 channels in 4 groups.*1, 2, 3, 6 groups"),
        (lambda: normkit.GroupNorm(0, 6), ValueError, "6 channels in 0 groups"),
        (lambda: F.group_norm(X, 4), ValueError, "6 channels in 4 groups"),
        (lambda: normkit.LayerNorm(7)(X), ValueError, r"LayerNorm\(\(7,\).*\(7,\).*\(4, 6, 5\)"),
        (lambda: normkit.LayerNorm(()), ValueError, r"at least one axis, got \(\)"),
        (lambda: normkit.BatchNorm(6)(None), TypeError, r"BatchNorm\(6.*tensor.*NoneType"),
        (lambda: normkit.BatchNorm(6)(X, mask=[1]), TypeError, "boolean tensor.*list"),
        (lambda: normkit.BatchNorm(6)(X, residual=1.0), TypeError, "residual.*float"),
        (lambda: normkit.BatchNorm(6, device="meta")(X), ValueError, "running_mean is on meta"),
        (lambda: normkit.BatchNorm(6, eps=0.0)(X), ValueError, "eps must be positive"),
        (lambda: normkit.BatchNorm1d(6, eps=None), ValueError, "BatchNorm1d: eps.*None"),
        (lambda: normkit.BatchNorm1d(6, momentum="a"), ValueError, "momentum.*'a'"),
        (lambda: normkit.LayerNorm(5, channels_first=True)(X), ValueError, "C = 5.*4, 6, 5"),
        (
            lambda: normkit.LayerNorm((6, 5), channels_first=True),
            ValueError,
            r"the one axis C, got \(6, 5\)",
        ),
        (lambda: normkit.BatchNorm(6, act="rleu"), ValueError, "'rleu'; did you mean 'relu'"),
        (lambda: normkit.BatchNorm(3, act=nn.ReLU()), ValueError, "unknown act ReLU.*'relu'"),
        (lambda: setattr(normkit.LayerNorm(5), "act", nn.Tanh()), ValueError, "unknown act Tanh"),
        (lambda: F.layer_norm(X, (5,), act="tanh"), ValueError, "unknown act 'tanh'.*'gelu'"),
        (lambda: normkit.BatchNorm1d(6, eps=-1.0), ValueError, "eps.*-1.0"),
        (lambda: normkit.LayerNorm(6, eps=float("nan")), ValueError, "eps.*nan"),
        (lambda: normkit.BatchNorm1d(6, momentum=1.5), ValueError, "momentum.*1.5"),
        (lambda: F.batch_norm(X), ValueError, "running_mean and running_var"),
        (lambda: F.batch_norm(X, torch.zeros(6)), ValueError, "go together"),
        (
            lambda: normkit.BatchNorm(6)(X, mask=torch.ones(4, 5, dtype=torch.bool)),
            ValueError,
            r"mask.*\(4, 6, 5\).*\(4, 5\).*mask\[:, None, :\]",
        ),
        (
            lambda: normkit.BatchNorm(6)(X, mask=torch.ones(4, 2, 5, dtype=torch.bool)),
            ValueError,
            r"mask.*\(4, 2, 5\)",
        ),
        (lambda: normkit.BatchNorm(6)(X, mask=torch.ones(4, 1, 5)), TypeError, "boolean.*float32"),
        (lambda: normkit.BatchNorm(6)(X, residual=X[:1]), ValueError, r"residual.*shape.*\(?1, 6"),
        (lambda: normkit.GroupNorm(2, 6)(X, residual=X.half()), TypeError, "residual.*float16"),
        (lambda: normkit.RMSNorm(5)(X, add=X[0]), ValueError, "add must have the input's shape"),
        (lambda: normkit.RMSNorm(5)(X, add=X.to("meta")), ValueError, "add.*device.*meta"),
    ],
)
def test_it_says_what_is_wrong(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    "bad",
    [
        {"mask": torch.ones(4, 5, dtype=torch.bool)},
        {"residual": X[:1]},
    ],
    ids=["mask", "residual"],
)
def test_nothing_moves_before_an_error(bad):
    layer = normkit.BatchNorm(6)
    with pytest.raises(ValueError, match="must have"):
        layer(X, **bad)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(6))


def test_a_failing_update_leaves_the_counter_alone():
    layer = normkit.BatchNorm(6, affine=False)
    layer.running_var = layer.running_var.to("meta")
    with pytest.raises(ValueError, match="running_var is on meta, the input on cpu"):
        layer(X)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: normkit.BatchNorm1d(5)(X), lambda: nn.BatchNorm1d(5)(X)),
        (lambda: normkit.BatchNorm1d(5).eval()(X), lambda: nn.BatchNorm1d(5).eval()(X)),
        (lambda: normkit.GroupNorm(2, 4)(X), lambda: nn.GroupNorm(2, 4)(X)),
        (lambda: normkit.LayerNorm(7)(X), lambda: nn.LayerNorm(7)(X)),
        (lambda: normkit.RMSNorm((6, 4))(X), lambda: nn.RMSNorm((6, 4))(X)),
        (lambda: F.group_norm(X, 4), lambda: nn.functional.group_norm(X, 4)),
        (lambda: F.layer_norm(X, ()), lambda: nn.functional.layer_norm(X, ())),
        (lambda: F.batch_norm(X), lambda: nn.functional.batch_norm(X, None, None)),
        (
            lambda: F.instance_norm(X, weight=torch.ones(5)),
            lambda: nn.functional.instance_norm(X, weight=torch.ones(5)),
        ),
        (lambda: normkit.BatchNorm1d(6)(X.long()), lambda: nn.BatchNorm1d(6)(X.long())),
        (lambda: normkit.LayerNorm(5)(X.long()), lambda: nn.LayerNorm(5)(X.long())),
    ],
    ids=[
        *(
            "channels",
            "channels in evaluation",
            "group channels",
            "normalized shape",
            "rms shape",
        ),
        *("groups", "no axes", "no statistics", "weight", "integers", "integers in layer norm"),
    ],
)
def test_where_torch_raises_a_runtime_error_so_does_ours(ours, theirs):
    with pytest.raises(RuntimeError):
        theirs()
    with pytest.raises(RuntimeError) as met:
        ours()
    assert isinstance(met.value, ValueError | TypeError)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda nn: nn.BatchNorm1d(6), (1, 6)),
        (lambda nn: nn.BatchNorm2d(6), (1, 6, 1, 1)),
        (lambda nn: nn.InstanceNorm1d(6), (4, 6, 1)),
        (lambda nn: nn.InstanceNorm2d(6), (4, 6, 1, 1)),
        (lambda nn: nn.GroupNorm(6, 6), (1, 6)),
        (lambda nn: nn.BatchNorm3d(6), (1, 6, 2)),
    ],
    ids=["batch", "batch of one pixel", "instance", "instance of one pixel", "group", "rank"],
)
def test_the_words_of_torchs_errors_that_callers_look_for_are_in_ours(make, shape):
    with pytest.raises(ValueError) as theirs:  # noqa: PT011
        make(nn)(torch.randn(shape))
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        make(normkit)(torch.randn(shape))
    words = str(theirs.value).split(", got")[0]
    assert words in str(ours.value)
