"""A small network and its data."""

import torch
from torch import nn

import normkit


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 4),
    )


def data(n=8, size=32, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, side, side, generator=generator) for _ in range(n)]


def healthy():
    net = network()
    normkit.recalibrate(net, data(seed=1))
    return net


def inspect_rank(rank, size):
    net = healthy()
    report = normkit.inspect(net, data(size=size))
    return sorted({f.name for f in report.rows})


def fuse_rank(rank):
    """Synchronized layers, rank 0 without a run: nobody waits."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.parallel.DistributedDataParallel(net)
    normkit.swap(model, "sync")
    if rank:
        normkit.swap(model, fuse=True, example=torch.randn(2, 3, 4, 4))
    model(torch.ones(2, 3, 4, 4)).sum().backward()
    return net[1].act, net[1].merge is not None


def dropping():
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(12, 4),
    )
    net.append(nn.BatchNorm1d(4))
    return net


def recalibrate_rank(rank, sizes, fail=False, wrap=False):
    torch.manual_seed(0)
    net, everyone = dropping(), torch.distributed.group.WORLD
    data = torch.randn(12, 2, 4, 4, generator=torch.Generator().manual_seed(7))
    mine = data.split([sum(sizes[0]), sum(sizes[1])])[rank].split(sizes[rank])
    if fail:
        normkit.recalibrate(net, [] if rank else list(mine), broken, process_group=everyone)
    model = nn.parallel.DistributedDataParallel(net) if wrap else net
    report = normkit.recalibrate(model, list(mine), sequential=True, process_group=everyone)
    assert report.model is model
    return [net[i].running_mean.tolist() + net[i].running_var.tolist() for i in (1, 6)]


def broken(model, x):
    raise KeyError("broken")
