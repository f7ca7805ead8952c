"""Standardize: the streaming fit against NumPy, its state, and data it can't use."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from normkit import Standardize


def state(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(lambda s: sum(s) > 1),
    center=st.sampled_from([0.0, -3.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_any_split_gives_the_statistics_of_the_whole(sizes, center, seed):
    torch.manual_seed(seed)
    x = torch.randn(sum(sizes), 3, 4, dtype=torch.float64) + center
    layer = Standardize(3).fit(x.split(sizes))
    channels = x.numpy().transpose(1, 0, 2).reshape(3, -1)
    np.testing.assert_allclose(layer.mean.numpy(), channels.mean(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.std.numpy(), channels.std(1), rtol=1e-9)
    assert layer.count.tolist() == [4 * sum(sizes)] * 3
    y = layer(x).numpy().transpose(1, 0, 2).reshape(3, -1)
    np.testing.assert_allclose(y.mean(1), 0, atol=1e-8)
    np.testing.assert_allclose(y.std(1), 1, rtol=1e-9)
    torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "channels_first", "data", "axes"),
    [
        (5, True, (6, 5), (0,)),
        (5, True, (6, 5, 2, 3), (0, 2, 3)),
        ((5, 2, 3), True, (6, 5, 2, 3), (0,)),
        (3, False, (6, 5, 2, 3), (0, 1, 2)),
        ((2, 3), False, (6, 5, 2, 3), (0, 1)),
        ((1, 2), True, (6, 1, 2), (0,)),
    ],
)
def test_the_shape_says_what_is_pooled(shape, channels_first, data, axes):
    x = torch.randn(data) * 3 + 1
    layer = Standardize(shape, channels_first=channels_first).fit(x)
    wide = x.double().numpy()
    mean, std = wide.mean(axes, keepdims=True), wide.std(axes, keepdims=True)
    np.testing.assert_allclose(layer(x).numpy(), (wide - mean) / std, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.inverse(layer(x)), x)


def test_digits_that_float32_statistics_would_lose():
    x = (torch.arange(4096, dtype=torch.float64) % 16 + 16_000_000).float()[:, None]
    layer = Standardize(1).fit(DataLoader(x, batch_size=100))
    expected = (np.arange(16) - 7.5) / np.arange(16).std()
    np.testing.assert_allclose(layer(x)[:16, 0].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("batch", "pick"),
    [
        (lambda x: (x, torch.zeros(len(x))), lambda b: b[0]),
        (lambda x: {"image": x, "label": 0}, lambda b: b["image"]),
        (lambda x: {"a": [({"b": x},)]}, lambda b: b["a"][0][0]["b"]),
    ],
)
def test_pick_takes_the_input_out_of_a_batch(batch, pick):
    x = torch.randn(10, 3)
    layer = Standardize(3).fit(map(batch, x.split(4)), pick=pick)
    torch.testing.assert_close(layer.mean, x.double().mean(0))
    with pytest.raises(TypeError, match=r"Standardize\(3.*(tuple|dict).*pick=lambda batch"):
        Standardize(3).fit(map(batch, x.split(4)))


def test_a_loader_of_pairs():
    x = torch.randn(10, 3)
    loader = DataLoader(TensorDataset(x, torch.zeros(10)), batch_size=3, shuffle=True)
    layer = Standardize(3).fit(loader, pick=lambda batch: batch[0])
    torch.testing.assert_close(layer.std, x.double().std(0, correction=0))


def test_nan_is_left_out_when_asked_and_stays_nan():
    x = torch.randn(50, 3, 2)
    missing = torch.rand(50, 3, 2) < 0.4
    missing[:10, 1] = True
    spoiled = torch.where(missing, torch.nan, x)
    layer = Standardize(3, ignore_nan=True).fit(spoiled.split(7))
    columns = spoiled.double().numpy().transpose(1, 0, 2).reshape(3, -1)
    np.testing.assert_allclose(layer.mean.numpy(), np.nanmean(columns, 1), rtol=1e-12)
    np.testing.assert_allclose(layer.std.numpy(), np.nanstd(columns, 1), rtol=1e-12)
    assert layer.count.tolist() == (~missing).sum((0, 2)).tolist()
    assert torch.equal(layer(spoiled).isnan(), missing)
    with pytest.raises(ValueError, match="NaN in feature 0, 1, 2 of the data; ignore_nan=True"):
        Standardize(3).fit(spoiled)


def test_constant_features_are_shifted_and_said():
    constants = torch.rand(20, dtype=torch.float64) * 1e3
    x = torch.cat([torch.randn(30, 1), constants.expand(30, 20)], 1)
    layer = Standardize(21)
    with pytest.warns(
        UserWarning, match=r"Standardize\(21.*not scaled: feature 1, 2, 3, 4, 5 and 15"
    ):
        layer.fit(x.split(7))
    assert torch.equal(layer(x)[:, 1:], torch.zeros(30, 20, dtype=torch.float64))
    assert torch.equal(layer.inverse(layer(x))[:, 1:], x[:, 1:])
    torch.testing.assert_close(layer(x + 2)[:, 1:], torch.full_like(x[:, 1:], 2))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "fitted on nothing"),
        (torch.zeros(0, 3), "fitted on nothing"),
        ([torch.tensor([[1.0, torch.nan, torch.nan]] * 2)], "no values but NaN in feature 1, 2"),
        (torch.tensor([[1.0, 2.0, torch.inf]]), "infinite values"),
        (torch.zeros(4, 2), r"expected input \(N, 3, \*\), got shape \(4, 2\)"),
        ([torch.zeros(4, 3), torch.zeros(4)], r"got shape \(4,\)"),
    ],
)
def test_data_that_cannot_be_fitted_leaves_it_as_it_was(data, says):
    layer = Standardize(3, ignore_nan=True).fit(torch.randn(8, 3))
    before = state(layer)
    with pytest.raises(ValueError, match=rf"Standardize\(3.*{says}"):
        layer.fit(data)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_an_exception_of_the_loader_leaves_it_as_it_was():
    def loader():
        yield torch.randn(4, 3)
        raise OSError("the disk")

    layer = Standardize(3)
    with pytest.raises(OSError, match="the disk"):
        layer.fit(loader())
    assert layer.count.tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError, match="used before fit"):
        layer(torch.randn(4, 3))


def test_it_is_saved_with_the_model_and_survives_copies_and_casts():
    x = torch.randn(20, 3) + 70_000
    model = torch.nn.Sequential(Standardize(3).fit(x), torch.nn.Linear(3, 2))
    fresh = torch.nn.Sequential(Standardize(3), torch.nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match=r"Standardize\(3.*used before fit; call fit"):
        fresh[0].inverse(x)
    fresh.load_state_dict(model.state_dict())
    others = (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    for other in others:
        assert torch.equal(other(x), model(x))
    assert list(model[0].parameters()) == []
    before = model[0](x)
    model.half()
    assert model[0].mean.dtype == torch.float64
    assert model[1].weight.dtype == torch.float16
    assert torch.equal(model[0](x), before)
    fresh.load_state_dict(torch.nn.Sequential(Standardize(3), torch.nn.Linear(3, 2)).state_dict())
    with pytest.raises(RuntimeError, match="used before fit"):
        fresh(x)


def test_dtypes_and_fx():
    pixels = torch.randint(0, 256, (6, 3, 4), dtype=torch.uint8)
    layer = Standardize(3).fit(pixels)
    assert layer(pixels).dtype == torch.float32
    torch.testing.assert_close(layer.inverse(layer(pixels)), pixels.float())
    assert layer(pixels.half()).dtype == torch.float16
    assert torch.equal(torch.fx.symbolic_trace(layer)(pixels), layer(pixels))
    assert torch.equal(torch.export.export(layer, (pixels,)).module()(pixels), layer(pixels))
    with pytest.raises(TypeError, match="complex64"):
        layer(pixels.to(torch.complex64))
    with pytest.raises(ValueError, match="at least one axis"):
        Standardize(())
