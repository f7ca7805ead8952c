"""The benchmark's own promises: interleaved ratios, and figures that stand in committed results."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

from normkit.bench import harness
from normkit.bench.cases import cases

ROOT = Path(__file__).parent.parent


def render():
    spec = importlib.util.spec_from_file_location("render", ROOT / "benchmarks/render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_figure_is_the_committed_results():
    result = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert render().readme(result, readme) == readme
    assert render().full(result) == (ROOT / "docs/benchmark.md").read_text()
    assert {(r["norm"], tuple(r["shape"]), r["layout"], r["mode"]) for r in result["rows"]} == {
        (c.norm.name, c.shape, c.layout, c.mode) for c in cases()
    }


def test_the_table_of_ranks_is_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/sync.json").read_text())
    page = (ROOT / "docs/sync.md").read_text()
    assert render().synchronized(result, page) == page
    assert {row["channels"] for row in result["rows"]} == {64, 512, 2048}


def test_the_table_of_kernels_is_the_committed_result_and_nothing_spills():
    result = json.loads((ROOT / "benchmarks/results/aot.json").read_text())
    assert render().kernels(result) == (ROOT / "docs/kernels.md").read_text()
    assert all(row[t]["spilled"] == 0 for row in result["rows"] for t in ("80", "90", "100"))


def test_the_gpu_benchmarks_plumbing_runs_on_the_cpu(tmp_path):
    out = tmp_path / "gpu.json"
    script = [sys.executable, str(ROOT / "benchmarks/gpu.py")]
    subprocess.run([*script, "--dry", "--out", str(out), "--seconds", "5"], check=True)
    result = json.loads(out.read_text())
    assert result["rows"][0]["normkit"]["GB/s"] > 0
    assert set(result["resnet50"]) == {"torch", "normkit"}


def test_contestants_take_turns_in_alternating_order():
    order = []
    found = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}
    times = harness.measure(found, seconds=0.0, least=4, most=4)
    assert {len(t) for t in times.values()} == {4}
    rounds = [
        name for name, previous in zip(order, [None, *order], strict=False) if name != previous
    ]
    assert "".join(rounds).endswith("cbabcbabc"), "each round turns around where the last one ended"


def test_ratios_are_paired_by_round():
    times = {"ours": [1.0, 20.0, 3.0], "theirs": [2.0, 10.0, 6.0]}
    assert harness.ratio(times, "ours", "theirs") == 0.5


def test_the_contestants_compute_the_same():
    """A benchmark of two different things says nothing."""
    seen = set()
    for case in cases():
        small = case.shape in ((64, 512, 7, 7), (60, 100))
        if not small or case.layout != "contiguous" or (case.norm.name, case.mode) in seen:
            continue
        seen.add((case.norm.name, case.mode))
        steps = harness.steps(case, compiled=False)
        ours, theirs = steps["normkit"](), steps["torch"]()
        flat = [x if isinstance(x, tuple) else (x,) for x in (ours, theirs)]
        for a, b in zip(*flat, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2)
