"""The tools as commands on a function of the user's."""

from __future__ import annotations

import argparse
import inspect as introspection
import io
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch

import normkit
from normkit.common.errors import LabError, unknown
from normkit.common.files import check_writable, write
from normkit.common.user_code import call, load
from normkit.tools.model import ToolError

_NOT_ARGUMENTS = ("command", "setup", "json", "out", "html")


def main(options: argparse.Namespace) -> bool:
    """Run a tool, write and print what it says; return whether inspect found anything.

    What a tool itself raises for an input is a LabError; what the user's code raises is theirs to
    see in full.
    """
    linter = options.command == "inspect"
    page = options.html if linter else None
    targets = [target for target in (options.out, page) if target is not None]
    for target in targets:
        check_writable(target)
    if len({os.path.realpath(target) for target in targets}) < len(targets):
        raise LabError(f"--out and --html are both {options.out}; give two files")
    try:
        report = _run(options)
    except ToolError as error:
        raise LabError(str(error)) from None
    if options.out:
        state = io.BytesIO()
        torch.save(report.model.state_dict(), state)
        write(options.out, state.getbuffer())
    if page:
        write(page, report.to_html())
    print(json.dumps(report.to_dict(), ensure_ascii=False) if options.json else report)
    return linter and bool(report.rows)


def _run(options: argparse.Namespace) -> Any:
    tool = getattr(normkit, options.command)
    made = call(load(options.setup, "setup"), f"calling {options.setup!r}")
    arguments: dict[str, Any] = dict(made) if isinstance(made, Mapping) else {"model": made}
    if "model" in arguments and not isinstance(arguments["model"], torch.nn.Module):
        raise LabError(
            f"{options.setup} returned a {type(arguments['model']).__name__}, neither a "
            "torch.nn.Module nor a dictionary with one under 'model'"
        )
    known = introspection.signature(tool).parameters
    for name in arguments:
        if name not in known:
            raise unknown(f"argument of normkit.{options.command}", str(name), known)
    arguments |= {
        name: value
        for name, value in vars(options).items()
        if name not in _NOT_ARGUMENTS and value is not None
    }
    missing = [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty and name not in arguments
    ]
    if missing:
        raise LabError(
            f"normkit {options.command} needs {' and '.join(missing)} too; let {options.setup} "
            f"return a dictionary: {{'model': ..., {', '.join(f'{m!r}: ...' for m in missing)}}}"
        )
    if "progress" in known:
        arguments.setdefault("progress", sys.stderr.isatty() and not options.json)
    return tool(**arguments)
