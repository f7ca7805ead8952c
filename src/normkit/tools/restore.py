"""Put things back in full: whatever one step of it does, whatever signal comes meanwhile."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

_Step = Callable[[], Any]

_OF_TORCH = [k for k, value in vars(nn.Module()).items() if isinstance(value, dict | set)]
"""The containers that torch gives every module: parameters, buffers, submodules, hooks."""

_PARTS = ("sampler", "batch_sampler", "dataset")
"""What a loader draws by."""


class Restoring:
    """Runs the steps that put things back at the end of `with`, or only after an exception there.

    Every step runs, whatever another raises. Signals that have a handler in Python, as Ctrl-C has,
    wait while steps run; one that came after the last line inside `with` counts as an exception.
    """

    def __init__(self, steps: list[_Step], always: bool, start: _Step = lambda: None) -> None:
        self._steps, self._always, self._start = steps, always, start
        self._handlers: dict[int, Callable[..., Any]] = {}
        self._waiting: list[int] = []

    def __enter__(self) -> None:
        try:
            self._take_signals()
            self._start()
            while self._waiting:
                number = self._waiting.pop(0)
                self._handlers[number](number, None)
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        failed: list[BaseException] = []
        if self._always or kind is not None or self._waiting:
            for step in self._steps:
                try:
                    step()
                except BaseException as failure:
                    failed.append(failure)
        said = "; ".join(f"{type(f).__name__}: {f}" for f in failed)
        if failed and error is not None:
            error.add_note(f"not all could be put back: {said}")
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        for number in self._waiting:
            signal.raise_signal(number)
        if failed and error is None:
            raise RuntimeError(f"not all could be put back: {said}") from failed[0]

    def _take_signals(self) -> None:
        """Python runs handlers in the main thread only, so that other threads need none."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signal.Signals:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._handle)

    def _handle(self, number: int, interrupted: FrameType | None) -> None:
        """Let a signal wait that came while this object is at work, from the first line of it."""
        own = (Restoring.__enter__.__code__, Restoring.__exit__.__code__)
        frame = interrupted
        while frame is not None:
            if frame.f_code in own and frame.f_locals["self"] is self:
                self._waiting.append(number)
                return
            frame = frame.f_back
        self._handlers[number](number, interrupted)


def preserved(model: nn.Module, *others: Any) -> Restoring:
    """Put everything back at the end, also after an exception.

    That is: which parameters, buffers, submodules and hooks each module has, what its attributes
    refer to, train or eval; the values of parameters and buffers, gradients, requires_grad; the
    random state of Python, NumPy, torch, and of generators that modules, loaders, samplers and data
    sets hold; whether gradients are on, which an interrupt inside `no_grad` may leave off. What a
    model keeps inside objects of its own is its own.

    Args:
        model: any module.
        *others: loaders, and modules that run with the model, such as a criterion.
    """
    modules = _modules(model, *others)
    tensors = _tensors(modules)

    def without_gradients() -> None:
        for tensor in tensors:
            if tensor.is_leaf:
                tensor.grad = None

    steps = [
        _grad_mode(),
        *map(_attributes, modules),
        *map(_value, tensors),
        *(_gradient(tensor) for tensor in tensors if tensor.is_leaf),
        *_random_state((*modules, *others)),
    ]
    return Restoring(steps, always=True, start=without_gradients)


def undone_on_failure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    tensors: Iterable[Tensor] = (),
) -> Restoring:
    """After an exception, put back attributes, the optimizer's parameters, the tensors' values."""
    steps = [_grad_mode(), *map(_attributes, _modules(model)), *map(_value, tensors)]
    if optimizer is not None:
        steps.append(_members(optimizer))
    return Restoring(steps, always=False)


def _modules(*given: Any) -> list[nn.Module]:
    found = (m for each in given if isinstance(each, nn.Module) for m in each.modules())
    return list(dict.fromkeys(found))


