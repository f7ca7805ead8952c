"""Write the tables in README.md and docs/, and the picture, from results/.

    normkit bench --out benchmarks/results/cpu.json
    python benchmarks/render.py

The picture needs plotly and chromium.
"""

import json
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MODES = ("evaluation", "training", "forward+backward")
LARGE = 8_000_000
Rows = list[dict[str, Any]]


def table(head: list[str], body: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def faster(rows: Rows, key: str = "normkit/torch") -> str:
    """Return the geometric mean of how many times faster, with the slowest and the fastest row."""
    times = sorted(1 / row[key] for row in rows)
    return f"{statistics.geometric_mean(times):.2f} ({times[0]:.2f} to {times[-1]:.2f})"


def of(rows: Rows, **wanted: Any) -> Rows:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[k] == v for k, v in wanted.items())]


def summary(result: dict[str, Any]) -> str:
    """Return what the README says."""
    rows, models = result["rows"], result["models"]
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    body = [[norm, *(faster(of(rows, norm=norm, mode=mode)) for mode in MODES)] for norm in norms]
    body.append(["all", *(faster(of(rows, mode=mode)) for mode in MODES)])
    steps = [[m["model"], f"{1 / m['normkit/torch']:.2f}"] for m in models]
    machine = result["machine"]
    return "\n\n".join(
        [
            f"Times faster than torch's layers ({machine['cpu']}, {machine['threads']} threads, "
            f"{machine['backend cpu']}, torch {machine['torch']}): the\n"
            "geometric mean over shapes, layouts, float32 and bfloat16, with the slowest and the\n"
            "fastest row. Below 1 is slower than torch.",
            table(["norm", *MODES], body),
            "A training step, forward, backward and SGD:",
            table(["model", "times faster"], steps),
        ]
    )


def goals(result: dict[str, Any]) -> str:
    """Return how far the rows are from the floor, and how noisy the run was."""
    rows = result["rows"]
    body = []
    for mode in MODES:
        large = [row for row in of(rows, mode=mode) if row["bytes"] >= LARGE]
        floors = sorted(row["normkit/floor"] for row in large)
        theirs = sorted(row["torch/floor"] for row in large)
        noise = sorted(abs(row["torch/torch"] - 1) for row in of(rows, mode=mode))
        slower = [row for row in of(rows, mode=mode) if row["normkit/torch"] > 1.05]
        body.append(
            [
                mode,
                f"{statistics.median(floors):.2f} ({floors[-1]:.2f})",
                f"{statistics.median(theirs):.2f} ({theirs[-1]:.2f})",
                f"{len(slower)} of {len(of(rows, mode=mode))}",
                f"{statistics.median(noise):.1%} ({noise[int(0.95 * len(noise))]:.0%})",
            ]
        )
    head = [
        "mode",
        "normkit / floor, 8 MB and more: median (worst)",
        "torch / floor",
        "rows over 5 % slower than torch",
        "torch against itself: median (95th percentile)",
    ]
    return table(head, body)


def full(result: dict[str, Any]) -> str:
    """Return docs/benchmark.md."""
    rows = result["rows"]
    unfused = [r for r in of(rows, mode="forward+backward") if "+" not in r["norm"]]
    fused = [r for r in of(rows, mode="forward+backward") if "+" in r["norm"]]
    compiled = [r for r in rows if "normkit/compile" in r]
    head = ["case", "floor (ms)", "normkit / floor", "torch / floor", "normkit / torch", "A/A"]
    body = [
        [
            f"{r['norm']} {'x'.join(map(str, r['shape']))} {r['layout']} {r['dtype']} {r['mode']}",
            f"{r['floor_ms']:.4g}",
            f"{r['normkit/floor']:.2f}",
            f"{r['torch/floor']:.2f}",
            f"{r['normkit/torch']:.2f}",
            f"{r['torch/torch']:.2f}",
        ]
        for r in rows
    ]
    facts = "\n".join(f"- {key}: {value}" for key, value in result["machine"].items())
    compile_table = table(
        ["case", "normkit / compile", "compile / torch"],
        [
            [
                f"{r['norm']} {'x'.join(map(str, r['shape']))}",
                f"{r['normkit/compile']:.2f}",
                f"{r['compile/torch']:.2f}",
            ]
            for r in compiled
        ],
    )
    return f"""# Benchmark

Written by `benchmarks/render.py` from `benchmarks/results/cpu.json`, which `normkit bench` (or
`make bench`) measures: all contestants interleaved in one process in alternating order, medians of
paired ratios. The floor is `x.clone()` forward and `x.clone()` and `x + dy` forward and backward,
allocation included. A/A is torch against itself.

{facts}

## Against the floor

{goals(result)}

Forward and backward, times faster than torch eager, geometric mean (slowest to fastest row):
unfused {faster(unfused)}, fused {faster(fused)}.

## Against torch.compile

Forward and backward, contiguous, float32, inductor on torch's layer.

{compile_table}

## Every row

{table(head, body)}
"""


