"""One call of the formula: what is fixed (`Spec`) and what flows through (`Inputs`)."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from normkit.formula.pool import Pool

ACTS = ("relu", "leaky_relu", "silu", "gelu")


@dataclass(frozen=True, slots=True)
class Spec:
    """y = act((x - mean) * rstd * weight + bias + residual), rstd = (variance + eps)^(-1/2).

    `center` is False where the mean is not subtracted (RMS); the variance is the mean square then.
    `given` is True where mean and variance are handed in as constants instead of taken from x.
    `conditional` is True where weight and bias have x's rank and broadcast to it, as those of
    AdaIN and FiLM; otherwise they have one value a channel, or one a normalized element.
    """

    pool: Pool
    eps: float
    center: bool = True
    act: str | None = None
    given: bool = False
    conditional: bool = False

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_act(self.act)


class Inputs(NamedTuple):
    """What a backend is given.

    `add`, of row norms, is added to x before the norm. mean and var, one value a pool, are handed
    in where `Spec.given` says so. A backward gets the mean and rstd that the forward returned, the
    sum of x and `add` in place of x, and, of relu and leaky_relu behind a residual, the output in
    place of the residual: its sign is all that their derivative needs.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None
    add: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    rstd: Tensor | None = None
    output: Tensor | None = None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the statistics of x: float64 for float64, float32 for all others.

    Complex weights, which only reparametrizations take, are complex of the same width.
    """
    if dtype.is_complex:
        return torch.complex128 if dtype == torch.complex128 else torch.complex64
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_wrapper(x: Tensor) -> bool:
    """Whether x holds tensors of its own and has a rule for each operator, as a DTensor."""
    return type(x) is not Tensor and is_traceable_wrapper_subclass(x)


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether a device has float64, which Apple's (mps) hasn't."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def float64(x: Tensor) -> Tensor:
    """x in float64, on the CPU where its own device has none."""
    return (x if has_float64(x.device) else x.cpu()).double()


def check_eps(eps: float) -> None:
    """eps is finite and not negative, or ValueError."""
    if eps is None or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number >= 0, got {eps!r}; torch's default is 1e-5")


def check_momentum(momentum: float | None) -> None:
    """momentum is in [0, 1] or None, or ValueError."""
    if isinstance(momentum, str) or (momentum is not None and not 0 <= momentum <= 1):
        raise ValueError(
            f"momentum must be in [0, 1], or None for the average of all batches, got {momentum!r};"
            " it weighs the new batch, as in torch"
        )


def check_act(act: str | None) -> None:
    """act is None or known, or ValueError with the nearest known name."""
    if act is not None and act not in ACTS:
        raise ValueError(unknown("act", act, (None, *ACTS)))


def unknown(kind: str, name: object, known: Iterable[object]) -> str:
    """The text of an error about a name that is none of the known ones; it names the nearest."""
    known = list(dict.fromkeys(known))
    names = [text for text in known if isinstance(text, str)]
    near = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.4)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r};{hint} known: {', '.join(map(repr, known))}"
