"""Layers on DTensors, on real process groups: as one process on the whole tensor."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import normkit
from normkit.parametrizations import weight_standardization
from ranks import on_ranks

LAYERS = {
    "batch": lambda: normkit.BatchNorm(4, act="silu"),
    "batch, evaluated": lambda: normkit.BatchNorm(4).eval(),
    "ghost": lambda: normkit.GhostBatchNorm(4, 2),
    "renorm": lambda: normkit.BatchRenorm(4),
    "instance": lambda: normkit.InstanceNorm(4, affine=True, track_running_stats=True),
    "group": lambda: normkit.GroupNorm(2, 4, act="relu"),
    "layer": lambda: normkit.LayerNorm(6),
    "layer over channels": lambda: normkit.LayerNorm(4, channels_first=True),
    "rms": lambda: normkit.RMSNorm(6, zero_centered_weight=True),
    "dyt": lambda: normkit.DyT(6),
    "filter response": lambda: normkit.FilterResponseNorm(4),
    "global response": lambda: normkit.GlobalResponseNorm(4),
    "weight standardization": lambda: weight_standardization(nn.Linear(6, 3)),
}


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def check_as_whole(mesh, placement, make):
    """A layer on an input with this placement, forward, backward and buffers."""
    torch.manual_seed(0)
    whole = make().double()
    layer = distribute_module(copy.deepcopy(whole), mesh)
    x = torch.randn(4, 4, 6, dtype=torch.float64, requires_grad=True)
    shared = distribute_tensor(x.detach(), mesh, [placement]).requires_grad_()
    y, of_shared = whole(x), layer(shared)
    torch.testing.assert_close(full(of_shared), y)
    y.pow(3).sum().backward()
    of_shared.pow(3).sum().backward()
    torch.testing.assert_close(full(shared.grad), x.grad)
    for p, q in zip(layer.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(full(p.grad), q.grad)
    for p, q in zip(layer.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(full(p), q)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("name", LAYERS)
def test_a_mesh_of_one_rank(name, mesh):
    check_as_whole(mesh, Shard(1), LAYERS[name])


@pytest.mark.parametrize("layer", [normkit.LayerNorm(6), normkit.RMSNorm(6)], ids=["layer", "rms"])
def test_sequence_parallel_on_one_rank(layer, mesh):
    x = torch.randn(2, 4, 6)
    y = parallelize_module(copy.deepcopy(layer), mesh, SequenceParallel())(x)
    assert y.placements == (Shard(1),)
    torch.testing.assert_close(y.full_tensor(), layer(x))


class Block(nn.Module):
    """A feed-forward block with norms before, inside and after."""

    def __init__(self):
        super().__init__()
        self.before, self.after = normkit.LayerNorm(6), normkit.RMSNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.inside = normkit.DyT(8)

    def forward(self, x):
        return self.after(x + self.down(self.inside(self.up(self.before(x)))))


def of_two_ranks(rank):
    mesh = init_device_mesh("cpu", (2,))
    for make in LAYERS.values():
        for placement in (Shard(0), Shard(1)):
            check_as_whole(mesh, placement, make)
    torch.manual_seed(0)
    whole = Block()
    plan = {
        "before": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "after": SequenceParallel(),
    }
    block = parallelize_module(copy.deepcopy(whole), mesh, plan)
    block.inside = distribute_module(block.inside, mesh)
    x = torch.randn(2, 5, 6)
    y = whole(x)
    shared = block(distribute_tensor(x, mesh, [Shard(1)]))
    torch.testing.assert_close(shared.full_tensor(), y)
    y.pow(2).sum().backward()
    shared.pow(2).sum().backward()
    for p, q in zip(block.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(full(p.grad), q.grad, atol=1e-5, rtol=1e-5)
    return "equal"


def test_two_ranks_equal_one_process():
    assert on_ranks(of_two_ranks) == {0: "equal", 1: "equal"}
