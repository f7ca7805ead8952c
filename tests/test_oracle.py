"""Every norm against the float64 oracle, on ordinary and on hostile inputs."""

import numpy as np
import pytest
import torch

import oracle
from normkit import functional as F

EPS = 1e-5

# kind -> (shape, how to call it, oracle's extras, torch's own)
KINDS = {
    "batch": ((6, 4, 5, 3), lambda x, w, b, **k: F.batch_norm(x, None, None, w, b, True, **k), {}),
    "instance": ((3, 4, 5, 7), lambda x, w, b, **k: F.instance_norm(x, None, None, w, b, **k), {}),
    "group": ((3, 6, 5, 3), lambda x, w, b, **k: F.group_norm(x, 2, w, b, **k), {"groups": 2}),
    "channels": (
        (3, 6, 5, 3),
        lambda x, w, b, **k: F.layer_norm(x, (6,), w, b, channels_first=True, **k),
        {},
    ),
    "last": ((3, 5, 16), lambda x, w, b, **k: F.layer_norm(x, (16,), w, b, **k), {}),
    "rms": (
        (3, 5, 16),
        lambda x, w, b, **k: F.rms_norm(x, (16,), w, EPS, **k),
        {"center": False},
    ),
}


def kind_of(name):
    return "last" if name == "rms" else name


def torchs(name, x):
    functional = torch.nn.functional
    match name:
        case "batch":
            return functional.batch_norm(x, None, None, None, None, True)
        case "instance":
            return functional.instance_norm(x)
        case "group":
            return functional.group_norm(x, 2)
        case "channels":
            return functional.layer_norm(x.movedim(1, -1), (x.shape[1],)).movedim(-1, 1)
        case "last":
            return functional.layer_norm(x, x.shape[-1:])
        case _:
            return functional.rms_norm(x, x.shape[-1:], None, EPS)


@pytest.mark.parametrize("act", [None, "relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", KINDS)
def test_the_formula(name, masked, act, each_backend):
    shape, call, extra = KINDS[name]
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    size = shape[-1] if kind_of(name) == "last" else shape[1]
    weight, bias = torch.randn(2, size, dtype=torch.float64)
    if name == "rms":
        bias = None
    mask = torch.rand(shape) < 0.6 if masked else None
    options = {"mask": mask, "act": act}
    residual = None
    if name in ("batch", "instance", "group"):
        residual = options["residual"] = torch.randn(shape, dtype=torch.float64)
    y = call(x, weight, bias, **options)
    expected, _, _ = oracle.normalize(
        x.numpy(),
        kind_of(name),
        EPS,
        weight=weight.numpy(),
        bias=None if bias is None else bias.numpy(),
        mask=None if mask is None else mask.numpy(),
        residual=None if residual is None else residual.numpy(),
        name=act,
        **extra,
    )
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-11, atol=1e-11)


