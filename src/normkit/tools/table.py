"""What a tool hands back: the model, and a table of what was done to which layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Report:
    """What a tool did.

    Attributes:
        model: the model that was worked on.
        rows: one dataclass a layer; its fields are the table's columns.
        facts: what holds of the whole model.
    """

    model: nn.Module = field(repr=False)
    rows: Sequence[Any]
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The rows and the facts as plain values."""
        return {**self.facts, "rows": [dataclasses.asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        """The table, then the facts."""
        lines = table(self.rows)
        facts = [f"{key}: {cell(value)}" for key, value in self.facts.items() if value is not None]
        return "\n".join([*lines, *([""] if lines and facts else []), *facts])


def table(rows: Sequence[Any]) -> list[str]:
    """Dataclasses as lines of aligned columns."""
    if not rows:
        return []
    names = [f.name for f in dataclasses.fields(rows[0])]
    cells = [[cell(getattr(row, name)) for name in names] for row in rows]
    head = [name.replace("_", " ") for name in names]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *cells)
    ]


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
