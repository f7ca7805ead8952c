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
