"""The benchmark's own promises: interleaved ratios, and figures that stand in committed results."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import torch

from normkit.bench import harness, run, small
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


def test_the_page_on_scale_has_the_committed_results():
    result = json.loads((ROOT / "benchmarks/results/engines.json").read_text())
    page = (ROOT / "docs/scale.md").read_text()
    assert render().scale(result, page) == page


def test_the_table_of_ranks_is_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/sync.json").read_text())
    page = (ROOT / "docs/sync.md").read_text()
    assert render().synchronized(result, page) == page
    assert {row["channels"] for row in result["rows"]} == {64, 512, 2048}


def test_the_table_of_kernels_is_the_committed_result_and_nothing_spills():
    result = json.loads((ROOT / "benchmarks/results/aot.json").read_text())
    assert render().kernels(result) == (ROOT / "docs/kernels.md").read_text()
    assert all(row[t]["spilled"] == 0 for row in result["rows"] for t in ("80", "90", "100"))


def test_the_gpu_benchmark_runs_dry_on_the_cpu_goes_on_and_is_rendered(tmp_path):
    """Every stage, tiny; a second call measures what the first left out."""
    out = tmp_path / "gpu.json"
    script = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--dry", "--out", str(out)]
    subprocess.run(
        [*script, "--seconds", "600", "--only", " LN .*backward|^BN .*bfloat16"], check=True
    )
    first = json.loads(out.read_text())
    again = ["--stages", "table", "--only", "^(BN|RMS|add) .*(bfloat16|6x10)", "--no-warm"]
    subprocess.run([*script, *again, "--compile", "none"], check=True)
    result = json.loads(out.read_text())
    assert "stages failed" not in result
    assert "warming failed" not in result
    assert result["conformance"]["passed"] == 12
    assert result["conformance"]["failures"] == []
    assert {"torch", "torch again", "normkit", "normkit fused"} < set(result["resnet50"])
    assert result["rows"][: len(first["rows"])] == first["rows"]
    rows = {(r["norm"], *r["shape"], r["layout"], r["dtype"], r["mode"]) for r in result["rows"]}
    assert len(rows) == len(result["rows"]) > len(first["rows"]) > 0
    assert [r["failed"] for r in result["rows"] if "failed" in r] == []
    page = render().gpu(result)
    assert all(render().named(row) in page for row in result["rows"])
    readme = (ROOT / "README.md").read_text()
    assert "not yet" not in render().readme(result, readme, "gpu").split("<!-- /gpu -->")[0]


def test_no_gpu_speed_is_claimed_that_was_not_measured():
    said = (ROOT / "README.md").read_text().split("<!-- gpu -->")[1].split("<!-- /gpu -->")[0]
    measured = ROOT / "benchmarks/results/gpu.json"
    if measured.exists():
        result = json.loads(measured.read_text())
        assert said.strip() == render().gpu_summary(result)
        assert render().gpu(result) == (ROOT / "docs/gpu.md").read_text()
    else:
        assert "not yet\nmeasured on a GPU" in said
        assert not (ROOT / "docs/gpu.md").exists()


def gpu():
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks/gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bytes_of_the_gpu_benchmark_are_those_of_the_goals():
    """Row norms read and write once; batch norm in training reads twice; a backward moves three."""
    module = gpu()
    cases = {(c.norm.name, c.mode): c for c in module.table(dry=False)}

    def tensors(name, mode):
        case = cases[name, mode]
        return tuple(n / case.bytes for n in module.moved(case))

    assert tensors("LN", "training") == tensors("GN(8)", "training") == (2, 2)
    assert tensors("BN", "evaluation") == (2, 2)
    assert tensors("BN", "training") == (3, 3)
    assert tensors("BN+add+relu", "training") == (4, 4)
    assert tensors("add+RMS", "training") == (4, 4)
    assert tensors("RMS", "backward") == (3, 3)
    assert tensors("add+RMS", "backward") == (4, 4)
    assert tensors("BN", "backward") == (3, 5)
    assert tensors("BN+add+relu", "backward") == (5, 8)
    assert tensors("BN", "forward+backward") == (6, 8)
    sizes = [math.prod(c.shape) for c in module.table(dry=False)]
    assert all(n >= module.LARGE for n in sizes[: len(sizes) // 2])


def test_a_failing_contestant_is_said_and_the_others_are_timed(monkeypatch):
    module = gpu()
    case = next(c for c in module.table(dry=True) if c.norm.name == "RMS")

    def broken(case):
        raise ImportError("no such kernel")

    def wrong(case):
        return case.norm.torch_layer(case.shape), lambda layer, x: layer(x) * 2

    peers = {"broken": ("torch", broken), "wrong": ("torch", wrong), "absent": ("no_such", wrong)}
    monkeypatch.setattr(module, "PEERS", peers)
    found, failed = module.contestants(case, "cpu", compiled=False)
    assert set(found) == {"torch", "torch again", "normkit", "wrong"}
    assert "no such kernel" in failed["broken"]
    assert failed["wrong"] == "off from torch's by 1 of its norm"


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


def test_small_calls_are_timed_and_summed_up(tmp_path, capsys):
    out, threads = tmp_path / "small.json", torch.get_num_threads()
    run.main(out, "small LN 8x64", 0.01, False)
    rows = json.loads(out.read_text())["small calls"]
    assert [(row["norm"], row["shape"], row["mode"]) for row in rows] == [
        ("LN", [8, 64], mode) for mode in small.MODES
    ]
    assert "small calls, training forward: " in capsys.readouterr().out
    assert torch.get_num_threads() == threads
    forward = next(c for c in small.cases() if c.mode == small.FORWARD and c.norm.name == "add+RMS")
    assert all(step()[0].requires_grad for step in small.steps(forward).values())


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
