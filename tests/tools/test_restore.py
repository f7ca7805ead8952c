"""What the tools put back: of models that refuse, after steps that fail, under real interrupts."""

import contextlib
import itertools
import random
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from small import data, healthy, network
from states import state_of
from torch import nn

import normkit
from normkit.tools.restore import Restoring, preserved, undone_on_failure


@pytest.fixture(autouse=True)
def interruptible():
    """A process that was started in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class FrozenDict(dict):
    """diffusers': refuses every change."""

    def _refuse(self, *_, **__):
        raise TypeError("frozen")

    __setitem__ = __delitem__ = clear = update = pop = popitem = setdefault = _refuse


SHARED = {"of": "all models"}


class Stubborn(nn.Module):
    """Attributes that refuse, are shared, are properties, are slots; its own access to them."""

    __slots__ = ("count",)

    def __init__(self):
        super().__init__()
        self.net = network()
        self._internal_dict = FrozenDict(sample_size=8, layers=2)
        self.shared, self.cache, self.last = SHARED, {}, None
        self.count = 0
        vars(self)["sealed"] = True

    @property
    def config(self):
        return self._internal_dict

    @property
    def dtype(self):
        raise RuntimeError("ask me not")

    def __getattr__(self, name):
        if name in vars(self).get("_internal_dict", ()):
            raise DeprecationWarning(name)
        return super().__getattr__(name)

    def __setattr__(self, name, value):
        if vars(self).get("sealed") and name not in ("count", "last", "training"):
            raise AttributeError(f"{name} is sealed")
        super().__setattr__(name, value)

    def train(self, mode=True):
        raise AssertionError("never called")

    def forward(self, x):
        self.count += 1
        self.cache[self.count] = x.shape
        self.last = x
        SHARED["seen"] = self.count
        return self.net(x)


