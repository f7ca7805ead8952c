"""The backends and the choice among them.

`protocol.Backend` says what a backend is: functions that return tensors and mutate nothing.
Autograd, running statistics and ranks live above this seam, once; `cpu.move` alone writes, since
running averages moved by torch's operators cost more than a small norm.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from normkit.backend import cpu, reference, triton
from normkit.backend.protocol import Backend
from normkit.formula.spec import Inputs, Spec

BACKENDS: dict[str, Backend] = {"cpu": cpu, "triton": triton, "reference": reference}
"""In the order of preference; reference, the last, takes every call."""


def choose(spec: Spec, inputs: Inputs) -> Backend:
    """The first backend that takes this call."""
    for calls in _watching:
        calls.append((spec, inputs))
    for name, backend in BACKENDS.items():
        missing = backend.available()
        if missing is None:
            if backend.why_not(spec, inputs) is None:
                return backend
        elif inputs.x.device.type == backend.DEVICE:
            _announce(name, missing)
    raise RuntimeError("no backend takes this call; " + "; ".join(reasons(spec, inputs)))


@functools.cache
def _announce(name: str, missing: str) -> None:
    """Said once: torch's operators are right, and slower."""
    warnings.warn(
        f"normkit's {name} backend can't be used: {missing}", RuntimeWarning, stacklevel=2
    )


def reasons(spec: Spec, inputs: Inputs) -> list[str]:
    """For each backend, in order of preference: that it takes this call, or why not."""
    return [
        f"{name}: {backend.available() or backend.why_not(spec, inputs) or 'takes this call'}"
        for name, backend in BACKENDS.items()
    ]


def name_of(backend: Backend) -> str:
    """The name under which a backend is known."""
    return next(name for name, known in BACKENDS.items() if known is backend)


_CORE = cpu.available() is None
"""Asked for once, outside of what compilers trace: Dynamo warns of a function with a cache."""


def kept_by_compilers(spec: Spec, inputs: Inputs) -> bool:
    """Whether a compiled graph holds the C++ core's operator, and not the formula.

    It does where statistics are taken from x, since what inductor makes of these on a CPU is
    several times slower; with given ones the formula is fused with what surrounds it.
    """
    return not spec.given and _CORE and "cpu" in BACKENDS and cpu.why_not(spec, inputs) is None


_watching: list[list[tuple[Spec, Inputs]]] = []


@contextmanager
def watch() -> Iterator[list[tuple[Spec, Inputs]]]:
    """The calls for which a backend is chosen inside."""
    calls: list[tuple[Spec, Inputs]] = []
    _watching.append(calls)
    try:
        yield calls
    finally:
        _watching.remove(calls)
