"""Masked elements are as if cut out, whatever they hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import normkit
from normkit import functional as F

NORMS = {
    "batch": lambda x, **k: F.batch_norm(x, None, None, *affine(x), True, **k),
    "batch-eval": lambda x, **k: F.batch_norm(x, x.new_zeros(6), x.new_ones(6), *affine(x), **k),
    "instance": lambda x, **k: F.instance_norm(x, None, None, *affine(x), **k),
    "group": lambda x, **k: F.group_norm(x, 3, *affine(x), **k),
    "layer": lambda x, **k: F.layer_norm(x, (6,), *affine(x), channels_first=True, **k),
    "rms": lambda x, **k: F.rms_norm(x, (6,), affine(x)[0], channels_first=True, **k),
}


def affine(x):
    return torch.linspace(0.5, 2, 6).to(x.dtype), torch.linspace(-1, 1, 6).to(x.dtype)


@pytest.mark.parametrize("act", [None, "silu", "gelu"])
@pytest.mark.parametrize("name", NORMS)
def test_padding_is_cut_out_and_nan_in_it_leaks_nowhere(name, act, each_backend):
    """(N, C, L) padded behind length 5: as the unpadded input, zero and without gradient behind."""
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    residual = torch.randn_like(x)
    takes_residual = name in ("batch", "batch-eval", "instance", "group")
    padding = torch.full((4, 6, 3), torch.nan, dtype=torch.float64)
    mask = (torch.arange(8) < 5)[None, None]

    a = torch.cat([x, padding], -1).requires_grad_()
    r = torch.cat([residual, padding], -1).requires_grad_()
    b, s = x.clone().requires_grad_(), residual.clone().requires_grad_()
    ya = NORMS[name](a, mask=mask, act=act, **({"residual": r} if takes_residual else {}))
    yb = NORMS[name](b, act=act, **({"residual": s} if takes_residual else {}))
    torch.testing.assert_close(ya[..., :5], yb)
    assert torch.equal(ya[..., 5:], torch.zeros(4, 6, 3, dtype=torch.float64))
    dy = torch.randn_like(ya)
    ya.backward(dy)
    yb.backward(dy[..., :5])
    pairs = [(a.grad, b.grad)] + ([(r.grad, s.grad)] if takes_residual else [])
    for padded, cut in pairs:
        torch.testing.assert_close(padded[..., :5], cut)
        assert torch.equal(padded[..., 5:], torch.zeros(4, 6, 3, dtype=torch.float64))


def test_masked_training_moves_the_running_statistics_as_the_cut_out_part_does(each_backend):
    lengths = torch.tensor([5, 2, 7])
    mask = (torch.arange(7) < lengths[:, None])[:, None]
    x = torch.randn(3, 4, 7)
    ours, cut = normkit.BatchNorm(4), torch.nn.BatchNorm1d(4)
    y = ours(torch.where(mask, x, torch.nan), mask=mask)
    rows = x.movedim(1, -1)[mask[:, 0]]
    torch.testing.assert_close(y.movedim(1, -1)[mask[:, 0]], cut(rows))
    torch.testing.assert_close(ours.running_mean, cut.running_mean)
    torch.testing.assert_close(ours.running_var, cut.running_var)


def test_masked_instance_statistics_are_averaged_over_the_samples_that_have_any(each_backend):
    mask = torch.ones(3, 1, 8, dtype=torch.bool)
    mask[1] = False
    x = torch.randn(3, 4, 8)
    ours = normkit.InstanceNorm1d(4, track_running_stats=True)
    theirs = torch.nn.InstanceNorm1d(4, track_running_stats=True)
    ours(x, mask=mask)
    theirs(x[[0, 2]])
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_an_empty_pool_moves_nothing_and_a_pool_of_one_moves_the_mean_alone(each_backend):
    layer = normkit.BatchNorm(3)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[:, 0] = True
    mask[2, 1] = True
    x = torch.randn(4, 3, requires_grad=True)
    y = layer(x, mask=mask)
    y.square().sum().backward()
    assert torch.equal(y[:, 2], torch.zeros(4))
    assert torch.equal(y[:, 1], torch.tensor([0.0, 0.0, 2.0, 0.0]))
    assert layer.running_mean[2] == 0
    assert layer.running_var[1:].tolist() == [1, 1]
    torch.testing.assert_close(layer.running_mean[1], 0.1 * x[2, 1].detach())
    torch.testing.assert_close(layer.running_var[0], 0.9 + 0.1 * x[:, 0].detach().var())
    assert x.grad.isfinite().all()


def test_a_batch_that_is_all_padding_does_not_count_in_the_average_of_all_batches(each_backend):
    layer, x = normkit.BatchNorm(2, momentum=None), torch.randn(6, 2)
    for mask in (torch.zeros(6, 1, dtype=torch.bool), torch.ones(6, 1, dtype=torch.bool)):
        layer(x, mask=mask)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0))
    assert layer.num_batches_tracked == 1


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(NORMS)),
    samples=st.integers(2, 5),
    length=st.integers(2, 6),
    seed=st.integers(0, 2**31),
)
def test_a_mask_of_ones_changes_nothing(name, samples, length, seed):
    x = torch.randn(
        samples, 6, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    ones = torch.ones(1, 1, 1, dtype=torch.bool)
    torch.testing.assert_close(NORMS[name](x, mask=ones), NORMS[name](x))


def test_masked_calls_compile_whole_and_under_vmap(each_backend):
    x, mask = torch.randn(3, 4, 6, 5), torch.rand(3, 4, 1, 5) < 0.5

    def call(x, mask):
        return F.batch_norm(x, training=True, mask=mask)

    each = torch.stack([call(a, m) for a, m in zip(x, mask, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(x, mask), each)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x[0], mask[0]), each[0])


@pytest.mark.parametrize(
    "make",
    [
        normkit.BatchNorm1d,
        lambda *args, **kwargs: normkit.GhostBatchNorm(args[0], 4, **kwargs),
        lambda *args, **kwargs: normkit.BatchNorm(*args, **kwargs).accumulate(2),
    ],
    ids=["BatchNorm1d", "GhostBatchNorm", "accumulating"],
)
@pytest.mark.parametrize("shape", [(0, 1), (3, 1, 0)], ids=["no samples", "no positions"])
def test_a_batch_of_nothing_does_not_count_in_the_average_of_all_batches(make, shape):
    layer = make(1, momentum=None)
    layer(torch.zeros(shape))
    layer(torch.zeros(shape))
    layer(torch.tensor([[1.0], [3.0]]))
    if isinstance(layer, normkit.BatchNorm) and layer.micro_batches > 1:
        layer(torch.zeros(shape))
    assert layer.running_mean == layer.running_var == 2
    assert layer.num_batches_tracked == 1
