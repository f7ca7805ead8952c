"""Curvature and scales against dense matrices."""

import numpy as np
import pytest
import torch
from torch import nn

from normkit.lab.numerics import (
    condition_number,
    curvature,
    deviation_ratio,
    hessian_product,
    lanczos,
    unevenness,
)


def small(norm=False):
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(5)] if norm else []
    model = nn.Sequential(nn.Linear(4, 5), *between, nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (40,))


@pytest.mark.parametrize("norm", [False, True], ids=["without", "with_batch_norm"])
def test_unevenness_is_that_of_the_dense_hessian(norm):
    model, x, y = small(norm)
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        given = {n: v.view(s) for n, v, s in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, given, (x,)), y)

    vector = torch.cat([p.detach().flatten() for p in model.parameters()])
    values = np.linalg.eigvalsh(torch.autograd.functional.hessian(loss, vector).numpy())
    wanted = np.abs(values).max() / np.abs(values).mean()
    # The mean eigenvalue, estimated from random starts, is right on average: so is the inverse.
    found = np.array([1 / unevenness(model, x, y, seed) for seed in range(20)])
    assert found.mean() * wanted == pytest.approx(1, abs=4 * found.std() * wanted / 20**0.5)
    assert found.std() * wanted < 0.25


def test_lanczos_quadrature_is_exact_for_low_powers_and_finds_the_largest():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    matrix = turn @ np.diag(np.r_[10.0, rng.normal(size=29)]) @ turn.T
    start = torch.from_numpy(rng.normal(size=30))
    dense = torch.from_numpy(matrix)
    nodes, weights = lanczos(lambda v: dense @ v, start, 12)
    v = start.numpy() / np.linalg.norm(start.numpy())
    assert weights.sum() == pytest.approx(1)
    for power in range(1, 24):
        wanted = v @ np.linalg.matrix_power(matrix, power) @ v
        assert nodes**power @ weights == pytest.approx(wanted, rel=1e-6)
    assert nodes.max() == pytest.approx(10, rel=1e-8)


def test_lanczos_stops_at_an_invariant_subspace():
    nodes, weights = lanczos(lambda v: 3 * v, torch.ones(8, dtype=torch.float64), 20)
    assert nodes.tolist() == pytest.approx([3])
    assert weights.tolist() == pytest.approx([1])


def test_condition_number_and_deviation_ratio_are_those_of_numpy():
    rng = np.random.default_rng(0)
    x = rng.normal([1, 2, 3], [0.1, 1, 10], (200, 3))
    with_one = np.c_[x, np.ones(200)]
    wanted = np.linalg.cond(with_one.T @ with_one / 200)
    assert condition_number(torch.from_numpy(x)) == pytest.approx(wanted, rel=1e-6)
    assert deviation_ratio(torch.from_numpy(x)) == pytest.approx(x.std(0).max() / x.std(0).min())
    constant = torch.from_numpy(np.c_[x, np.full(200, 7.0)])
    assert condition_number(constant) < 1e7
    assert deviation_ratio(constant) == pytest.approx(deviation_ratio(torch.from_numpy(x)))


def network(seed=0):
    """The loss of a small network, its weights, and its Hessian by autograd in float64."""
    torch.manual_seed(seed)
    x, y = torch.randn(40, 3).double(), torch.randint(0, 3, (40,))
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    weights = list(net.parameters())
    sizes = [w.numel() for w in weights]
    names = [name for name, _ in net.named_parameters()]

    def loss(flat):
        parts = [p.view_as(w) for p, w in zip(flat.split(sizes), weights, strict=True)]
        state = dict(zip(names, parts, strict=True))
        return nn.functional.cross_entropy(torch.func.functional_call(net, state, (x,)), y)

    at = torch.cat([w.detach().flatten() for w in weights])
    dense = torch.autograd.functional.hessian(loss, at).numpy()
    return nn.functional.cross_entropy(net(x), y), weights, dense


def test_the_hessians_product_is_that_of_the_dense_one():
    loss, weights, dense = network()
    vector = torch.randn(len(dense), generator=torch.Generator().manual_seed(1)).double()
    found = hessian_product(loss, weights)(vector)
    assert found.numpy() == pytest.approx(dense @ vector.numpy(), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_curvature_is_the_largest_eigenvalue_and_never_above_it(seed):
    loss, weights, dense = network(seed)
    largest = np.abs(np.linalg.eigvalsh(dense)).max()
    found = curvature(loss, weights)
    assert found <= largest * (1 + 1e-9)
    assert found == pytest.approx(largest, rel=0.03)


def test_the_curvature_of_a_plane_is_zero():
    weight = torch.ones(3, requires_grad=True)
    assert curvature((weight * torch.arange(3.0)).sum() + 0 * weight.square().sum(), [weight]) == 0
