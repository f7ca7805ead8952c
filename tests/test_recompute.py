"""A recomputation reads what its forward read, for every kind of checkpointing."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import normkit
from normkit import recompute


class Moving:
    """Multiplies by a state that each real step moves on by one."""

    def __init__(self):
        self.state = torch.ones(())
        self.read = []

    def step(self):
        value = self.state.clone()
        if not recompute.recomputing():
            self.state += 1
        return value

    def __call__(self, x):
        value = recompute.remember(self.step, moves=True)
        self.read.append(value.item())
        return (x * value).sin()


def nested(x, layer, outer, inner):
    """Outer region: a call, an inner region of two calls, a call."""

    def inside(z):
        return layer(layer(z))

    def outside(z):
        return layer(checkpoint(inside, layer(z), use_reentrant=inner))

    return checkpoint(outside, x, use_reentrant=outer)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_each_recomputation_reads_its_own_forwards_state(reentrant):
    layer, x = Moving(), torch.randn(3, requires_grad=True)
    ys = [checkpoint(lambda z: layer(layer(z)), x, use_reentrant=reentrant) for _ in range(3)]
    plain = x.detach().clone().requires_grad_()
    ((plain * 1).sin() * 2).sin().sum().backward()
    ys[0].sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)
    ys[2].sum().backward()
    ys[1].sum().backward()
    assert layer.read == [1, 2, 3, 4, 5, 6, 1, 2, 5, 6, 3, 4]
    assert layer.state == 7


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, when nested
@pytest.mark.parametrize("inner", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("outer", [True, False], ids=["in-reentrant", "in-non-reentrant"])
def test_regions_nest(outer, inner):
    layer, x = Moving(), torch.randn(3, requires_grad=True)
    nested(x, layer, outer, inner).sum().backward()
    assert layer.state == 5
    plain = x.detach().clone().requires_grad_()
    y = plain
    for value in range(1, 5):
        y = (y * value).sin()
    y.sum().backward()
    torch.testing.assert_close(x.grad, plain.grad)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_retained_graph_is_recomputed_alike_each_time(reentrant):
    layer, x = Moving(), torch.randn(3, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant).sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    layer(x)
    x.grad = None
    y.backward()
    assert torch.equal(x.grad, first)
    assert layer.state == 3


def test_a_saved_tensor_looked_at_outside_a_backward_moves_nothing():
    layer, x = Moving(), torch.randn(3, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(y.grad_fn._saved_self, x * 1)
    assert layer.state == 2


def test_other_hooks_inside_a_region_hide_nothing():
    layer, x = Moving(), torch.randn(3, requires_grad=True)

    def inside(z):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return layer(z)

    checkpoint(inside, x, use_reentrant=False).sum().backward()
    assert layer.state == 2
    torch.testing.assert_close(x.grad, x.detach().cos())


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_what_was_read_goes_with_the_graph(reentrant):
    kept = []

    def read():
        value = torch.ones(3)
        kept.append(weakref.ref(value))
        return value

    x = torch.randn(3, requires_grad=True)
    y = checkpoint(
        lambda z: (z * recompute.remember(read, moves=True)).sin(), x, use_reentrant=reentrant
    )
    assert kept[0]() is not None
    del y
    gc.collect()
    assert kept[0]() is None
    with torch.no_grad():
        recompute.remember(read, moves=True)
    assert kept[1]() is None


def test_a_backward_inside_a_region_records_nothing_of_its_own():
    layer, x = Moving(), torch.randn(3, requires_grad=True)

    def inside(z):
        y = checkpoint(layer, z, use_reentrant=False)
        (slope,) = torch.autograd.grad(y.sum(), z)
        return layer(z) * slope

    checkpoint(inside, x, use_reentrant=False, early_stop=False).sum().backward()
    slope = x.detach().cos()
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).cos() * slope)
    assert layer.state == 3


class ByHand(torch.autograd.Function):
    """Recomputes as custom checkpointing does."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        with torch.no_grad():
            return layer(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = ctx.layer(x)
        return torch.autograd.grad(y, x, dy)[0], None


def test_another_kind_of_recomputation_moves_nothing_and_says_what_it_reads():
    layer, x = Moving(), torch.randn(3, requires_grad=True)
    y = ByHand.apply(x, layer)
    with pytest.warns(UserWarning, match="not by torch.utils.checkpoint"):
        y.sum().backward()
    assert layer.state == 2


def test_a_recomputation_that_reads_more_than_its_forward_is_an_error():
    layer, x, more = Moving(), torch.randn(3, requires_grad=True), []

    def inside(z):
        for _ in more:
            recompute.remember(layer.step, moves=True)
        return layer(z)

    y = checkpoint(inside, x, use_reentrant=True)
    more.append(1)
    with pytest.raises(RuntimeError, match=r"more often than the 1 times.*modes"):
        y.sum().backward()


def multiplied(x, weight, buffer):
    y = x * weight * recompute.remember(buffer.exp, moves=True)
    with torch.no_grad():
        buffer.add_(1)
    return y


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_backward_reads_what_its_forward_read(backend):
    torch._dynamo.reset()
    x, weight, buffer = torch.ones(3), torch.ones(3, requires_grad=True), torch.zeros(3)
    torch.compile(multiplied, fullgraph=True, backend=backend)(x, weight, buffer).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3))
    assert torch.equal(buffer, torch.ones(3))


def test_a_checkpoint_inside_a_compiled_graph_is_refused_not_wrong():
    torch._dynamo.reset()
    x, weight, buffer = torch.ones(3), torch.ones(3, requires_grad=True), torch.zeros(3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(*inputs):
        return checkpoint(multiplied, *inputs, use_reentrant=False)

    with pytest.raises(Exception, match=r"would read state that has moved.* out of the checkpoint"):
        call(x, weight, buffer)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_a_compiled_graph_inside_a_checkpoint_is_refused_not_wrong(reentrant):
    torch._dynamo.reset()
    layer = normkit.BatchRenorm(3, r_steps=(0, 0), d_steps=(0, 0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, requires_grad=True)
    y = checkpoint(compiled, x, use_reentrant=reentrant)
    with pytest.raises(Exception, match=r"would read state that has moved.* out of the checkpoint"):
        y.square().sum().backward()
