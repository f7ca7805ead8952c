"""Two small networks on scikit-learn's digits, trained once a session, and their data."""

import copy
import functools

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

NETWORKS = ("convnet", "mlp")


@functools.cache
def digits():
    """(x, y) of training and of test, x of (N, 1, 8, 8) from 0 to 1."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return (x[train], y[train]), (x[test], y[test])


def network(name, norm=None, dropout=0.0, momentum=0.1, **options):
    """A digits network whose norms are `norm(channels)`, by default torch's batch norm."""
    torch.manual_seed(0)
    dims = nn.BatchNorm2d if name == "convnet" else nn.BatchNorm1d
    make = norm or functools.partial(dims, momentum=momentum, **options)

    def block(linear, channels):
        drop = [nn.Dropout(dropout)] if dropout else []
        return [*drop, linear, make(channels), nn.ReLU()]

    if name == "mlp":
        layers = [nn.Flatten(), *block(nn.Linear(64, 48, bias=False), 48)]
        layers += [*block(nn.Linear(48, 48, bias=False), 48), nn.Linear(48, 10)]
    else:
        layers = block(nn.Conv2d(1, 12, 3, padding=1, bias=False), 12)
        layers += block(nn.Conv2d(12, 24, 3, stride=2, bias=False), 24)
        layers += block(nn.Conv2d(24, 24, 3, bias=False), 24)
        layers += [nn.Flatten(), nn.Linear(24, 10)]
    return nn.Sequential(*layers)


def shuffled(x, y, size=64, seed=0):
    """Batches in a random order."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [(x[i], y[i]) for i in order.split(size) if len(i) == size]


def by_class(x, y, size=24):
    """Batches of one class each, the classes in turn."""
    groups = [x[y == c].split(size) for c in range(10)]
    return [
        (part[i], torch.full((len(part[i]),), c)) for i in range(4) for c, part in enumerate(groups)
    ]


def two_domains(x, y, size=64):
    """Batches that are in turn as they are, and inverted at half the contrast."""
    return [(x, y) if i % 2 else (1.5 - x / 2, y) for i, (x, y) in enumerate(shuffled(x, y, size))]


def loss(output, batch):
    return F.cross_entropy(output, batch[1])


def fit(model, batches, epochs=5, rate=0.1, training=True):
    """SGD with momentum over the batches."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, rate, momentum=0.9)
    model.train(training)
    steps = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss(model(batch[0]), batch).backward()
            optimizer.step()
            schedule.step()
    return model


@functools.cache
def _trained(name, order, size, epochs, rate, options):
    batches = order(*digits()[0], size)
    return fit(network(name, **dict(options)), batches, epochs, rate)


def trained(name, order=shuffled, size=64, epochs=5, rate=0.1, **options):
    """A copy of a trained network: of one training a session for the same arguments."""
    return copy.deepcopy(_trained(name, order, size, epochs, rate, tuple(options.items())))


@torch.no_grad()
def accuracy(model, prepare=lambda x: x):
    """On the test digits, in evaluation; the model's modes end where they were."""
    x, y = digits()[1]
    return float((copy.deepcopy(model).eval()(prepare(x)).argmax(1) == y).float().mean())
