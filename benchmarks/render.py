"""Write the tables in README.md and docs/benchmark.md, and the picture, from results/cpu.json.

    normkit bench --out benchmarks/results/cpu.json
    python benchmarks/render.py

The picture needs plotly and chromium. docs/kernels.md is written from results/aot.json, docs/gpu.md
and the README's lines on GPUs from results/gpu.json, if there is one.
"""

import json
import re
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from normkit.common.files import write
from normkit.lab.training.train import _CHECKPOINT_SECONDS, _REPORT_SECONDS

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
    steps = [
        [m["model"], f"{1 / m['normkit/torch']:.2f}", f"{1 / m['torch/torch']:.2f}"] for m in models
    ]
    machine = result["machine"]
    slower = sum(row["normkit/torch"] > 1.05 for row in rows)
    return "\n\n".join(
        [
            f"Times faster than torch's layers ({machine['cpu']}, {machine['threads']} threads, "
            f"{machine['backend cpu']}, torch {machine['torch']}): the\n"
            "geometric mean over shapes, layouts, float32 and bfloat16, with the slowest and the\n"
            f"fastest row. Below 1 is slower than torch: {slower} of {len(rows)} rows are so by\n"
            "more than 5 %.",
            table(["norm", *MODES], body),
            "A training step, forward, backward and SGD:",
            table(["model", "times faster", "torch against itself"], steps),
            "The ConvNeXt-style net loses outside its norms: the permutes around torch's leave\n"
            "channels_last, on which the next convolutions are faster:\n"
            "[notes](benchmarks/notes.md).",
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
        ["case", "normkit / compile", "normkit compiled / compile", "compile / torch"],
        [
            [
                f"{r['norm']} {'x'.join(map(str, r['shape']))}",
                f"{r['normkit/compile']:.2f}",
                f"{r['normkit compiled/compile']:.2f}",
                f"{r['compile/torch']:.2f}",
            ]
            for r in compiled
        ],
    )
    return f"""# Benchmark

Written by `benchmarks/render.py` from `benchmarks/results/cpu.json`, which `normkit bench` (or
`make bench`) measures: all contestants interleaved in one process in alternating order, medians of
paired ratios of times: below 1 is faster. The floor is `x.clone()` forward and `x.clone()` and
`x + dy` forward and backward, allocation included. Outputs of 32 MB and more lie in huge pages,
which cost fewer page faults than the copy's, hence ratios below 1. A/A is torch against itself: a
row whose A/A is far from 1 was disturbed.

{facts}

## Against the floor

{goals(result)}

Forward and backward, times faster than torch eager, geometric mean (slowest to fastest row):
unfused {faster(unfused)}, fused {faster(fused)}.

## Against torch.compile

Forward and backward, contiguous, float32. `compile` is inductor on torch's layer, `normkit
compiled` inductor on normkit's, whose operators it keeps where statistics are taken from the input.

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
            f"{row['accesses'].get('16', 0)} / {sum(row['accesses'].values())}",
            *(f"{row[t]['registers']} / {row[t]['spilled']} / {row[t]['shared']}" for t in targets),
        ]
        for row in result["rows"]
    ]
    head = ["kernel", "tile", "warps", "16 bytes wide", *(f"sm_{t}" for t in targets)]
    return f"""# The Triton kernels, compiled ahead of time

Written by `benchmarks/render.py` from `benchmarks/results/aot.json`, which `benchmarks/aot.py`
makes with triton {result["triton"]} and no GPU: registers of a thread / bytes spilled / bytes of
shared memory. "16 bytes wide": how many of the instructions that access global memory are as wide
as a thread's can be, of all of them (sm_90); the others read and write statistics, weights, masks,
or rows whose length 16 bytes don't divide. None of this says how fast a kernel is.

{table(head, body)}
"""


def named(row: dict[str, Any]) -> str:
    """Return the name of a row's case."""
    shape = "x".join(map(str, row["shape"]))
    return f"{row['norm']} {shape} {row['layout']} {row['dtype']} {row['mode']}"


def against(rows: Rows, whose: str) -> list[float]:
    """Return how many times faster than a contestant, by row, where it took part."""
    return [r[whose]["/torch"] / r["normkit"]["/torch"] for r in rows if whose in r]


def spread(values: list[float]) -> str:
    """Return a geometric mean, with the least and the largest."""
    if not values:
        return "-"
    return f"{statistics.geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def gpu_goals(rows: Rows) -> str:
    """Return what was wanted of the kernels, and what came out."""
    large, small = of(rows, size="large"), of(rows, size="small")

    def shares(norms: tuple[str, ...], modes: tuple[str, ...], key: str) -> list[float]:
        chosen = [r for r in large if r["norm"].startswith(norms) and r["mode"] in modes]
        return [r["normkit"][key] for r in chosen]

    by_rows, forward = ("LN", "RMS", "add"), ("training", "evaluation")
    own = "of copy with second reads"
    better = [min(a, b) for a, b in zip(against(large, "torch"), _or_torch(large), strict=True)]
    last = {}
    for r in large:
        last.setdefault((r["norm"], *r["shape"], r["dtype"], r["mode"]), {})[r["layout"]] = r
    pairs = [p for p in last.values() if len(p) == 2]
    layouts = [
        p["contiguous"]["normkit"]["ms"] / p["channels_last"]["normkit"]["ms"] for p in pairs
    ]
    body = [
        ["row norms, forward, share of the copy", ">= 0.90", shares(by_rows, forward, "of copy")],
        ["row norms, backward", ">= 0.80", shares(by_rows, ("backward",), "of copy")],
        ["batch norm, training, of its own bytes", ">= 0.85", shares(("BN",), ("training",), own)],
        ["batch norm, backward, of its own bytes", ">= 0.85", shares(("BN",), ("backward",), own)],
        ["times faster than torch, large", ">= 1.5", against(large, "torch")],
        ["times faster than torch.compile, large", ">= 1.1", against(large, "compile")],
        ["times faster than the better of both, worst row", ">= 0.95", better],
        ["channels_last, times faster than contiguous", ">= 1", layouts],
        ["times faster than torch, small", ">= 0.83", against(small, "torch")],
    ]
    return table(
        ["what", "goal", "came out: geometric mean (least to most)"],
        [[what, goal, spread(values)] for what, goal, values in body],
    )


def _or_torch(rows: Rows) -> list[float]:
    return [r.get("compile", r["torch"])["/torch"] / r["normkit"]["/torch"] for r in rows]


def gpu(result: dict[str, Any]) -> str:
    """Return docs/gpu.md."""
    rows = [r for r in result["rows"] if "normkit" in r and "torch" in r]
    names = ("torch again", "normkit", "compile", "liger", "quack")
    body = [
        [
            named(r),
            f"{r['torch']['ms']:.4g}",
            f"{r['normkit']['of copy']:.2f}",
            f"{r['torch']['of copy']:.2f}",
            *(f"{1 / r[name]['/torch']:.2f}" if name in r else "-" for name in names),
        ]
        for r in rows
    ]
    net = result.get("resnet50", {})
    steps = [
        [name, f"{v['images/s']:.0f}", f"{1 / v['/torch']:.3f}", str(v["peak bytes of a step"])]
        for name, v in net.items()
        if isinstance(v, dict) and "images/s" in v
    ]
    conformance = result.get("conformance", {"passed": 0, "failures": []})
    wrong = [f["test"] for f in conformance["failures"]]
    wrong += [f"{named(r)}: {', '.join(r['failed'])}" for r in result["rows"] if "failed" in r]
    facts = "\n".join(f"- {key}: {value}" for key, value in result["machine"].items())
    head = [
        "case",
        "torch (ms)",
        "of copy: normkit",
        "torch",
        "times faster: torch again",
        *names[1:],
    ]
    return f"""# GPU benchmark

Written by `benchmarks/render.py` from `benchmarks/results/gpu.json`, which `make bench-gpu`
measures: all contestants interleaved in one process in alternating order, medians of paired ratios,
CUDA events. Large cases find the L2 cold; small ones are called many times in a row. Bytes are
counted once: a forward reads x and writes y (batch norm in training reads x twice), a backward
reads x and dy and writes dx. "Of copy": the share of a copy's rate, {result["copy GB/s"]} GB/s.

{facts}

{conformance["passed"]} conformance tests passed, {len(conformance["failures"])} failed.

## Goals

{gpu_goals(rows)}

## ResNet-50

A training step, {net.get("batch")} images of {net.get("size")}, bfloat16 autocast, channels_last.

{table(["norms", "images/s", "times faster", "peak bytes of a step"], steps)}

## What failed

{table(["what"], [[w] for w in wrong]) if wrong else "Nothing."}

## Every row

{table(head, body)}
"""


def gpu_summary(result: dict[str, Any]) -> str:
    """Return the README's lines on GPUs."""
    rows = [r for r in result["rows"] if "normkit" in r and "torch" in r]
    large, small = of(rows, size="large"), of(rows, size="small")
    machine = result["machine"]
    return (
        f"On NVIDIA GPUs the layers run on Triton kernels. Times faster than torch "
        f"({machine.get('gpu')}, torch {machine['torch']}), geometric mean with "
        f"the slowest\nand the fastest row: large tensors {spread(against(large, 'torch'))}, small "
        f"ones {spread(against(small, 'torch'))}, large\nones against torch.compile "
        f"{spread(against(large, 'compile'))}: [docs/gpu.md](docs/gpu.md)."
    )


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
    return between("benchmark", f"{said}\n\n{table(head, body)}", text)


def engines(result: dict[str, Any]) -> str:
    """Return what docs/scale.md says of the engines' costs."""
    costs = result["microseconds"]
    kinds = list(costs["pipe"])
    reports, saves = 1 / _REPORT_SECONDS, 1 / _CHECKPOINT_SECONDS
    times = {"report": reports - saves, "report and checkpoint": saves}
    ways = {"processes here": "pipe", "Ray": "ray"}
    # Microseconds that one run takes of each second of the process that writes.
    busy = {
        name: sum(times[k] * (costs[way][k] + costs["sqlite"][k]) for k in kinds)
        for name, way in ways.items()
    }
    limit = "; ".join(f"{name} {1e6 / share:,.0f} runs" for name, share in busy.items())
    machine = result["machine"]
    size = result["checkpoint bytes"]
    return "\n\n".join(
        [
            f"Measured by `benchmarks/engines.py` ({machine['cpu']}, {machine['cores']} cores,\n"
            f"torch {machine['torch']}, Ray {machine['ray']}): {result['runs']} runs of "
            f"{result['steps']:,} steps, two at a time,\nmedians of {len(result['rounds'])} "
            "rounds, each of both in turn, starting the workers included.",
            table(
                ["", "seconds"],
                [
                    ["two local processes", f"{result['local seconds']:.1f}"],
                    ["two Ray workers", f"{result['ray seconds']:.1f}"],
                    ["Ray over local, by rounds", f"{result['ray/local']:.2f}"],
                    ["starting a cluster of two nodes", f"{result['cluster seconds']:.1f}"],
                    ["connecting to it", f"{result['connect seconds']:.1f}"],
                ],
            ),
            f"What a report costs on its way, in microseconds; the checkpoint has {size:,} bytes.",
            table(
                ["", *kinds],
                [[way, *(f"{costs[way][kind]:,.0f}" for kind in kinds)] for way in costs],
            ),
            "Seconds until a new process has the data.",
            table(
                ["", "loaded", "from Ray's object store"],
                [
                    [name, *(f"{took[way]:.3f}" for way in ("loaded", "from the store"))]
                    for name, took in result["data seconds"].items()
                ],
            ),
            f"A run reports at most {reports:.0f} times a second, {saves:.0f} of them with a "
            "checkpoint. One driver\ncan receive and write the reports of about so many runs at a "
            f"time: {limit}.",
        ]
    )


def between(mark: str, part: str, text: str) -> str:
    """Return the text with what stands between two marks written anew."""
    part = f"<!-- {mark} -->\n\n{part}\n\n<!-- /{mark} -->"
    marks = rf"<!-- {mark} -->.*<!-- /{mark} -->"
    return re.sub(marks, lambda _: part, text, flags=re.DOTALL)


def readme(result: dict[str, Any], text: str, part: str = "benchmark") -> str:
    """Return the README with its table, or what it says of GPUs, written anew."""
    return between(part, summary(result) if part == "benchmark" else gpu_summary(result), text)


def scale(result: dict[str, Any], text: str) -> str:
    """Return docs/scale.md with its tables written anew."""
    return between("engines", engines(result), text)


if __name__ == "__main__":
    measured = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    target = ROOT / "README.md"
    write(target, readme(measured, target.read_text()))
    write(ROOT / "docs/benchmark.md", full(measured))
    timed = json.loads((ROOT / "benchmarks/results/engines.json").read_text())
    page = ROOT / "docs/scale.md"
    write(page, scale(timed, page.read_text()))
    over_ranks = json.loads((ROOT / "benchmarks/results/sync.json").read_text())
    page = ROOT / "docs/sync.md"
    write(page, synchronized(over_ranks, page.read_text()))
    compiled = json.loads((ROOT / "benchmarks/results/aot.json").read_text())
    write(ROOT / "docs/kernels.md", kernels(compiled))
    on_gpu = ROOT / "benchmarks/results/gpu.json"
    if on_gpu.exists():
        result = json.loads(on_gpu.read_text())
        write(target, readme(result, target.read_text(), "gpu"))
        write(ROOT / "docs/gpu.md", gpu(result))
    if "--no-picture" not in sys.argv:
        for scheme, name in (("light", "benchmark.png"), ("dark", "benchmark-dark.png")):
            picture(measured, ROOT / "docs" / name, scheme)
