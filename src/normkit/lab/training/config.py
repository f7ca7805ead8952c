"""What a study is run with: the options, their defaults, and a TOML file that holds the same."""

import dataclasses
import importlib.util
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normkit.common.errors import LabError, unknown
from normkit.lab.training.ranks import launcher, size

ACTIVATIONS = ("sigmoid", "tanh", "relu")
OPTIMIZERS = ("sgd", "momentum", "rmsprop", "adam")
PLACEMENTS = ("before", "after")
INPUTS = ("standardized", "raw", "min-max", "whitened")
NAMED_DATA = ("digits", "wine", "breast-cancer", "fashion-mnist")
NAMED_MODELS = ("mlp", "cnn", "resnet")
ENGINES = ("local", "ray")
STATS = ("sync", "local")

# Rates at which the network without normalization ends within a percent of its best, so that the
# comparison is against a well-tuned one. The grids, and what wasn't tuned, are in docs/lab.md.
_RATES = {"mlp-sigmoid": 1.0, "mlp-tanh": 0.1, "mlp-relu": 0.1, "cnn": 0.3, "resnet": 0.1}
_ADAPTIVE_RATE = 0.001
_STEPS = {"mlp": 3000, "cnn": 1000, "resnet": 600}
# Measured more often than after so many batches, a short run would cost more to measure than to do.
_FEWEST_STEPS = 6

# Far above any use. Past it OpenMP crashes for want of threads, and seeds meet those set aside.
_MOST = {"threads": 1024, "jobs": 1024, "seeds": 100_000}
_MOST_OF_OTHERS = 10**9

# Where and how fast the runs are computed; a folder's results don't depend on these.
_NOT_IDENTITY = (
    *("data_root", "seeds", "jobs", "out", "arms"),
    *("engine", "ray_address", "tensorboard"),
)
# What a report's command leaves out: how fast its numbers come depends on these, no more.
_NOT_COMMAND = ("jobs", "engine", "ray_address", "ranks")


