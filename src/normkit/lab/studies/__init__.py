"""The studies: one file each, with its claim, its source, its arms, and its verdict's rule."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from normkit.lab.config import Config
from normkit.lab.errors import LabError, unknown
from normkit.lab.store import Run
from normkit.lab.train import Arm
from normkit.lab.verdict import Verdict


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
class Study:
    """One study: what it claims, the arms that it trains, how it judges them."""

    name: str
    claim: str
    source: str
    arms: tuple[Arm, ...]
    judge: Callable[[Config, Mapping[str, Sequence[Run]]], Findings]

    def chosen(self, names: str | None) -> list[Arm]:
        """Return the arms of the comma-separated names, or all; the baseline is the first arm.

        Raises LabError for an unknown arm, or when the baseline isn't among them.
        """
        if names is None:
            return list(self.arms)
        known = {arm.name: arm for arm in self.arms}
        wanted = [name.strip() for name in names.split(",") if name.strip()]
        for name in wanted:
            if name not in known:
                raise unknown("arm", name, known)
        baseline = self.arms[0].name
        if baseline not in wanted:
            raise LabError(
                f"--arms {names!r} leaves out {baseline!r}, which the others are compared with; "
                f"add it: --arms {','.join([baseline, *wanted])}"
            )
        return [arm for arm in self.arms if arm.name in wanted]


def all_studies() -> dict[str, Study]:
    """Return every study by name: each module of this package holds one, named STUDY."""
    modules = (
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
    )
    return {module.STUDY.name: module.STUDY for module in modules}
