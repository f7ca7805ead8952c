"""The tools as commands on a function of the user's."""

from __future__ import annotations

import argparse
import inspect as introspection
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

import normkit
from normkit.common.errors import LabError, unknown
from normkit.common.user_code import call, load
from normkit.tools.model import ToolError

_NOT_ARGUMENTS = ("command", "setup", "json", "out", "html")


def main(options: argparse.Namespace) -> int:
    """Run a tool; return 0, or 1 for unusable input; inspect returns 1 for findings and 2 for that.

    What a tool itself raises for an input is said in a line; what the user's code raises is theirs
    to see in full.
    """
    linter = options.command == "inspect"
    try:
        report = _run(options)
    except (LabError, ToolError) as error:
        print(f"normkit: error: {error}", file=sys.stderr)
        return 2 if linter else 1
    print(json.dumps(report.to_dict(), ensure_ascii=False) if options.json else report)
    if options.out:
        torch.save(report.model.state_dict(), options.out)
    if linter and options.html:
        options.html.write_text(report.to_html(), "utf-8")
    return int(linter and bool(report.rows))


def _run(options: argparse.Namespace) -> Any:
    tool = getattr(normkit, options.command)
    for target in (options.out, getattr(options, "html", None)):
        if target is not None and not target.parent.is_dir():
            raise LabError(f"can't write {target}: there is no folder {target.parent}")
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