def _tensors(modules: list[nn.Module]) -> list[Tensor]:
    """Each parameter and buffer once, from torch's own containers: models override methods."""
    held = (t for m in modules for t in (*m._parameters.values(), *m._buffers.values()))
    return list({id(t): t for t in held if t is not None}.values())


def _grad_mode() -> _Step:
    return partial(torch.set_grad_enabled, torch.is_grad_enabled())


def _attributes(module: nn.Module) -> _Step:
    """What `vars` holds, past `__setattr__`; of containers the contents of torch's own only."""
    now, held = vars(module), dict(vars(module))
    contents = {key: held[key].copy() for key in _OF_TORCH if held.get(key)}

    def put_back() -> None:
        for key in _OF_TORCH:
            target, content = held.get(key), contents.get(key, ())
            if isinstance(target, dict):
                _refill(target, dict(content))
            elif isinstance(target, set):
                target.intersection_update(content)
                target.update(content)
        _refill(now, held)

    return put_back


def _refill(target: dict[Any, Any], content: dict[Any, Any]) -> None:
    """Item by item, so that there is no moment at which all are gone."""
    for key in target.keys() - content.keys():
        del target[key]
    for key, value in content.items():
        if target.get(key, target) is not value:
            target[key] = value
    if list(map(id, target)) != list(map(id, content)):
        for key in content:
            target[key] = target.pop(key)


def _value(tensor: Tensor) -> _Step:
    kept = tensor.detach().clone()
    comparable = tensor.layout == torch.strided and not tensor.is_meta
    version = None if comparable else tensor._version

    def put_back() -> None:
        same = torch.equal(tensor, kept) if comparable else tensor._version == version
        if not same:
            with torch.no_grad():
                tensor.copy_(kept)

    return put_back


def _gradient(tensor: Tensor) -> _Step:
    gradient, needed = tensor.grad, tensor.requires_grad

    def put_back() -> None:
        tensor.requires_grad_(needed)
        tensor.grad = gradient

    return put_back


def _members(optimizer: torch.optim.Optimizer) -> _Step:
    groups = [(group, list(group["params"])) for group in optimizer.param_groups]
    state = dict(optimizer.state)

    def put_back() -> None:
        for group, parameters in groups:
            group["params"] = parameters
        _refill(optimizer.state, state)

    return put_back


def _random_state(owners: tuple[Any, ...]) -> Iterator[_Step]:
    def kept(get: Callable[[], Any], put: Callable[[Any], Any]) -> _Step:
        state = get()
        return lambda: put(state)

    numpy = sys.modules.get("numpy")
    yield kept(random.getstate, random.setstate)
    yield kept(torch.get_rng_state, torch.set_rng_state)
    if torch.cuda.is_initialized():
        yield kept(torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)
    if numpy is not None:
        yield kept(numpy.random.get_state, numpy.random.set_state)
    for held in _held_by(owners):
        if isinstance(held, torch.Generator):
            yield kept(held.get_state, held.set_state)
        elif isinstance(held, random.Random) and not isinstance(held, random.SystemRandom):
            yield kept(held.getstate, held.setstate)
        elif numpy is not None and isinstance(held, numpy.random.RandomState):
            yield kept(held.get_state, held.set_state)
        elif numpy is not None and isinstance(held, numpy.random.Generator):
            bits = held.bit_generator
            yield kept(partial(getattr, bits, "state"), partial(setattr, bits, "state"))


def _held_by(owners: tuple[Any, ...]) -> Iterator[Any]:
    """What the owners and the parts of a loader hold, themselves or in a plain container."""
    for owner in owners:
        held = getattr(owner, "__dict__", {})
        for each in (held, *(getattr(held.get(part), "__dict__", {}) for part in _PARTS)):
            for key, value in each.items():
                if key in _OF_TORCH:
                    continue
                if type(value) is dict:
                    yield from value.values()
                elif type(value) in (list, tuple):
                    yield from value
                else:
                    yield value
