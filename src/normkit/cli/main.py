"""The command `normkit`: tools on models, studies on data, what this installation can do."""

import argparse
import dataclasses
import difflib
import importlib.util
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import normkit
from normkit.common.errors import LabError

_LAB_NEEDS = {
    "numpy": "numpy",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "rich": "rich",
    "plotly": "plotly",
}


DONE, FINDINGS, FAILED, INTERRUPTED = 0, 1, 2, 130
"""The exit statuses of every command; findings are those of inspect."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; wrong options exit with 2 by themselves."""
    options = _parser().parse_args(arguments)
    try:
        status = _run(options)
        sys.stdout.flush()
        return status
    except LabError as error:
        return _failed(f"error: {error}")
    except KeyboardInterrupt:
        kept = "; what was trained is kept, the same command goes on from there"
        print(f"\nnormkit: stopped{kept * (options.command == 'study')}", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as error:
        return _failed(f"error: the code that was run ended the program with {error.code!r}")
    except Exception as error:
        if isinstance(error, OSError) and not _can_print():
            return _failed(f"error: the output can't be written: {error.strerror}")
        traceback.print_exc()
        return FAILED


def _failed(said: str) -> int:
    print(f"normkit: {said}", file=sys.stderr)
    return FAILED


def _can_print() -> bool:
    """Whether stdout takes an empty line; if not, the rest goes nowhere, without more errors."""
    try:
        print(flush=True)
        return True
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False


def _run(options: argparse.Namespace) -> int:
    if options.command == "info":
        print(normkit.info())
        return DONE
    if options.command == "bench":
        from normkit.bench import run

        run.main(options.out, options.only, options.seconds, not options.no_compile)
        return DONE
    if options.command == "study":
        return _study(options)
    if options.command is not None:
        from normkit.cli.tools import main as tool

        return FINDINGS if tool(options) else DONE
    _parser().print_help()
    return FAILED


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10**9:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 to 1,000,000,000")
    return number


def _amount(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: give a finite number of at least 0")
    return number


class _Parser(argparse.ArgumentParser):
    """The standard parser, which names the nearest option or choice when one is unknown."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        found, extra = self.parse_known_args(args, namespace)
        if extra:
            known = [flag for flag in _flags(self, found) if flag.startswith("--")]
            near = difflib.get_close_matches(extra[0].split("=")[0], known, n=1, cutoff=0.5)
            guess = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown option {extra[0]!r}{guess}")
        return found

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = sorted(map(str, action.choices))
            near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
            guess = f"; did you mean {near[0]!r}?" if near else ""
            raise argparse.ArgumentError(
                action, f"unknown {value!r}{guess} (known: {', '.join(known)})"
            )

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"normkit: error: {message}\nSee {self.prog} --help.\n")


def _flags(parser: argparse.ArgumentParser, found: argparse.Namespace) -> list[str]:
    flags: list[str] = []
    for action in parser._actions:
        flags += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            chosen = action.choices.get(str(getattr(found, "command", None)))
            flags += _flags(chosen, found) if chosen else []
    return flags


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="normkit",
        description=__doc__,
        epilog="Exit status: 0 done, 1 findings of inspect, 2 wrong input or a failure, "
        "130 interrupted.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    parser.add_argument("--version", action="version", version=f"normkit {normkit.__version__}")
    commands.add_parser(
        "info",
        help="which backends this installation has, and why not others",
        description="Print the versions, the machine and, for each backend, whether it can be used "
        "here, or why not.",
        allow_abbrev=False,
    )
    bench = commands.add_parser(
        "bench",
        help="time the layers against torch's and the memory floor",
        description="Time the layers against torch's own, torch.compile and a plain copy, "
        "interleaved in one process. Run it alone on the machine.",
        allow_abbrev=False,
    )
    bench.add_argument("--only", metavar="TEXT", help="cases whose name holds this, as 'GN(8) 32x'")
    bench.add_argument(
        "--seconds", type=_amount, default=0.15, metavar="S", help="time for a case (default: 0.15)"
    )
    bench.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    bench.add_argument("--out", type=Path, metavar="FILE", help="write the results there, as JSON")
    study = commands.add_parser(
        "study",
        help="test a published claim about normalization on your data",
        description="Test a published claim about normalization on your data. The same command "
        "again goes on where it was stopped.",
        allow_abbrev=False,
    )
    study.add_argument("study", nargs="?", help="which study, or all; see --list")
    study.add_argument("--list", action="store_true", help="show the studies")
    study.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of these options")
    study.add_argument(
        "--budget", metavar="TIME", help="with all: do what fits into this time, as 20m or 1h30m"
    )
    study.add_argument("--json", action="store_true", help="one JSON object a line, for machines")
    add = study.add_argument
    add("--data", help="digits, wine, breast-cancer, fashion-mnist, file.npz or module:function")
    add("--data-root", metavar="DIR", help="where the data files are")
    add("--model", help="mlp, cnn, resnet or package.module:function")
    add("--activation", help="sigmoid, tanh or relu")
    add("--inputs", help="standardized, raw, min-max or whitened (default: standardized)")
    add("--placement", help="norms before or after the activation (default: before)")
    add("--arms", help="the arms to run, comma-separated, as in a shell: '*-2,*-32' (default: all)")
    add("--seeds", type=int, metavar="N", help="seeds to pair the arms by (default: 6)")
    add("--steps", type=int, metavar="N", help="training steps of each run")
    add("--batch-size", type=int, metavar="N", help="samples to a batch (default: 60)")
    add("--lr", type=float, metavar="RATE", help="the rate that the arms multiply")
    add("--optimizer", help="sgd, momentum, rmsprop or adam (default: sgd)")
    add("--eval-every", type=int, metavar="N", help="steps between evaluations")
    add("--device", help="a torch device (default: cpu)")
    add("--threads", type=int, metavar="N", help="torch threads of each job (default: 1)")
    add("--jobs", type=int, metavar="N", help="runs at a time (default: the number of cores)")
    add("--engine", help="local processes, or ray: a Ray cluster (default: local)")
    add("--ray-address", metavar="HOST:PORT", help="the cluster (default: the one found here)")
    add("--stats", help="under torchrun: norms sync over all ranks, or local to each")
    add("--out", metavar="DIR", help="the folder of the results (default: under runs/)")
    add(
        "--tensorboard",
        action="store_true",
        default=None,
        help="write event files for TensorBoard as well, into the folder of the results",
    )
    _add_tools(commands)
    return parser


def _add_tools(commands: Any) -> None:
    def tool(name: str, help: str, data: str) -> Callable[..., Any]:
        parser = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}. docs/tools.md says how.",
            allow_abbrev=False,
        )
        parser.add_argument(
            "setup",
            metavar="module:function",
            help="a function without arguments that returns the model, or a dictionary of "
            f"normkit.{name}'s arguments: model, {data}, ...",
        )
        parser.add_argument("--json", action="store_true", help="the report as one JSON object")
        return parser.add_argument

    out = "write the model's state_dict there, by torch.save"
    only = "names of layers, as in a shell: 'layer1.*'"
    add = tool("recalibrate", "replace running averages by exact statistics", "loader")
    add("--sequential", action="store_true", default=None, help="a pass for each layer")
    add("--tolerance", type=_amount, metavar="T", help="stop at this standard error of the means")
    add("--batches", type=_count, metavar="N", help="read at most so many batches (default: all)")
    add("--only", metavar="PATTERN", help=only)
    add("--out", type=Path, metavar="FILE", help=out)

    add = tool("swap", "replace the norms of a model, keeping weights and all else", "example")
    add(
        "--to",
        help="a name of normkit.create (group:8, ghost:32), torch, or none (default: normkit's "
        "layer of the same kind)",
    )
    add("--only", metavar="PATTERN", help=only)
    add("--groups", type=_count, metavar="N", help="at most so many groups (default: 32)")
    add("--fuse", action="store_true", default=None, help="fuse the activations behind norms")
    add("--out", type=Path, metavar="FILE", help=out)

    add = tool("fold", "fold the norms of evaluation into the layers beside them", "example")
    add("--only", metavar="PATTERN", help=only)
    add("--tolerance", type=_amount, metavar="T", help="largest error over largest output")
    add("--out", type=Path, metavar="FILE", help=out)

    add = tool(
        "inspect",
        "find faults of normalization in a model and its data; exit status 1 if there are any",
        "loader",
    )
    add("--batches", type=_count, metavar="N", help="look at so many batches (default: 8)")
    add("--ignore", type=lambda codes: codes.split(","), metavar="CODES", help="as NK05,NK10")
    add("--fix", action="store_true", default=None, help="mend what can be mended safely")
    add("--html", type=Path, metavar="FILE", help="write a page with every layer's data")
    add("--out", type=Path, metavar="FILE", help=out)


def _study(options: argparse.Namespace) -> int:
    missing = [name for name in _LAB_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(_LAB_NEEDS[name] for name in missing)
        raise LabError(
            f"studies need {names}, not installed here; pip install 'normkit[lab]' brings them"
        )
    from normkit.lab.engine.together import dismiss, follow
    from normkit.lab.training import ranks

    if ranks.rank() > 0:
        follow()
    else:
        _lead(options)
        dismiss()
    return DONE


def _lead(options: argparse.Namespace) -> None:
    from normkit.common.errors import unknown
    from normkit.lab.plan import run_all, seconds
    from normkit.lab.report.progress import progress_for
    from normkit.lab.run import run_study
    from normkit.lab.studies import all_studies
    from normkit.lab.training.config import Config, read_toml

    studies = all_studies()
    if options.list:
        for study in studies.values():
            print(f"{study.name}: {study.claim}\n    {study.source}")
        return
    if options.study is None:
        raise LabError(f"no study named; all, or one of: {', '.join(studies)}")
    if options.study not in ("all", *studies):
        raise unknown("study", options.study, ["all", *studies])
    if options.budget is not None and options.study != "all":
        raise LabError("--budget is for `normkit study all`, which chooses the studies that fit")
    values = read_toml(options.config) if options.config else {}
    for field in dataclasses.fields(Config):
        given = getattr(options, field.name, None)
        if given is not None:
            values[field.name] = given
    given = Config(**values)
    progress = progress_for(options.json)
    if options.study == "all":
        budget = None if options.budget is None else seconds(options.budget)
        if not options.json:
            tail = [] if options.budget is None else ["--budget", options.budget]
            print(shlex.join(given.resolved("all").command("all") + tail), flush=True)
        run_all(studies, given, budget, progress)
        return
    study = studies[options.study]
    config = given.resolved(study.name, study.length)
    if not options.json:
        print(shlex.join(config.command(study.name)), flush=True)
    run_study(study, given, progress)
