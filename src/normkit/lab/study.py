"""What a study is: a claim, its source, its arms, what is measured, and the rule of its verdict."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from normkit.common.errors import LabError, unknown
from normkit.lab.results.store import Run
from normkit.lab.results.verdict import Verdict
from normkit.lab.training.arms import GRID, Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.lab.training.probe import Probe


class NotApplicable(LabError):
    """The study asks for something that this data or model doesn't have; the text says what."""


@dataclass(frozen=True)
class Figure:
    """A plotly figure, as plain data; a colour "@name" is one of the page's light or dark set.

    `alt` says in words what is to be seen.
    """

    name: str
    title: str
    caption: str
    alt: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """What a study found: verdicts, the table that carries them, figures, remarks."""

    headline: str
    verdicts: list[Verdict]
    columns: list[str]
    rows: list[list[str]]
    figures: list[Figure]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evidence:
    """The ended runs that a study judges.

    `runs` are those at the arms' own rates, by arm name, in the order of the seeds. Where the study
    tunes, `factors` is by arm name the best factor of the grid, and `tuned` the runs at it: the
    same as in `runs` where the factor is 1.
    """

    config: Config
    arms: Sequence[Arm]
    runs: Mapping[str, Sequence[Run]]
    tuned: Mapping[str, Sequence[Run]] = field(default_factory=dict)
    factors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """One study.

    `arms` gives the arms for a configuration and data; the first is the baseline. It raises
    NotApplicable where the study can't be done. `judge` turns the ended runs into findings.
    `probe` is called `probes` times along each run and returns numbers, kept as curves; `finish`
    once at the end of a run that didn't diverge, and returns what can be written as JSON, kept in
    `Run.found`. What they change in the model, the optimizer or the random state is put back.
    `tuned` says that every arm is run at its own rate and, once more, at the best of `grid` times
    it.
    `length` is how long it trains by default, as a share of the network's default. `published` says
    in a sentence what the source found, to read beside the verdicts.
    """

    name: str
    claim: str
    source: str
    arms: Callable[[Config, Data], Sequence[Arm]]
    judge: Callable[[Evidence], Findings]
    probe: Callable[[Probe], dict[str, float]] | None = None
    finish: Callable[[Probe], dict[str, Any]] | None = None
    probes: int = 10
    tuned: bool = False
    grid: tuple[float, ...] = GRID
    length: float = 1.0
    published: str = ""

    def chosen(self, arms: Sequence[Arm], names: str | None) -> list[Arm]:
        """Return the arms of the comma-separated names, or all; the baseline is the first arm.

        A name may be a pattern as in a shell: "*-2". Raises LabError for one that no arm has, or
        when the baseline isn't among them.
        """
        if names is None:
            return list(arms)
        known = [arm.name for arm in arms]
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        found = {pattern: fnmatch.filter(known, pattern) for pattern in wanted}
        for pattern, matching in found.items():
            if not matching:
                raise unknown("arm", pattern, known)
        chosen = {name for matching in found.values() for name in matching}
        baseline = known[0]
        if baseline not in chosen:
            raise LabError(
                f"--arms {names!r} leaves out {baseline!r}, which the others are compared with; "
                f"add it: --arms {','.join([baseline, *wanted])}"
            )
        return [arm for arm in arms if arm.name in chosen]
