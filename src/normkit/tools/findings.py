"""A finding of the norm doctor."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """One cause: where it is, what was measured, why it matters, the line that mends it.

    Attributes:
        layers, types: where; the type stands beside each layer.
        cost: what evaluation loses by it, in `unit`; None where that can't be measured.
        unit: "loss", or "output" for a change of the outputs in standard deviations.
        note: whether it is only worth knowing: nothing has to be mended.
    """

    code: str
    name: str
    layers: tuple[str, ...]
    types: tuple[str, ...]
    measured: str
    why: str
    fix: str
    cost: float | None = None
    unit: str = "output"
    note: bool = False

    @property
    def layer(self) -> str:
        """The first of the layers."""
        return self.layers[0]

    @property
    def where(self) -> str:
        """The layers, quoted, each with its type."""
        named = [f"{n!r} ({t})" for n, t in zip(self.layers, self.types, strict=True)]
        more = len(named) - _SHOWN
        return ", ".join(named[:_SHOWN]) + (f" and {more} more" if more > 0 else "")

    @property
    def price(self) -> str:
        """What it costs, in words; empty where that wasn't measured."""
        if self.cost is None:
            return ""
        if self.unit == "loss":
            return f"{self.cost:.2g} of the loss" if math.isfinite(self.cost) else "the loss"
        if math.isfinite(self.cost):
            return f"a change of the outputs by {self.cost:.2g} standard deviations"
        return "the outputs"

    def __str__(self) -> str:
        """As a linter prints it."""
        lines = [f"{self.where}: {self.code} {self.name}: {self.measured}"]
        if self.price:
            lines.append(f"    costs: {self.price}")
        lines.append(f"    why: {self.why}")
        if self.fix:
            # Several lines stand as they are to be copied.
            lines.append("    fix:" + ("\n" if "\n" in self.fix else " ") + self.fix)
        return "\n".join(lines)
