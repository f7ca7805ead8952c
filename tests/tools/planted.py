"""Faults to plant in the small network, and what inspect must find of each."""

from torch import nn


def with_bias(net):
    net[4] = nn.Conv2d(8, 8, 3)


def shifted(net):
    net[1].running_mean.add_(2 * net[1].running_var.sqrt())


def reset(net):
    net[5].reset_running_stats()


def zero_channel(net):
    net[0].weight.data[3] = 0


def dead_channel(net):
    net[5].bias.data[2] = -50.0


def steep(net):
    net[6] = nn.Sigmoid()
    net[5].weight.data.fill_(30.0)


def behind_tanh(net):
    net[4] = nn.Sequential(net[4], nn.Tanh())


def hot(net):
    net[0].weight.data.mul_(1e19)


def single(net):
    net[7] = nn.Sequential(nn.Flatten(), nn.GroupNorm(128, 128))


PLANTED = [
    (with_bias, "redundant-bias", "4"),
    (shifted, "train-eval-gap", "1"),
    (shifted, "stale", "1"),
    (reset, "never-updated", "5"),
    (zero_channel, "constant-channels", "1"),
    (dead_channel, "constant-channels", "5"),
    (steep, "saturated", "5"),
    (behind_tanh, "behind-saturating", "5"),
    (hot, "near-overflow", "1"),
    (single, "single-values", "7.1"),
]
