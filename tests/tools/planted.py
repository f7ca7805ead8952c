"""The catalogue of faults: how each is planted in two digits networks, and which rule names it."""

from dataclasses import dataclass, field

import torch
from digits import by_class, digits, fit, loss, network, shuffled, trained, two_domains
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normkit


@dataclass
class Case:
    """A model with a fault, and what inspect is given."""

    model: nn.Module
    loader: object = None
    more: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.loader is None:
            self.loader = shuffled(*digits()[0])

    def inspect(self, **options):
        return normkit.inspect(self.model, self.loader, **{"loss": loss, **self.more, **options})


@dataclass(frozen=True)
class Fault:
    """One fault: `plant(name of the network)` makes a `Case` that `rule` must name first."""

    name: str
    rule: str
    plant: object


CATALOGUE = []


def fault(name, rule):
    """Enter a fault in the catalogue."""

    def enter(plant):
        CATALOGUE.append(Fault(name, rule, plant))
        return plant

    return enter


def norms(model):
    """The batch norms, in order."""
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


def spoiled(name, spoil, **options):
    model = trained(name, **options)
    with torch.no_grad():
        spoil(model)
    return Case(model)


@fault("NaN in a running variance", "not-finite")
def nan_statistics(name):
    return spoiled(name, lambda m: norms(m)[1].running_var[:2].fill_(float("nan")))


@fault("infinity in a running mean", "not-finite")
def infinite_statistics(name):
    return spoiled(name, lambda m: norms(m)[0].running_mean[3].fill_(float("inf")))


@fault("NaN in a norm's weight", "not-finite")
def nan_affine(name):
    return spoiled(name, lambda m: norms(m)[0].weight[1].fill_(float("nan")))


@fault("NaN in a layer's weight", "not-finite")
def nan_weight(name):
    return spoiled(name, lambda m: m[-1].weight[3, 2].fill_(float("nan")))


@fault("NaN in one batch", "not-finite")
def nan_batch(name):
    loader = shuffled(*digits()[0])
    x, y = loader[2]
    loader[2] = (x.index_fill(0, torch.tensor([5]), float("nan")), y)
    return Case(trained(name), loader)


@fault("statistics reset in all layers", "never-updated")
def reset(name):
    return spoiled(name, lambda m: [norm.reset_running_stats() for norm in norms(m)])


@fault("statistics reset in one layer", "never-updated")
def reset_one(name):
    return spoiled(name, lambda m: norms(m)[1].reset_running_stats())


@fault("statistics overwritten in one layer", "stale")
def overwritten(name):
    def spoil(model):
        norm = norms(model)[0]
        norm.running_mean.copy_(norm.running_mean.flip(0))
        norm.running_var.copy_(norm.running_var.flip(0) * 3)

    return spoiled(name, spoil)


@fault("statistics of an older model", "stale")
def of_older(name):
    old = network(name)
    normkit.recalibrate(old, shuffled(*digits()[0]))
    return spoiled(
        name,
        lambda m: [
            getattr(new, key).copy_(getattr(was, key))
            for new, was in zip(norms(m), norms(old), strict=True)
            for key in ("running_mean", "running_var")
        ],
    )


@fault("averages that lag (momentum 0.001)", "stale")
def lagging(name):
    return Case(trained(name, momentum=0.001))


@fault("frozen with the statistics of other data", "frozen-statistics")
def frozen_wrong(name):
    def spoil(model):
        norm = norms(model)[0]
        norm.running_mean.add_(3 * norm.running_var.sqrt())
        norm.running_var.mul_(9)
        model.train()
        norm.eval()

    return spoiled(name, spoil)


@fault("all frozen, one with the statistics of the constructor", "frozen-statistics")
def frozen_reset(name):
    def spoil(model):
        norms(model)[1].reset_running_stats()
        model.train()
        for norm in norms(model):
            norm.eval()

    return spoiled(name, spoil)


@fault("frozen by freeze() with the statistics of the constructor", "frozen-statistics")
def frozen_by_call(name):
    case = spoiled(name, lambda m: norms(m)[0].reset_running_stats())
    normkit.swap(case.model)
    norms(case.model)[0].freeze()
    return case


@fault("a frozen layer by its class, with the statistics of the constructor", "frozen-statistics")
def frozen_by_class(name):
    case = spoiled(name, lambda m: norms(m)[0].reset_running_stats())
    at = str(list(case.model).index(norms(case.model)[0]))
    normkit.swap(case.model, "frozen", only=at)
    return case


def in_order(batches):
    """A loader that gives these batches, for want of shuffle=True."""
    parts = [torch.cat(part) for part in zip(*batches, strict=True)]
    return DataLoader(TensorDataset(*parts), len(batches[0][0]))


@fault("two domains in alternating batches", "unmixed-batches")
def domains(name):
    return Case(trained(name, order=two_domains), in_order(two_domains(*digits()[0])))


@fault("unshuffled: one class a batch", "unmixed-batches")
def one_class(name):
    model = trained(name, order=by_class, size=24, epochs=3)
    return Case(model, in_order(by_class(*digits()[0])))


@fault("batches of 2", "few-values")
def tiny(name):
    model = trained(name, size=2, epochs=1, rate=0.01)
    return Case(model, shuffled(*digits()[0], 2), {"batches": 32})


@fault("norm weight 0", "vanished-weight")
def zero_weight(name):
    return spoiled(name, lambda m: norms(m)[0].weight.zero_())