TOOLS = {
    "inspect": lambda net: normkit.inspect(net, data(2), lambda y, _: y.square().mean()),
    "recalibrate": lambda net: normkit.recalibrate(net, data(2)),
    "sequential": lambda net: normkit.recalibrate(net, data(2), sequential=True),
    "swap": lambda net: normkit.swap(net, fuse=True, example=data(1)[0]),
    "fold": lambda net: normkit.fold(net, data(1)[0]),
    "fix": lambda net: normkit.inspect(net, data(2), fix=True),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_models_that_refuse_are_taken_and_kept(tool):
    net = Stubborn()
    net(data(1)[0]).sum().backward()
    if tool == "fold":
        for module in net.modules():
            module.training = False
    gradients = {name: p.grad for name, p in net.named_parameters()}
    modes, last, was = [m.training for m in net.modules()], net.last, type(net.net[1])
    TOOLS[tool](net)
    assert net.config == {"sample_size": 8, "layers": 2}
    assert type(net._internal_dict) is FrozenDict
    assert net.shared is SHARED
    assert net.last is last
    assert net.count > 1
    if tool in ("inspect", "recalibrate", "sequential"):
        assert type(net.net[1]) is was
        assert [m.training for m in net.modules()] == modes
        assert all(p.grad is gradients[name] for name, p in net.named_parameters())


def test_every_step_runs_whatever_another_does():
    net = healthy()
    net(data(1)[0]).sum().backward()
    before = state_of(net)
    broken = nn.Parameter(torch.ones(3))
    net[0].register_parameter("broken", broken)

    def work():
        with preserved(net):
            broken.data = torch.ones(2)
            net[8].weight.data.zero_()
            net.eval()
            net.register_forward_hook(lambda *_: None)

    with pytest.raises(RuntimeError, match="not all could be put back"):
        work()
    del net[0].broken
    assert state_of(net) == before


def test_an_error_inside_stays_the_error_and_tells_what_could_not_be_put_back():
    net = nn.Linear(2, 2)

    def work():
        with preserved(net):
            net.bias.data = torch.ones(3)
            raise KeyError("theirs")

    with pytest.raises(KeyError) as caught:
        work()
    assert "not all could be put back" in caught.value.__notes__[0]


def test_order_of_submodules_and_replaced_or_new_attributes_come_back():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net.note, first = "as it was", net[0]
    keys = sorted(vars(net))
    with preserved(net):
        net._modules["0"] = net._modules.pop("0")
        first.register_buffer("extra", torch.ones(1), persistent=False)
        net.note, net.more = "changed", torch.ones(3)
        del first.bias
    assert list(net._modules) == ["0", "1"]
    assert net[0] is first
    assert (net.note, sorted(vars(net))) == ("as it was", keys)
    assert list(first.state_dict()) == ["weight", "bias"]
    assert not first._non_persistent_buffers_set


def test_buffers_of_any_layout_are_put_back():
    net = nn.BatchNorm1d(3)
    net.register_buffer("adjacency", torch.eye(3).to_sparse())
    net.register_buffer("positions", torch.arange(1).expand(4))
    normkit.recalibrate(net, [torch.randn(4, 3)])
    with preserved(net):
        net.adjacency.mul_(2)
    torch.testing.assert_close(net.adjacency.to_dense(), torch.eye(3))
    assert net.positions.stride() == (0,)


class Drawing(nn.Module):
    """Draws by generators of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.torch = torch.Generator().manual_seed(1)
        self.more = {"python": random.Random(1), "numpy": np.random.default_rng(1)}
        self.old = [np.random.RandomState(1)]

    def draws(self):
        own = float(torch.rand((), generator=self.torch)), self.more["python"].random()
        return [*own, self.more["numpy"].random(), self.old[0].rand()]

    def forward(self, x):
        return self.norm(x) + sum(self.draws())


@pytest.mark.parametrize("tool", ["inspect", "recalibrate", "swap"])
def test_generators_of_modules_and_data_sets_are_put_back(tool):
    class Data(torch.utils.data.Dataset):
        def __init__(self):
            self.generator = torch.Generator().manual_seed(2)

        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.rand(3, generator=self.generator)

    net, loader = Drawing(), torch.utils.data.DataLoader(Data(), 4)
    states = [net.torch.get_state(), loader.dataset.generator.get_state()]
    {
        "inspect": lambda: normkit.inspect(net, loader),
        "recalibrate": lambda: normkit.recalibrate(net, loader),
        "swap": lambda: normkit.swap(net, example=torch.randn(4, 3)),
    }[tool]()
    assert torch.equal(net.torch.get_state(), states[0])
    assert torch.equal(loader.dataset.generator.get_state(), states[1])
    assert net.draws() == Drawing().draws()


@pytest.mark.parametrize("wrapped", [False, True], ids=["the module itself", "in a function"])
def test_a_criterions_gradients_and_statistics_are_not_touched(wrapped):
    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.norm = nn.Parameter(torch.ones(())), nn.BatchNorm1d(4)

        def forward(self, output, batch):
            target = self.norm(batch.flatten(1)[:, :4])
            return (output * self.scale - target).square().mean()

    net, criterion = healthy(), Criterion()
    if wrapped:
        criterion.norm = nn.Identity()
    criterion(net(data(1)[0]), data(1)[0]).backward()
    before = state_of(criterion)
    report = normkit.inspect(net, data(2), (lambda *a: criterion(*a)) if wrapped else criterion)
    assert len(report.layers[0].gradients) == 2
    assert state_of(criterion) == before


def test_a_failure_after_the_swap_of_fix_undoes_it():
    net, reads = healthy(), []
    with torch.no_grad():
        net[1].running_mean.add_(2 * net[1].running_var.sqrt())
        net[0].weight.mul_(1e19)
    before = state_of(net)

    class Data:
        def __iter__(self):
            reads.append(1)
            if len(reads) == 2:
                assert type(net[1]) is normkit.BatchNorm2d
                raise OSError("the disk is gone")
            return iter(data())

    with pytest.raises(OSError, match="the disk is gone"):
        normkit.inspect(net, Data(), fix=True)
    assert state_of(net) == before
    assert type(net[1]) is nn.BatchNorm2d


def test_a_failing_write_of_recalibrate_undoes_the_others():
    net = network()
    with torch.inference_mode():
        sealed = torch.ones(8)
    net[5].running_var = sealed
    before = state_of(net)
    with pytest.raises(RuntimeError, match="inference tensor"):
        normkit.recalibrate(net, data(2), sequential=True)  # which moves no average on the way
    assert state_of(net) == before


def test_the_optimizer_is_whole_after_a_failure():
    class Counts(nn.Sequential):
        def forward(self, x):
            norms = [m for m in self if isinstance(m, nn.BatchNorm2d)]
            return [super().forward(x)] * (1 + len(norms))

    net = Counts(*network())
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(data(1)[0])[0].sum().backward()
    optimizer.step()
    before = state_of(net, optimizer)
    with pytest.raises(ValueError, match="shorter"):  # fewer outputs to compare than before
        normkit.swap(net, "none", optimizer=optimizer, example=data(1)[0])
    assert state_of(net, optimizer) == before


def test_gradients_are_on_again_after_an_interrupt_inside_no_grad():
    for restoring in (preserved, undone_on_failure):
        with contextlib.suppress(KeyError), restoring(nn.Linear(2, 2)):
            torch.set_grad_enabled(False)
            raise KeyError
        assert torch.is_grad_enabled()


def test_an_endless_loader_is_read_as_far_as_told():
    def endless():
        while True:
            yield torch.randn(8, 3, 8, 8)

    class Data:
        def __iter__(self):
            return endless()

    for sequential in (False, True):
        report = normkit.recalibrate(network(), Data(), batches=3, sequential=sequential)
        assert report.facts["batches"] == 3
    with pytest.raises(ValueError, match="batches must be at least 1"):
        normkit.recalibrate(network(), Data(), batches=0)


def interrupted(call, when):
    """Call, with a real Ctrl-C wherever `when` says so at a line of Python; True if it got out."""

    def trace(frame, event, _):
        if event == "line" and when(frame):
            signal.raise_signal(signal.SIGINT)
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except BaseException as error:
        # torch's stack of modes may raise its own error after an interrupt inside it.
        cause = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__
        if cause is None:
            raise
        return True
    finally:
        sys.settrace(previous)
    return False


def prepared(tool):
    net = network().eval() if tool == "fold" else network()
    net(data(1)[0]).sum().backward()
    return net


def shapes_of(net):
    """The tensors, modes and gradients, whatever their names in memory are."""
    tensors, modules, *_ = state_of(net)
    return [v[1:] for v in tensors.values()], [(k, *m[:2]) for k, m in modules.items()]


# An interrupt may hit a weak reference's callback of torch, where Python can only print it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_ctrl_c_at_any_line_leaves_all_or_nothing(tool):
    TOOLS[tool](prepared(tool))  # what is cached or imported takes lines at the first time only
    done, lines = prepared(tool), []
    assert not interrupted(lambda: TOOLS[tool](done), lambda _: lines.append(1))
    after = shapes_of(done)
    rng, got_out = random.Random(0), 0
    for at in sorted(rng.sample(range(len(lines)), 8)):
        net, count = prepared(tool), itertools.count()
        before = state_of(net)
        got_out += interrupted(
            lambda net=net: TOOLS[tool](net), lambda _, c=count, at=at: next(c) == at
        )
        assert state_of(net)[:2] == before[:2] or shapes_of(net) == after
        torch.set_grad_enabled(True)  # torch's own no_grad may be cut off before it is left
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert got_out >= 7


# An interrupt may hit a weak reference's callback of torch, where Python can only print it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("tool", TOOLS)
def test_a_second_ctrl_c_while_things_are_put_back_waits(tool, monkeypatch):
    """The first comes while the model runs; the second at lines from there to the end."""
    forward, rng = nn.Linear.forward, random.Random(1)

    def run(at):
        net, calls, lines = prepared(tool), [], []
        before = state_of(net)

        def first(layer, x):
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return forward(layer, x)

        def when(_):
            if len(calls) == 2:
                lines.append(1)
            return len(lines) == at + 1

        monkeypatch.setattr(nn.Linear, "forward", first)
        assert interrupted(lambda: TOOLS[tool](net), when)
        monkeypatch.setattr(nn.Linear, "forward", forward)
        assert state_of(net) == before
        assert torch.is_grad_enabled()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        return len(lines)

    run(10**9)
    total = run(10**9)
    for at in rng.sample(range(total), min(total, 15)):
        run(at)


def test_signals_wait_for_all_steps_and_then_come():
    seen, stops = [], signal.SIGUSR1
    previous = signal.signal(stops, lambda *_: seen.append("signal"))
    try:
        steps = [lambda: signal.raise_signal(stops), lambda: seen.append("last step")]
        with Restoring(steps, always=True):
            signal.raise_signal(stops)
            assert seen == ["signal"]
        assert seen == ["signal", "last step", "signal"]
        assert signal.getsignal(stops).__name__ == "<lambda>"
    finally:
        signal.signal(stops, previous)


def test_inside_another_the_outer_one_still_puts_back():
    net = nn.Linear(2, 2)
    before = state_of(net)

    def work():
        with preserved(net):
            net.note = 1
            with preserved(net):
                net.weight.data.zero_()
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert state_of(net) == before


def test_other_threads_restore_without_signals():
    net, failures = nn.Linear(2, 2), []
    before = state_of(net)

    def work():
        with contextlib.suppress(KeyError), preserved(net):
            net.weight.data.zero_()
            failures.append(signal.getsignal(signal.SIGINT) is not signal.default_int_handler)
            raise KeyError

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == [False]
    assert state_of(net) == before
