"""First and second derivatives by finite differences, forward and reverse."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from normkit import backend
from normkit import functional as F

NORMS = {
    "batch": lambda x, w, b, r, **k: F.batch_norm(x, None, None, w, b, True, residual=r, **k),
    "batch-eval": lambda x, w, b, r, **k: F.batch_norm(
        x, x.new_full((4,), 0.3), x.new_full((4,), 2.0), w, b, residual=r, **k
    ),
    "instance": lambda x, w, b, r, **k: F.instance_norm(x, None, None, w, b, residual=r, **k),
    "group": lambda x, w, b, r, **k: F.group_norm(x, 2, w, b, residual=r, **k),
    "layer": lambda x, w, b, r, **k: F.layer_norm(x, (4,), w, b, channels_first=True, add=r, **k),
    "rms": lambda x, w, b, r, **k: F.rms_norm(x, (4,), w, channels_first=True, add=r, **k),
    "layer-last": lambda x, w, b, r, **k: F.layer_norm(x.mT, (4,), w, b, add=r.mT, **k),
}


@pytest.mark.parametrize("act", [None, "relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("name", NORMS)
def test_derivatives(name, masked, act, each_backend):
    x, residual = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    weight, bias = torch.randn(2, 4, dtype=torch.float64)
    mask = torch.rand(3, 1, 3) < 0.7 if masked else None
    if name == "layer-last" and masked:
        mask = mask.mT

    def call(*inputs):
        return NORMS[name](*inputs, mask=mask, act=act)

    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]
    # Interpreted kernels are slow: there along random directions instead of every element.
    fast = backend.triton.interpreting()
    assert gradcheck(call, inputs, check_forward_ad=True, fast_mode=fast)
    if act in (None, "silu"):
        assert gradgradcheck(call, inputs, check_fwd_over_rev=True, fast_mode=fast)


def test_the_second_derivative_of_a_dead_channel_is_finite(each_backend):
    x = torch.zeros(4, 2, requires_grad=True)
    y = F.batch_norm(x, training=True).pow(3).sum() + x.sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.isfinite().all()
