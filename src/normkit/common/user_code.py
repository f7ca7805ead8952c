"""Load what the user names as `package.module:function`, and show their errors as theirs."""

import hashlib
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from normkit.common.errors import LabError, UserCodeError, unknown

_PACKAGE = Path(__file__).resolve().parent.parent
_OURS = tuple(str(_PACKAGE / part) for part in ("cli", "common", "lab"))


def is_reference(name: str) -> bool:
    """Say whether `name` has the form `package.module:function`."""
    module, colon, function = name.partition(":")
    parts = [*module.split("."), *function.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def load(reference: str, kind: str) -> Callable[..., Any]:
    """Return the function that `package.module:function` names, also from the current folder.

    Raises LabError where there is no such module or function, UserCodeError if importing raises.
    """
    if not is_reference(reference):
        raise LabError(f"{kind} {reference!r} is not of the form package.module:function")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    name, _, attribute = reference.partition(":")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            raise LabError(
                f"{kind} {reference!r}: no module {missing!r} in {os.getcwd()} or on PYTHONPATH; "
                "run from the folder that holds it, or add that folder to PYTHONPATH"
            ) from None
        raise UserCodeError(their_traceback(error, f"importing {kind} {reference!r}")) from None
    except Exception as error:
        raise UserCodeError(their_traceback(error, f"importing {kind} {reference!r}")) from None
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_")]
            raise unknown(f"{kind} function", part, public, f"They are what {name!r} defines.")
        found = getattr(found, part)
    if not callable(found):
        raise LabError(f"{kind} {reference!r} is a {type(found).__name__}, not a function to call")
    return found


def call(function: Callable[..., Any], doing: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call the user's function; what it raises becomes a UserCodeError with their traceback."""
    try:
        return function(*args, **kwargs)
    except LabError:
        raise
    except Exception as error:
        raise UserCodeError(their_traceback(error, doing)) from None


def their_traceback(error: BaseException, doing: str) -> str:
    """Return the traceback of `error` as text, without the frames of the lab and the import."""
    summary = traceback.TracebackException.from_exception(error)
    part: traceback.TracebackException | None = summary
    while part is not None:
        theirs = [
            frame
            for frame in part.stack
            if not frame.filename.startswith((*_OURS, "<frozen importlib"))
            and not frame.filename.endswith("importlib/__init__.py")
        ]
        part.stack = traceback.StackSummary.from_list(theirs)
        part = part.__cause__ or part.__context__
    return f"{doing} failed:\n" + "".join(summary.format()).rstrip()


def sources(references: Iterable[str]) -> list[str]:
    """Return the files and folders of the modules that the references name, and of those beside.

    They must have been loaded. A module beside is one that was imported from the same folder;
    installed packages are left out.
    """
    installed = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib", "stdlib")}
    tops = [name for name in sys.modules if "." not in name and name not in ("__main__", "normkit")]
    places = {name: place for name in tops if (place := _place(sys.modules[name])) is not None}
    named = {name.partition(":")[0].partition(".")[0] for name in references}
    roots = {places[name].parent for name in named & places.keys()}
    return sorted({str(p) for p in places.values() if p.parent in roots - installed})


def _place(module: Any) -> Path | None:
    """Return a package's folder or a module's file, None for what has neither."""
    package = list(getattr(module, "__path__", ()))
    place = package[0] if package else getattr(module, "__file__", None)
    return Path(place).resolve() if place else None


def fingerprint(reference: str, kind: str) -> str:
    """Return the SHA-256 of the file that defines the function, so that an edit is noticed."""
    source = inspect.getsourcefile(inspect.unwrap(load(reference, kind)))
    return hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else "unknown"
