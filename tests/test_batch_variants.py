"""Ghost, renormalized and frozen batch norm."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import normkit
import oracle
from normkit import functional as F

EPS = 1e-5


def ghosts(samples, size):
    return max(1, -(-samples // size))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(("samples", "size"), [(8, 4), (10, 4), (7, 2), (5, 8), (6, 1), (7, 5)])
def test_ghosts_are_normalized_alone_and_tracked_together(samples, size, masked, each_backend):
    x = torch.randn(samples, 3, 5, dtype=torch.float64) * 2 + 1
    residual, dy = torch.randn(2, samples, 3, 5, dtype=torch.float64)
    mask = torch.rand(samples, 1, 5) < 0.7 if masked else None
    layer = normkit.GhostBatchNorm(3, size, act="relu", dtype=torch.float64)
    whole = normkit.BatchNorm(3, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    a = x.clone().requires_grad_()
    y = layer(a, mask=mask, residual=residual)
    expected, _, _ = oracle.normalize(
        x.numpy(),
        "ghost",
        EPS,
        groups=ghosts(samples, size),
        weight=layer.weight.detach().numpy(),
        residual=residual.numpy(),
        mask=None if mask is None else mask.numpy(),
        name="relu",
    )
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-11, atol=1e-11)
    whole(x, mask=mask)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(getattr(layer, name), buffer)
    if mask is None:
        y.backward(dy)
        gradient = oracle.input_gradient(
            x.numpy(),
            np.where(expected > 0, dy.numpy(), 0),
            "ghost",
            EPS,
            groups=ghosts(samples, size),
            weight=layer.weight.detach().numpy(),
        )
        np.testing.assert_allclose(a.grad.numpy(), gradient, rtol=1e-9, atol=1e-10)


def test_ghosts_keep_channels_last_and_evaluate_as_batch_norm():
    layer = normkit.GhostBatchNorm(3, 2)
    x = torch.randn(5, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dx.is_contiguous(memory_format=torch.channels_last)
    plain = normkit.BatchNorm(3)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain.eval()(x))


def test_no_ghost_costs_a_call_of_its_own():
    with normkit.backend.watch() as calls:
        F.batch_norm(torch.randn(100, 3), training=True, ghost_size=2)
        F.batch_norm(torch.randn(101, 3), training=True, ghost_size=3)
    assert len(calls) == 3
    assert [spec.pool.ghosts for spec, _ in calls] == [50, 33, None]


def renorm_pair(momentum=0.2, **limits):
    layer = normkit.BatchRenorm(3, momentum=momentum, dtype=torch.float64, **limits)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.running_mean.copy_(torch.tensor([0.0, 3.0, -0.2]))
    layer.running_var.copy_(torch.tensor([1.0, 0.02, 30.0]))
    return layer


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.5, 0.4), (100.0, 100.0)])
def test_renorm_is_the_papers_algorithm(r_max, d_max, each_backend):
    layer = renorm_pair(r_max=r_max, d_max=d_max, r_steps=(0, 0), d_steps=(0, 0))
    before = copy.deepcopy(layer)
    x = torch.randn(16, 3, dtype=torch.float64) * 2 + 1
    y = layer(x)
    expected, mean, variance = oracle.renorm(
        x.numpy(),
        before.running_mean.numpy(),
        before.running_var.numpy(),
        EPS,
        r_max,
        d_max,
        layer.weight.detach().numpy(),
        layer.bias.detach().numpy(),
    )
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    for moved, old, new in (
        (layer.running_mean, before.running_mean, mean),
        (layer.running_var, before.running_var, variance),
    ):
        np.testing.assert_allclose(moved.numpy(), 0.8 * old.numpy() + 0.2 * new)
    assert layer.num_batches_tracked == 1


def test_where_no_limit_binds_training_gives_what_evaluation_does():
    layer = renorm_pair(r_max=1e3, d_max=1e3, r_steps=(0, 0), d_steps=(0, 0))
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    by_running = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(layer(x), by_running)


def test_renorms_correction_is_a_constant_to_the_gradient(each_backend):
    layer = renorm_pair(r_max=1.5, d_max=0.4, r_steps=(0, 0), d_steps=(0, 0))
    x, dy = torch.randn(2, 8, 3, dtype=torch.float64)
    mean, sigma = x.mean(0), (x.var(0, correction=0) + EPS).sqrt()
    running_sigma = (layer.running_var + EPS).sqrt()
    r = (sigma / running_sigma).clamp(1 / 1.5, 1.5)
    d = ((mean - layer.running_mean) / running_sigma).clamp(-0.4, 0.4)
    a = x.clone().requires_grad_()
    layer(a).backward(dy)
    expected = oracle.input_gradient(
        x.numpy(), dy.numpy(), "batch", EPS, weight=(layer.weight.detach() * r).numpy()
    )
    np.testing.assert_allclose(a.grad.numpy(), expected, rtol=1e-9, atol=1e-11)
    standard = (x - mean) / sigma
    torch.testing.assert_close(layer.weight.grad, (dy * (standard * r + d)).sum(0))
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))


def test_renorms_tangent_is_the_transpose_of_its_gradient(each_backend):
    layer = renorm_pair(r_max=1.5, d_max=0.4, r_steps=(0, 0), d_steps=(0, 0)).requires_grad_(False)
    x, dy, v = torch.randn(3, 8, 3, dtype=torch.float64)
    a = x.clone().requires_grad_()
    copy.deepcopy(layer)(a).backward(dy)

    def call(x):
        return normkit.functional_call(layer, {}, (x,))[0]

    _, tangent = torch.func.jvp(call, (x,), (v,))
    torch.testing.assert_close((tangent * dy).sum(), (a.grad * v).sum())


def test_the_limits_open_as_published():
    def limits(step):
        seen = torch.tensor(step)
        wide = torch.tensor([[-1.0], [1.0]]) * 1e4 + 5e4
        y = F.batch_renorm(
            wide,
            torch.zeros(1),
            torch.ones(1),
            training=True,
            num_batches_tracked=seen,
        )
        d = y.mean().item()
        return (y[1] - y[0]).item() / 2, d

    for step, r, d in [
        (0, 1, 0),
        (5_000, 1, 0),
        (15_000, 1 + 2 * 10 / 35, 2.5),
        (25_000, 1 + 2 * 20 / 35, 5),
        (40_000, 3, 5),
        (90_000, 3, 5),
    ]:
        assert limits(step) == pytest.approx((r, d), abs=1e-5)


def test_the_step_count_is_in_the_state_dict_and_loads_from_batch_norm():
    layer = normkit.BatchRenorm(2, r_steps=(0, 4), d_steps=(0, 4))
    for _ in range(2):
        layer(torch.randn(8, 2) * 3 + 1)
    copied = normkit.BatchRenorm(2, r_steps=(0, 4), d_steps=(0, 4))
    copied.load_state_dict(layer.state_dict())
    x = torch.randn(8, 2) * 9 + 4
    assert torch.equal(copied(x), layer(x))
    assert not torch.equal(normkit.BatchRenorm(2, r_steps=(0, 4), d_steps=(0, 4))(x), layer(x))
    layer.load_state_dict(nn.BatchNorm1d(2).state_dict())
    assert layer.num_batches_tracked == 0


def test_renorm_ignores_padding(each_backend):
    layer = renorm_pair(r_steps=(0, 0), d_steps=(0, 0))
    other = copy.deepcopy(layer)
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    padded = torch.cat([x, torch.full_like(x, torch.nan)], -1)
    y = layer(padded, mask=(torch.arange(8) < 4)[None, None])
    torch.testing.assert_close(y[..., :4], other(x))
    for a, b in zip(layer.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_batch_norm_is_fixed_and_loads_what_batch_norm_saves():
    trained = nn.BatchNorm2d(3)
    nn.init.normal_(trained.weight)
    trained(torch.randn(8, 3, 4, 4) * 2 + 1)
    frozen = normkit.FrozenBatchNorm(3)
    frozen.load_state_dict(trained.state_dict(), strict=True)
    trained.load_state_dict(frozen.state_dict(), strict=True)
    before = copy.deepcopy(frozen.state_dict())
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = frozen.train().requires_grad_(True)(x)
    torch.testing.assert_close(y, trained.eval()(x))
    y.sum().backward()
    rstd = (trained.running_var + EPS).rsqrt() * trained.weight
    torch.testing.assert_close(x.grad, rstd.detach()[None, :, None, None].expand_as(x))
    assert list(frozen.parameters()) == []
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, before[name])
    with pytest.raises(RuntimeError, match=r"FrozenBatchNorm\(3.*can't be thawed; use BatchNorm"):
        frozen.unfreeze()
    conv = nn.Conv2d(3, 3, 1).eval()
    fused = nn.utils.fuse_conv_bn_eval(conv, frozen.eval())
    torch.testing.assert_close(fused(x), frozen(conv(x)), atol=1e-5, rtol=1e-5)


VARIANTS = {
    "BatchNorm": lambda **k: normkit.BatchNorm(3, **k),
    "GhostBatchNorm": lambda **k: normkit.GhostBatchNorm(3, 4, **k),
    "BatchRenorm": lambda **k: normkit.BatchRenorm(3, r_steps=(0, 3), d_steps=(0, 2), **k),
    "FrozenBatchNorm": lambda **k: normkit.FrozenBatchNorm(3, **k),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_copies_pickles_and_other_devices(name):
    layer = VARIANTS[name](act="silu")
    x = torch.randn(6, 3, 4) * 2 + 1
    layer(x)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), VARIANTS[name](act="silu")]
    copies[-1].load_state_dict(layer.state_dict(), strict=True)
    layer.share_memory()
    assert all(t.is_shared() for t in [*layer.parameters(), *layer.buffers()])
    for training in (True, False):
        y = layer.train(training)(x)
        for copied in copies:
            assert repr(copied.train(training)) == repr(layer)
            assert torch.equal(copied(x), y)

    meta = VARIANTS[name](act="silu", device="meta")
    assert meta(x.to("meta")).shape == x.shape
    meta.to_empty(device="cpu").reset_parameters()
    fresh = VARIANTS[name](act="silu")
    for key, value in fresh.state_dict().items():
        assert torch.equal(meta.state_dict()[key], value)
    assert torch.equal(meta(x), fresh(x))


@pytest.mark.parametrize("name", VARIANTS)
def test_state_dicts_from_before_batches_were_counted_load(name):
    layer = VARIANTS[name]()
    old = {k: v + 1 for k, v in layer.state_dict().items() if k != "num_batches_tracked"}
    layer.load_state_dict(old, strict=True)  # no _metadata: version 1
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_var, old["running_var"])


@pytest.mark.parametrize("name", ["BatchNorm", "GhostBatchNorm", "BatchRenorm"])
def test_update_bn_averages_all_batches_alike(name):
    layer = VARIANTS[name]()
    batches = [torch.randn(6, 3) * 2 + 1 for _ in range(3)]
    torch.optim.swa_utils.update_bn(batches, layer)
    torch.testing.assert_close(layer.running_mean, torch.stack(batches).mean((0, 1)))
    correction = 0 if name == "BatchRenorm" else 1
    variances = torch.stack([b.var(0, correction=correction) for b in batches])
    torch.testing.assert_close(layer.running_var, variances.mean(0))
    assert layer.num_batches_tracked == 3


X = torch.randn(5, 6, 4)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: normkit.GhostBatchNorm(6, 0), ValueError, r"GhostBatchNorm\(6.*ghost_size.* 0;"),
        (lambda: normkit.GhostBatchNorm(6, 2.5), ValueError, "ghost_size must be an integer.*2.5"),
        (lambda: F.batch_norm(X, training=True, ghost_size=-1), ValueError, "ghost_size.*-1"),
        (
            lambda: normkit.GhostBatchNorm(6, 2)(X[..., 0]),
            ValueError,
            r"GhostBatchNorm\(6.*per channel of a ghost batch.*\(5, 6\).*ghost size",
        ),
        (lambda: normkit.GhostBatchNorm(6, 3)(X, mask=[1]), TypeError, "boolean tensor.*list"),
        (
            lambda: normkit.GhostBatchNorm(6, 3)(X, residual=X[:3]),
            ValueError,
            r"residual must have the input's shape, .*5, 6, 4.*3, 6, 4",
        ),
        (lambda: normkit.BatchRenorm(6, r_max=0.5), ValueError, r"BatchRenorm\(6.*r_max.*0.5"),
        (lambda: normkit.BatchRenorm(6, r_max=float("nan")), ValueError, "r_max.*nan"),
        (lambda: normkit.BatchRenorm(6, d_max=-1.0), ValueError, "d_max must be >= 0, got -1.0"),
        (
            lambda: normkit.BatchRenorm(6, r_steps=(40, 5)),
            ValueError,
            r"r_steps must be \(first, last\).*\(40, 5\)",
        ),
        (lambda: normkit.BatchRenorm(6, d_steps=(-1, 5)), ValueError, r"d_steps.*\(-1, 5\)"),
        (lambda: normkit.BatchRenorm(6)(X[:1, :, :1]), ValueError, "more than 1 value per channel"),
        (lambda: normkit.BatchRenorm(5)(X), ValueError, r"BatchRenorm\(5.*6 channels.*\(5,\)"),
        (
            lambda: normkit.BatchNorm(6).accumulate(0),
            ValueError,
            r"BatchNorm\(6.*micro_batches must be an integer >= 1, got 0",
        ),
        (
            lambda: normkit.BatchNorm(6, track_running_stats=False).accumulate(2),
            ValueError,
            "accumulate needs running statistics.*track_running_stats=True",
        ),
        (
            lambda: normkit.BatchNorm(6, track_running_stats=False).freeze(),
            ValueError,
            "freeze needs running statistics",
        ),
    ],
)
def test_it_says_what_is_wrong(make, error, says):
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_moves_before_an_error(name):
    layer = VARIANTS[name]()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="residual must have the input's shape"):
        layer(torch.randn(5, 3), residual=torch.randn(4, 3))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])
