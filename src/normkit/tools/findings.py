"""A finding of the norm doctor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One fault: what was measured at which layer, why it matters, the line that mends it."""

    code: str
    name: str
    layer: str
    measured: str
    why: str
    fix: str

    def __str__(self) -> str:
        """As a linter prints it."""
        return (
            f"{self.layer}: {self.code} {self.name}: {self.measured}\n"
            f"    why: {self.why}\n    fix: {self.fix}"
        )