def kernels(result: dict[str, Any]) -> str:
    """Return docs/kernels.md."""
    targets = ("80", "90", "100")
    body = [
        [
            " ".join(filter(None, (row["call"], row["kernel"], row["phase"]))),
            "x".join(map(str, row["tile"] or ())),
            str(row["warps"]),
            *(f"{row[t]['registers']} / {row[t]['spilled']} / {row[t]['shared']}" for t in targets),
        ]
        for row in result["rows"]
    ]
    head = ["kernel", "tile", "warps", *(f"sm_{t}" for t in targets)]
    return f"""# The Triton kernels, compiled ahead of time

Written by `benchmarks/render.py` from `benchmarks/results/aot.json`, which `benchmarks/aot.py`
makes with triton {result["triton"]} and no GPU: registers of a thread / bytes spilled / bytes of
shared memory. None of this says how fast a kernel is.

{table(head, body)}
"""


def synchronized(result: dict[str, Any], text: str) -> str:
    """Return docs/sync.md with its table written anew."""
    machine = result["machine"]
    body = [
        [
            "x".join(map(str, r["shape"])),
            f"{r['local_ms']:.3g}",
            f"{r['collectives_ms']:.3g}",
            f"{r['synchronized/local']:.2f}",
            f"{r['overhead/collectives']:.2f}",
        ]
        for r in result["rows"]
    ]
    head = [
        "input of one process",
        "batch norm alone (ms)",
        "the two collectives alone (ms)",
        "synchronized / alone",
        "(synchronized - alone) / collectives",
    ]
    said = (
        "Forward and backward in two processes on gloo and 127.0.0.1, a thread each "
        f"({machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, load "
        f"{machine['load']:.1f}),\nmedians, written by `benchmarks/render.py` from "
        "`benchmarks/results/sync.json` (`make bench-sync`).\nWhat the last column has over 1 is a "
        "second read of the input, which alone would be in cache, Python, and waiting."
    )
    return _between_marks(text, f"{said}\n\n{table(head, body)}")


def _between_marks(text: str, part: str) -> str:
    part = f"<!-- benchmark -->\n\n{part}\n\n<!-- /benchmark -->"
    return re.sub(r"<!-- benchmark -->.*<!-- /benchmark -->", lambda _: part, text, flags=re.DOTALL)


def picture(result: dict[str, Any], target: Path, scheme: str) -> None:
    """Save each large case's distance from the floor, ours and torch's, as a PNG."""
    import plotly.graph_objects as go
    from playwright.sync_api import sync_playwright

    rows = [r for r in of(result["rows"], mode="forward+backward") if r["bytes"] >= LARGE]
    ink, paper = ("#dddddd", "#16181d") if scheme == "dark" else ("#222222", "#ffffff")
    figure = go.Figure()
    for name, key, colour in (
        ("torch", "torch/floor", "#d08770"),
        ("normkit", "normkit/floor", "#4c8fd6"),
    ):
        figure.add_scatter(
            x=[r[key] for r in rows],
            y=[r["norm"] for r in rows],
            mode="markers",
            name=name,
            marker={"color": colour, "size": 8, "opacity": 0.65},
        )
    figure.add_vline(x=1, line={"color": ink, "dash": "dot"})
    figure.update_layout(
        title="Forward and backward of tensors of 8 MB and more: time over that of a plain copy",
        xaxis={"title": "times the memory floor (1 is a copy, log scale)", "type": "log"},
        yaxis={"autorange": "reversed"},
        paper_bgcolor=paper,
        plot_bgcolor=paper,
        font={"color": ink, "family": "sans-serif"},
        width=960,
        height=460,
        margin={"l": 130, "r": 20, "t": 60, "b": 60},
    )
    figure.update_xaxes(gridcolor="#88888844", tickvals=[0.5, 1, 2, 3, 5, 10, 20])
    figure.update_yaxes(gridcolor="#88888822")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 960, "height": 460}, device_scale_factor=1.5)
        page.set_content(figure.to_html(include_plotlyjs=True, config={"staticPlot": True}))
        page.wait_for_selector(".main-svg")
        page.locator(".plotly-graph-div").screenshot(path=target)
        browser.close()


def readme(result: dict[str, Any], text: str) -> str:
    """Return the README with its table written anew."""
    return _between_marks(text, summary(result))


if __name__ == "__main__":
    measured = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    target = ROOT / "README.md"
    target.write_text(readme(measured, target.read_text()))
    (ROOT / "docs/benchmark.md").write_text(full(measured))
    compiled = json.loads((ROOT / "benchmarks/results/aot.json").read_text())
    (ROOT / "docs/kernels.md").write_text(kernels(compiled))
    over_ranks = json.loads((ROOT / "benchmarks/results/sync.json").read_text())
    page = ROOT / "docs/sync.md"
    page.write_text(synchronized(over_ranks, page.read_text()))
    if "--no-picture" not in sys.argv:
        for scheme, name in (("light", "benchmark.png"), ("dark", "benchmark-dark.png")):
            picture(measured, ROOT / "docs" / name, scheme)
