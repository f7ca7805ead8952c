"""What test_devices runs in a process of its own: layers on a device that has no float64.

The device, "bare", keeps its tensors in host memory and refuses what Apple's (mps) refuses: float64
and operators on tensors of two devices. A device of torch's is made once a process, before any
backward.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import normkit
from normkit.parametrizations import spectral_norm, weight_norm, weight_standardization


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1

    def device_count(self):
        return 1


backend_registration._setup_privateuseone_for_python_backend("bare", device_guard=_Guard())
BARE = torch.device("bare", 0)
MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class OnBare(torch.Tensor):
    """A tensor on the device."""

    @staticmethod
    def __new__(cls, host):
        if host.dtype == torch.float64:
            raise TypeError("bare has no float64")
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), dtype=host.dtype, device=BARE
        )
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Bare(TorchDispatchMode):
    """Makes tensors on the device where that is asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    ours = {id(t.host): t for t in given if isinstance(t, OnBare)}
    if func not in MOVES and ours and any(t.dim() and not isinstance(t, OnBare) for t in given):
        raise RuntimeError(f"{func}: tensors on bare and on the CPU")
    device = torch.device(kwargs.get("device") or (BARE if ours else "cpu"))
    if device == BARE and kwargs.get("dtype") == torch.float64:
        raise TypeError("bare has no float64")
    if "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map_only(OnBare, lambda t: t.host, (args, kwargs))
    result = func(*args, **kwargs)

    def placed(host):
        if id(host) in ours:  # written in place
            return ours[id(host)]
        return host if device != BARE or any(host is t for t in given) else OnBare(host)

    return tree_map_only(torch.Tensor, placed, result)


@pytest.fixture(autouse=True)
def _bare():
    with Bare():
        yield


LAYERS = {
    "batch": lambda: normkit.BatchNorm(4, act="silu"),
    "batch, averaging all": lambda: normkit.BatchNorm(4, momentum=None),
    "accumulating": lambda: normkit.BatchNorm(4).accumulate(2),
    "ghost": lambda: normkit.GhostBatchNorm(4, 2),
    "renorm": lambda: normkit.BatchRenorm(4, r_steps=(0, 4), d_steps=(0, 4)),
    "instance": lambda: normkit.InstanceNorm1d(4, affine=True, track_running_stats=True),
    "group": lambda: normkit.GroupNorm(2, 4, act="relu"),
    "layer": lambda: normkit.LayerNorm(3),
    "rms": lambda: normkit.RMSNorm(3, zero_centered_weight=True),
    "dyt": lambda: normkit.DyT(3),
    "filter response": lambda: normkit.FilterResponseNorm(4),
    "global response": lambda: normkit.GlobalResponseNorm(4),
    "weight norm": lambda: weight_norm(nn.Linear(3, 2)),
    "spectral norm": lambda: spectral_norm(nn.Linear(3, 2)),
    "weight standardization": lambda: weight_standardization(nn.Linear(3, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_does_there_what_it_does_on_the_cpu(name):
    layer = LAYERS[name]()
    there = copy.deepcopy(layer).to(BARE)
    x = torch.randn(4, 4, 3)
    for training in (True, True, False):
        layer.train(training)
        there.train(training)
        a, b = x.clone().requires_grad_(), x.to(BARE).requires_grad_()
        y, y_there = layer(a), there(b)
        assert y_there.device == BARE
        torch.testing.assert_close(y_there.cpu(), y)
        y.pow(3).sum().backward()
        y_there.pow(3).sum().backward()
        torch.testing.assert_close(b.grad.cpu(), a.grad, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(there(b).cpu(), layer(a))
    for p, q in zip(there.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(p.grad.cpu(), q.grad, atol=1e-4, rtol=1e-5)
    for p, q in zip(there.buffers(), layer.buffers(), strict=True):
        torch.testing.assert_close(p.cpu(), q)


DATA = {
    "float32": torch.randn(64, 3) * 2 + 1,
    "float32 far from zero": (torch.arange(192.0) % 16 + 16_000_000).reshape(64, 3),
    "float16": (torch.randn(64, 3) + 100).half(),
    "time stamps": torch.arange(192).reshape(64, 3) + 1_700_000_000,
}


@pytest.mark.parametrize("name", DATA)
def test_standardize_keeps_its_digits(name):
    x = DATA[name]
    layer = normkit.Standardize(3).fit(x)
    there = normkit.Standardize(3, device=BARE).fit([x.to(BARE)])
    torch.testing.assert_close(there.mean, layer.mean)
    for moved in (there, copy.deepcopy(layer).to(BARE)):
        y = moved(x.to(BARE))
        assert y.device == BARE
        torch.testing.assert_close(y.cpu(), layer(x))
        torch.testing.assert_close(moved.inverse(y).cpu(), layer.inverse(layer(x)))
    again = normkit.Standardize(3, device=BARE)
    again.load_state_dict(there.state_dict())
    torch.testing.assert_close(again.half().to("cpu")(x), layer(x))


def test_tools_compute_in_float64_on_the_cpu():
    model = nn.Sequential(nn.Linear(3, 4), normkit.BatchNorm1d(4))
    there = copy.deepcopy(model).to(BARE)
    data = [torch.randn(8, 3) for _ in range(2)]
    normkit.recalibrate(model, data)
    normkit.recalibrate(there, [x.to(BARE) for x in data])
    torch.testing.assert_close(there[1].running_var.cpu(), model[1].running_var)
    here_and_there = (model, data), (there, [x.to(BARE) for x in data])
    found = [normkit.inspect(model, loader).rows for model, loader in here_and_there]
    assert [(f.code, f.layer) for f in found[0]] == [(f.code, f.layer) for f in found[1]]
    x = torch.randn(5, 3)
    y = model.eval()(x)
    folded = normkit.fold(there.eval(), x.to(BARE)).model
    torch.testing.assert_close(folded(x.to(BARE)).cpu(), y)