HOSTILE = {
    "mean 1e3, std 1e-2": lambda s: torch.randn(s) * 1e-2 + 1e3,
    "mean 1e5": lambda s: torch.randn(s) + 1e5,
    "std 1e-6": lambda s: torch.randn(s) * 1e-6,
    "1e15": lambda s: torch.randn(s) * 1e15,
    "1e25": lambda s: torch.randn(s) * 1e25,
    "1e30": lambda s: torch.randn(s) * 1e30,
    "constant": lambda s: torch.full(s, 3.7),
    "constant 1e30": lambda s: torch.full(s, 1e30),
    "outlier": lambda s: torch.randn(s).index_fill(-1, torch.tensor([0]), 1e6),
    "subnormal": lambda s: torch.randn(s) * 1e-41,
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("name", KINDS)
def test_hostile_inputs_are_no_further_from_the_oracle_than_torchs(name, hostile, each_backend):
    shape, call, extra = KINDS[name]
    x = HOSTILE[hostile](shape).requires_grad_()
    y = call(x, None, None)
    dy = torch.randn(shape)
    y.backward(dy)
    exact = x.detach().double().numpy()
    expected, _, _ = oracle.normalize(exact, kind_of(name), EPS, **extra)
    expected_gradient = oracle.input_gradient(exact, dy.numpy(), kind_of(name), EPS, **extra)

    theirs = x.detach().clone().requires_grad_()
    torch_y = torchs(name, theirs)
    torch_y.backward(dy)

    def error(got, want):
        return np.nan_to_num(np.abs(got.detach().double().numpy() - want), nan=np.inf).max()

    # Ten units in the last place of the largest value, or torch's own error where that is more.
    floor = 10 * 2.0**-23
    assert error(y, expected) <= max(floor * (1 + np.abs(expected).max()), error(torch_y, expected))
    scale = np.abs(expected_gradient).max()
    rstd = 1 / np.sqrt(exact.var() + EPS) if hostile.startswith("1e") else scale
    assert error(x.grad, expected_gradient) <= max(
        floor * (scale + rstd), error(theirs.grad, expected_gradient)
    )


@pytest.mark.parametrize("size", [1e25, 1e30])
@pytest.mark.parametrize("name", KINDS)
def test_huge_inputs_have_right_outputs_and_gradients_where_torchs_are_wrong(
    name, size, each_backend
):
    shape, call, extra = KINDS[name]
    x = (torch.randn(shape) * size).requires_grad_()
    y = call(x, None, None)
    dy = torch.randn(shape)
    y.backward(dy)
    exact = x.detach().double().numpy()
    expected, _, _ = oracle.normalize(exact, kind_of(name), EPS, **extra)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    gradient = oracle.input_gradient(exact, dy.numpy(), kind_of(name), EPS, **extra)
    np.testing.assert_allclose(
        x.grad.numpy(), gradient, rtol=1e-4, atol=1e-5 * np.abs(gradient).max()
    )


def test_the_running_variance_saturates_and_the_running_mean_does_not(each_backend):
    x = torch.randn(64, 2) * 1e30
    mean, var = torch.zeros(2), torch.ones(2)
    F.batch_norm(x, mean, var, training=True)
    torch.testing.assert_close(mean, 0.1 * x.double().mean(0).float(), rtol=1e-5, atol=0)
    assert torch.equal(var, torch.full((2,), torch.inf))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", KINDS)
def test_nan_and_inf_stay_in_their_pool(name, bad, each_backend):
    shape, call, extra = KINDS[name]
    x = torch.randn(shape)
    clean = call(x, None, None)
    at = oracle.pools(kind_of(name), shape, extra.get("groups", 1))[1]
    poisoned = torch.zeros(shape, dtype=torch.bool)
    poisoned[at] = True
    spoiled = x.clone()
    spoiled.view(-1)[poisoned.view(-1).nonzero()[0]] = bad
    spoiled.requires_grad_()
    y = call(spoiled, None, None)
    y.backward(torch.randn(shape))
    assert torch.equal(y[~poisoned], clean[~poisoned])
    assert spoiled.grad[~poisoned].isfinite().all()
    assert y[poisoned].isnan().any()


def test_running_statistics_are_unbiased_averages(each_backend):
    x = torch.randn(7, 3, 2, dtype=torch.float64) + 2
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    seen = torch.tensor(0)
    F.batch_norm(x, mean, var, training=True, momentum=0.25, num_batches_tracked=seen)
    columns = x.numpy().transpose(1, 0, 2).reshape(3, -1)
    np.testing.assert_allclose(mean.numpy(), 0.25 * columns.mean(1), rtol=1e-12)
    np.testing.assert_allclose(var.numpy(), 0.75 + 0.25 * columns.var(1, ddof=1), rtol=1e-12)
    assert seen == 1


def test_add_returns_the_norm_of_the_sum_and_the_sum(each_backend):
    x, h = torch.randn(2, 4, 8, dtype=torch.float64)
    for call in (F.layer_norm, F.rms_norm):
        a, b = x.clone().requires_grad_(), h.clone().requires_grad_()
        y, total = call(a, (8,), add=b)
        assert torch.equal(total, x + h)
        torch.testing.assert_close(y, call(x + h, (8,)))
        (y.square().sum() + 3 * total.sum()).backward()
        z = (x + h).requires_grad_()
        (call(z, (8,)).square().sum() + 3 * z.sum()).backward()
        torch.testing.assert_close(a.grad, z.grad)
        torch.testing.assert_close(b.grad, z.grad)