@dataclass(frozen=True)
class Config:
    """Everything that decides a study's numbers, and where they go.

    A value of None stands for a default that depends on the others; `resolved` fills it in.
    `ranks` is the number of processes that torchrun started to train each run together; no option
    sets it.
    """

    data: str = "digits"
    data_root: str | None = None
    inputs: str = "standardized"
    model: str = "mlp"
    activation: str | None = None
    placement: str = "before"
    seeds: int = 6
    steps: int | None = None
    batch_size: int = 60
    lr: float | None = None
    optimizer: str = "sgd"
    eval_every: int | None = None
    device: str = "cpu"
    threads: int = 1
    jobs: int | None = None
    engine: str = "local"
    ray_address: str | None = None
    stats: str | None = None
    ranks: int = 1
    arms: str | None = None
    out: str | None = None
    tensorboard: bool = False

    def resolved(self, study: str, length: float = 1.0) -> "Config":
        """Return the configuration with every default filled in, checked.

        `length` is how long the study trains by default, as a share of the network's own default.
        Raises LabError for a value out of range or unknown, naming it and the nearest valid one.
        """
        if self.ranks not in (1, size()):
            raise LabError(
                f"ranks is {self.ranks} and torchrun started {size()}; it says how many processes "
                f"trained: torchrun --nproc-per-node {self.ranks} -m normkit study ..."
            )
        for field in ("seeds", "steps", "batch_size", "threads", "jobs", "eval_every"):
            value, most = getattr(self, field), _MOST.get(field, _MOST_OF_OTHERS)
            if value is not None and not 1 <= value <= most:
                raise LabError(
                    f"{_flag(field)} is {value}; give a whole number of at least 1 and at most "
                    f"{most:,}"
                )
        for field, value in vars(self).items():
            if isinstance(value, str):
                _check_text(_flag(field), value)
        if self.batch_size < 2:
            raise LabError("--batch-size is 1; batch norm needs at least 2 samples to a batch")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise LabError(f"--lr is {self.lr}; give a positive, finite learning rate")
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)
        if self.placement not in PLACEMENTS:
            raise unknown("placement", self.placement, PLACEMENTS)
        if self.inputs not in INPUTS:
            raise unknown("inputs", self.inputs, INPUTS)
        if self.model not in NAMED_MODELS and ":" not in self.model:
            raise unknown("model", self.model, NAMED_MODELS, "Or package.module:function.")
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)
        if self.ray_address is not None and self.engine != "ray":
            raise LabError(f"--ray-address {self.ray_address} is for --engine ray; give both")
        _check_device(self.device)
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise LabError(
                "--tensorboard needs the package tensorboard, not installed here; "
                "pip install 'normkit[tensorboard]' brings it"
            )
        stats = self._stats(size())

        activation = self.activation or ("sigmoid" if self.model == "mlp" else "relu")
        kind = f"mlp-{activation}" if self.model == "mlp" else self.model
        adaptive = self.optimizer in ("rmsprop", "adam")
        rate = _ADAPTIVE_RATE if adaptive else _RATES.get(kind, 0.1)
        steps = self.steps or max(1, round(length * _STEPS.get(self.model, 1000)))
        if self.eval_every is not None and self.eval_every > steps:
            raise LabError(
                f"--eval-every {self.eval_every} is more than --steps {steps}: "
                "nothing would be measured; give a smaller one"
            )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        alone = self.device != "cpu" or size() > 1
        jobs = 1 if alone else max(1, (cores or 1) // self.threads)
        return dataclasses.replace(
            self,
            activation=activation,
            steps=steps,
            lr=self.lr or (rate / 10 if self.optimizer == "momentum" else rate),
            eval_every=self.eval_every
            or max(min(_FEWEST_STEPS, steps), steps // (100 if self.model == "mlp" else 40)),
            # On a cluster as many as it has room for.
            jobs=self.jobs or (None if self.engine == "ray" else jobs),
            stats=stats,
            ranks=size(),
            out=self.out or f"runs/{study}-{_slug(self.data)}-{_slug(kind)}",
        )

    def _stats(self, ranks: int) -> str | None:
        if ranks == 1:
            if self.stats is not None:
                raise LabError(
                    f"--stats {self.stats} says how processes share statistics, and there is one "
                    "process; start several: torchrun --nproc-per-node 2 -m normkit study ..."
                )
            return None
        if self.jobs is not None or self.engine != "local":
            option = f"--engine {self.engine}" if self.jobs is None else f"--jobs {self.jobs}"
            raise LabError(
                f"{option} under torchrun: its {ranks} processes train one run at a time together; "
                "leave out one of the two"
            )
        stats = self.stats or "sync"
        if stats not in STATS:
            raise unknown("stats", stats, STATS)
        if stats == "local" and self.batch_size < 2 * ranks:
            raise LabError(
                f"--batch-size {self.batch_size} over {ranks} ranks leaves a rank less than the 2 "
                "samples that a batch norm of its own needs; give more, or --stats sync"
            )
        return stats

    def identity(self) -> dict[str, Any]:
        """Return the options that decide the curves: a folder holds the results of one such set."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if key not in _NOT_IDENTITY}

    def command(self, study: str) -> list[str]:
        """Return the command line that gives this configuration, every option spelled out."""
        words = ["normkit", "study", study]
        if self.ranks > 1:
            words = [*launcher(), "-m", *words]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or value is False or field.name in _NOT_COMMAND:
                continue
            words += [_flag(field.name)] if value is True else [_flag(field.name), str(value)]
        return words


def read_toml(path: Path) -> dict[str, Any]:
    """Return the options that a TOML file holds, under the names that the flags have.

    Raises LabError for a missing file, one that isn't TOML, an unknown key, a wrong type.
    """
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise LabError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"--config {path} can't be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise LabError(f"--config {path} is not valid TOML: {error}") from None
    return checked(table, f"in {path}")


def checked(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `table` with its keys as field names, each value checked against its field's type."""
    types_ = typing.get_type_hints(Config)
    options = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in types_:
            known = [field.replace("_", "-") for field in types_]
            raise unknown("option", key, known, f"It stands {where}.")
        allowed = _members(types_[name])
        if float in allowed and type(value) is int:
            value = float(value)
        if type(value) not in allowed:
            wanted = " or ".join(kind.__name__ for kind in allowed if kind is not type(None))
            raise LabError(f"option {key!r} {where} is {value!r}; it takes a {wanted}")
        options[name] = value
    return options


def _members(hint: Any) -> tuple[type, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _slug(name: str) -> str:
    stem = Path(name).stem if name.endswith(".npz") else name
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem)


def _check_text(option: str, value: str) -> None:
    """Raise unless a report, which is UTF-8 text, can name the value, and a file system take it."""
    if not value:
        raise LabError(f"{option} is empty; give a value, or leave the option out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LabError(
            f"{option} {value!r} isn't UTF-8, so that no report could name it; rename the file, or "
            "give another name"
        ) from None
    if "\0" in value:
        raise LabError(f"{option} {value!r} holds a zero character; give a name without it")


def _check_device(device: str) -> None:
    import torch

    try:
        # Computed and brought back, which a device without data ("meta") can't.
        torch.ones(2, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise LabError(f"--device {device!r} can't be used here ({reason}); try cpu") from None