@fault("norm weight 1e-4", "vanished-weight")
def small_weight(name):
    return spoiled(name, lambda m: norms(m)[1].weight.fill_(1e-4))


def head_only(name):
    """A trained network, and other data for which only its last layer is to be trained."""
    model = trained(name)
    for part in model[:-1]:
        part.requires_grad_(False)
    x, y = digits()[0]
    return model, shuffled(x * 0.5 + 0.4, y)


@fault("backbone frozen by requires_grad alone, before training", "moving-while-frozen")
def half_frozen(name):
    return Case(*head_only(name))


@fault("backbone frozen by requires_grad alone, after training", "moving-while-frozen")
def half_frozen_trained(name):
    model, loader = head_only(name)
    return Case(fit(model, loader, 2))


@fault("track_running_stats=False", "no-running-statistics")
def untracked(name):
    return Case(trained(name, track_running_stats=False))


@fault("a last batch of one sample", "single-sample")
def last_of_one(name):
    model = trained(name)
    x, y = digits()[0]
    return Case(model, DataLoader(TensorDataset(x[:513], y[:513]), 64))


@fault("dropout before the norm", "variance-shift")
def dropout(name):
    return Case(trained(name, dropout=0.5))


class Drops(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


@fault("dropout as a function before the norm", "variance-shift")
def dropout_function(name):
    model = network(name)
    model.insert(list(model).index(norms(model)[1]) - 1, Drops())
    return Case(fit(model, shuffled(*digits()[0])))


def fit_in_evaluation(model):
    """Train without train(), as after an eval() that nothing undoes."""
    return fit(model, shuffled(*digits()[0]), rate=0.05, training=False)


class SwitchesToTraining(nn.Sequential):
    def forward(self, x):
        self.train()
        return super().forward(x)


@fault("a forward that calls train()", "training-in-evaluation")
def forgotten(name):
    return Case(SwitchesToTraining(*trained(name)), shuffled(*digits()[0], 16))


@fault("inputs from 0 to 255 instead of 0 to 1", "input-scale")
def bytes_(name):
    x, y = digits()[0]
    return Case(trained(name), shuffled(x * 255, y))


@fault("inputs standardized, statistics of 0 to 1", "input-scale")
def standardized(name):
    x, y = digits()[0]
    return Case(trained(name), shuffled((x - x.mean()) / x.std(), y))


@fault("inputs inverted", "input-scale")
def inverted(name):
    x, y = digits()[0]
    return Case(trained(name), shuffled(1 - x, y))


@fault("trained in evaluation: eval() called before training", "never-updated")
def always_evaluated(name):
    return Case(fit_in_evaluation(network(name)))


@fault("validation inputs from 0 to 255", "validation-shift")
def validation_bytes(name):
    x, y = digits()[1]
    return Case(trained(name), None, {"validation": shuffled(x * 255, y)})


@fault("momentum in the other library's convention (0.99)", "short-memory")
def long_momentum(name):
    model = trained(name, momentum=0.99, size=8, epochs=1, rate=0.02)
    return Case(model, shuffled(*digits()[0], 8), {"batches": 16})


@fault("a norm over one value", "single-values")
def one_value(name):
    model = network(name)
    model.insert(len(model) - 1, nn.GroupNorm(model[-1].in_features, model[-1].in_features))
    return Case(fit(model, shuffled(*digits()[0]), 2))


@fault("a norm behind a saturated tanh", "behind-saturating")
def behind_tanh(name):
    model = trained(name)
    at = list(model).index(norms(model)[1])
    model[at - 1].weight.data.mul_(30)
    model.insert(at, nn.Tanh())
    return Case(fit(model, shuffled(*digits()[0]), 2))


@fault("a sigmoid behind a norm that saturates it", "saturated")
def saturating(name):
    model = trained(name)
    at = list(model).index(norms(model)[1])
    model[at + 1] = nn.Sigmoid()
    norms(model)[1].weight.data.fill_(30)
    return Case(fit(model, shuffled(*digits()[0]), 2))


def enlarged(name, largest, dtype=torch.float32):
    """A network whose first norm gets inputs up to a number, and bears them."""
    model, inputs = trained(name).to(dtype), digits()[0][0].to(dtype)
    norm = norms(model)[0].float()
    before = model[: list(model).index(norm)]
    with torch.no_grad():
        factor = largest / float(before(inputs).abs().max())
        before[-1].weight.mul_(factor)
        norm.running_mean.mul_(factor)
        norm.running_var.mul_(factor**2)
    for each in norms(model):
        each.float()
    return Case(model, [(x.to(dtype), y) for x, y in shuffled(*digits()[0])])


@fault("half precision near overflow", "near-overflow")
def half(name):
    return enlarged(name, 3e4, torch.float16)


@fault("float32 whose squares nearly overflow", "near-overflow")
def hot(name):
    return enlarged(name, 8e18)


@fault("weight decay on the norms", "weight-decay")
def decayed(name):
    model = trained(name)
    return Case(model, None, {"optimizer": torch.optim.AdamW(model.parameters(), weight_decay=0.1)})


@fault("a bias before the norm", "redundant-bias")
def biased(name):
    model = trained(name)
    for norm in norms(model):
        before = model[list(model).index(norm) - 1]
        before.bias = nn.Parameter(torch.ones(norm.num_features))
        norm.running_mean.add_(1)
    return Case(model)
