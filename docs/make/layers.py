"""Draw the layers of the package, from its own imports, into docs/design.md.

python docs/make/layers.py
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import grimp

from normkit.common.files import write

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "design.md"
MARKS = ("<!-- layers -->", "<!-- /layers -->")


def layers() -> list[list[str]]:
    """The layers that import-linter holds, from the top, each of modules side by side."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    contract = next(c for c in table["contracts"] if c.get("containers") == ["normkit"])
    return [line.split(" | ") for line in contract["layers"]]


def drawing() -> str:
    """A Mermaid flowchart: a line of boxes a layer, an arrow where one imports another."""
    graph = grimp.build_graph("normkit")
    rows = layers()
    modules = [name for row in rows for name in row]
    lines = ["```mermaid", "flowchart TD"]
    for place, row in enumerate(rows):
        boxes = "; ".join(f"{name}" for name in row)
        lines.append(f'  subgraph L{place}[" "]\n    direction LR; {boxes}\n  end')
    for above in modules:
        for below in modules:
            if above != below and graph.direct_import_exists(
                importer=f"normkit.{above}", imported=f"normkit.{below}", as_packages=True
            ):
                lines.append(f"  {above} --> {below}")
    return "\n".join([*lines, "```"])


def page() -> str:
    """The whole page, with the drawing of now in it."""
    first, last = MARKS
    text = PAGE.read_text("utf-8")
    return re.sub(f"{first}.*{last}", f"{first}\n{drawing()}\n{last}", text, flags=re.DOTALL)


if __name__ == "__main__":
    write(PAGE, page())
