"""What is raised when the input, not the code, is at fault."""

import difflib
from collections.abc import Iterable


class InputError(ValueError, RuntimeError):
    """An input that doesn't fit its layer: a ValueError, and a RuntimeError as torch raises."""


class InputTypeError(TypeError, RuntimeError):
    """An input of a type that doesn't fit: a TypeError, and a RuntimeError as torch raises."""


class LabError(Exception):
    """The user's input can't be used; the text names the value and the remedy."""


class UserCodeError(LabError):
    """The user's own module or function raised; the text is their traceback, without our frames."""


def unknown(kind: str, value: str, known: Iterable[str], hint: str = "") -> LabError:
    """Return the error for a name that is none of `known`, with the nearest one suggested."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    tail = f" {hint}" if hint else ""
    return LabError(f"unknown {kind} {value!r}.{guess} Known: {', '.join(names)}.{tail}")
