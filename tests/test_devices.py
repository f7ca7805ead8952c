"""Layers on devices that hold no values or no float64, and state that comes from one."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import normkit
from normkit.parametrizations import spectral_norm, weight_norm, weight_standardization

HERE = Path(__file__).parent

LAYERS = {
    "batch": lambda: normkit.BatchNorm(4),
    "accumulating": lambda: normkit.BatchNorm(4).accumulate(2),
    "ghost": lambda: normkit.GhostBatchNorm(4, 2),
    "renorm": lambda: normkit.BatchRenorm(4),
    "frozen": lambda: normkit.FrozenBatchNorm(4),
    "instance": lambda: normkit.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "group": lambda: normkit.GroupNorm(2, 4),
    "layer": lambda: normkit.LayerNorm(3),
    "rms": lambda: normkit.RMSNorm(3),
    "dyt": lambda: normkit.DyT(3),
    "filter response": lambda: normkit.FilterResponseNorm(4, learn_eps=True),
    "global response": lambda: normkit.GlobalResponseNorm(4),
    "standardize": lambda: normkit.Standardize(4),
    "weight norm": lambda: weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: spectral_norm(nn.Conv1d(4, 2, 1)),
    "weight standardization": lambda: weight_standardization(nn.Linear(3, 2)),
}


def test_a_device_without_float64():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(HERE / "without_float64.py"),
            "-p",
            "no:cacheprovider",
        ],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.fixture(params=LAYERS)
def layer(request):
    """A layer after some training, its statistics not those it began with."""
    layer = LAYERS[request.param]()
    if isinstance(layer, normkit.Standardize):
        return layer.fit(torch.randn(9, 4))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3)
        for _ in range(2):
            layer(torch.randn(4, 4, 3) + 1)
    return layer


@pytest.fixture
def on_meta(request, layer):
    """The same layer, made on the meta device."""
    with torch.device("meta"):
        return LAYERS[request.node.callspec.params["layer"]]()


def test_a_call_on_the_meta_device_has_the_shape(layer):
    x = torch.randn(4, 4, 3)
    on_meta = copy.deepcopy(layer).to("meta")
    for training in (True, False):
        on_meta.train(training)
        y = on_meta(x.to("meta").requires_grad_())
        assert y.is_meta
        assert y.shape == layer(x).shape
        assert y.stride() == layer(x).stride()
        y.sum().backward()
        with torch.no_grad():
            assert on_meta(x.to("meta")).shape == y.shape


def test_state_is_assigned_to_a_layer_made_on_the_meta_device(layer, on_meta):
    on_meta.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    x = torch.randn(4, 4, 3)
    for training in (False, True, True):
        layer.train(training)
        on_meta.train(training)
        torch.testing.assert_close(on_meta(x), layer(x))
    for p, q in zip(on_meta.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_layer_made_on_the_meta_device_is_filled_later(layer, on_meta):
    with pytest.warns(UserWarning, match="meta parameter in the current model, which is a no-op"):
        on_meta.load_state_dict(layer.state_dict())
    on_meta.to_empty(device="cpu").load_state_dict(layer.state_dict())
    x = torch.randn(4, 4, 3)
    torch.testing.assert_close(on_meta.eval()(x), layer.eval()(x))
