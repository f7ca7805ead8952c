"""The two batch norms that only studies use, against their formulas."""

import math

import pytest
import torch

import normkit
from normkit.lab.training.norms import DetachedBatchNorm, NoisyBatchNorm, create, layer_of


def learned(layer):
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0)
        layer.bias.uniform_(-1.0, 1.0)
    return layer.double()


@pytest.mark.parametrize("shape", [(12, 5), (4, 5, 3, 2)])
def test_detached_is_batch_norm_forward_with_the_constant_statistics_gradient(shape):
    torch.manual_seed(0)
    ours, theirs = learned(DetachedBatchNorm(5)), normkit.BatchNorm(5).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape, dtype=torch.float64)
    y = ours(x)
    assert torch.allclose(y, theirs(x), rtol=0, atol=1e-14)
    assert torch.allclose(ours.running_mean, theirs.running_mean, rtol=1e-14)
    assert torch.allclose(ours.running_var, theirs.running_var, rtol=1e-14)
    assert ours.num_batches_tracked == 1
    over = [0, *range(2, x.ndim)]
    channels = (1, 5, *[1] * (x.ndim - 2))
    variance = x.detach().var(over, correction=0)
    wanted = g * (ours.weight / (variance + ours.eps).sqrt()).reshape(channels)
    (found,) = torch.autograd.grad(y, x, g)
    assert torch.allclose(found, wanted, rtol=1e-12)
    (whole,) = torch.autograd.grad(theirs(x), x, g)
    assert not torch.allclose(found, whole, rtol=1e-2)
    theirs.load_state_dict(ours.state_dict())
    ours.eval()
    theirs.eval()
    assert torch.equal(ours(x), theirs(x))


def test_the_noise_has_the_stated_moments():
    torch.manual_seed(0)
    units, samples = 2000, 400
    layer = NoisyBatchNorm(units).double()
    x = torch.randn(samples, units, dtype=torch.float64)
    clean = normkit.BatchNorm(units).double()(x).detach()
    # y = clean * scale + shift: a sample's shift and scale from two calls with the same noise.
    torch.manual_seed(1)
    y = layer(x).detach()
    torch.manual_seed(1)
    other = layer(2 * x + 3).detach()
    assert torch.allclose(y, other, atol=1e-4)
    torch.manual_seed(1)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        shift = layer(x)
        layer.bias.fill_(1.0)
        torch.manual_seed(1)
        scale = layer(x) - shift
    assert torch.allclose(clean * scale + shift, y, atol=1e-9)
    mu, sigma = shift.mean(0), scale.mean(0)
    assert abs(float(mu.mean())) < 4 * 0.29 / math.sqrt(units)
    assert float(mu.std()) == pytest.approx(1 / math.sqrt(12), rel=0.05)
    assert abs(float(mu.abs().max())) < 0.55
    assert float(sigma.mean()) == pytest.approx(1.125, abs=0.01)
    assert float(sigma.std()) == pytest.approx(0.25 / math.sqrt(12), rel=0.05)
    assert float((shift - mu).std()) == pytest.approx(0.1, rel=0.01)
    assert float((scale - sigma).std()) == pytest.approx(0.1, rel=0.01)


def test_noise_is_new_at_each_call_follows_the_seed_and_is_off_in_evaluation():
    layer, plain = NoisyBatchNorm(3), normkit.BatchNorm(3)
    x = torch.randn(8, 3, 4)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain.eval()(x))


def test_the_other_names_are_the_factorys():
    assert isinstance(create("group:2", 4), layer_of("group:2"))
    assert layer_of("noisy") is NoisyBatchNorm
    assert layer_of("detached") is DetachedBatchNorm
