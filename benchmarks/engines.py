"""Time a study's engines: 16 short runs on two Ray workers against two local processes.

    python benchmarks/engines.py
    python benchmarks/render.py --no-picture

Rounds of both, in turn first, each in new processes as a command has them: starting the workers
counts, starting the cluster and connecting to it are stated apart. Then what a report costs on its
way: through a pipe, through Ray (also while a thousand other runs wait), and into SQLite. Run it
alone on the machine.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from torch import multiprocessing

from normkit.bench.harness import machine
from normkit.common.files import write
from normkit.lab.engine import engine_for
from normkit.lab.results.store import Store
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data
from normkit.lab.training.train import Report, Task, train

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/engines.json"
NODES = ROOT / "tests/lab/two_nodes.py"
ARMS = (Arm("none", "no norm"), Arm("batch", "batch norm", norm="batch"))
SEEDS = 8
MESSAGES = 2000
WAITING = 1000


@contextmanager
def cluster() -> Iterator[tuple[str, float]]:
    """Start two nodes of one CPU; yield their address and the seconds that it took."""
    began = time.perf_counter()
    nodes = subprocess.Popen(
        [sys.executable, NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert nodes.stdout is not None
    address = nodes.stdout.readline().split()[0]
    try:
        yield address, time.perf_counter() - began
    finally:
        nodes.communicate(timeout=60)


def timed(config: Config) -> dict[str, float]:
    """Train all runs into a new folder; return the seconds of connecting and of the rest."""
    data = load_data(config)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Store(Path(folder), {})) as store,
        closing(engine_for(config)) as engine,
    ):
        began = time.perf_counter()
        assert engine.width == 2
        connected = time.perf_counter()
        tasks = [
            Task(store.add(arm, seed, {})[0].id, arm, seed, config)
            for seed in range(SEEDS)
            for arm in ARMS
        ]
        for report in engine.run(tasks, data, lambda task: task):
            store.write(report)
        ended = time.perf_counter()
        assert {run.status for run in store.runs()} == {"finished"}
    return {"connect": connected - began, "runs": ended - connected}


def reports(config: Config) -> dict[str, Report]:
    """Return a run's ordinary report, and one with a checkpoint."""
    told = list(train(Task(1, ARMS[1], 0, config), load_data(config)))
    with_checkpoint = [report for report in told if report.checkpoint is not None]
    plain = [r for r in told if r.checkpoint is None and r.status == "running"]
    return {"report": plain[0], "report and checkpoint": with_checkpoint[0]}


def through_pipe(report: Report) -> float:
    """Return the seconds of a report from another process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=send, args=(theirs, report), daemon=True)
    process.start()
    ours.recv()
    began = time.perf_counter()
    for _ in range(MESSAGES):
        ours.recv()
    seconds = time.perf_counter() - began
    process.join()
    return seconds / MESSAGES


def send(pipe: Any, report: Report) -> None:
    """The other end of the pipe."""
    for _ in range(MESSAGES + 1):
        pipe.send(report)


def through_ray(report: Report, waiting: int) -> float:
    """Return the seconds of a report from a Ray task, while other tasks wait for a place."""
    import ray

    def many(report: Report, count: int) -> Iterator[Report]:
        for _ in range(count):
            yield report

    remote = ray.remote(many)
    never = remote.options(resources={"nowhere": 1})
    others = [never.remote(report, 1) for _ in range(waiting)]
    stream = remote.options(_generator_backpressure_num_objects=8).remote(report, MESSAGES + 1)
    ray.get(next(stream))
    began = time.perf_counter()
    for _ in range(MESSAGES):
        (ready,), _ = ray.wait([*others, stream])
        ray.get(next(ready))
    return (time.perf_counter() - began) / MESSAGES


LOADING = """
import sys, time
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data
config = Config(data=sys.argv[1]).resolved("speed")
began = time.perf_counter()
load_data(config)
print(time.perf_counter() - began)
"""


def fetching(name: str) -> dict[str, float]:
    """Return the seconds that a new process takes to load data, and to get them from Ray."""
    import ray

    loaded = subprocess.run(
        [sys.executable, "-c", LOADING, name], capture_output=True, text=True, check=True
    )
    reference = ray.put(load_data(Config(data=name).resolved("speed")))
    began = time.perf_counter()
    ray.get(reference)
    return {"loaded": float(loaded.stdout), "from the store": time.perf_counter() - began}


def into_store(report: Report) -> float:
    """Return the seconds of writing a report."""
    with tempfile.TemporaryDirectory() as folder, closing(Store(Path(folder), {})) as store:
        store.add(ARMS[0], 0, {})
        began = time.perf_counter()
        for _ in range(MESSAGES):
            store.write(report)
        return (time.perf_counter() - began) / MESSAGES


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("two_nodes", NODES)
    assert spec is not None
    assert spec.loader is not None
    nodes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nodes)
    os.environ.update(nodes.ENVIRONMENT)
    with cluster() as (address, seconds):
        local = Config(steps=options.steps, jobs=2).resolved("speed")
        on_ray = Config(steps=options.steps, engine="ray", ray_address=address).resolved("speed")
        rounds = []
        for number in range(options.rounds):
            order = [("local", local), ("ray", on_ray)]
            rounds.append({name: timed(c) for name, c in order[:: 1 if number % 2 else -1]})
            print(rounds[-1], flush=True)
        told = reports(local)
        costs: dict[str, dict[str, float]] = {}
        with closing(engine_for(on_ray)) as engine:
            assert engine.width == 2
            ways: dict[str, Callable[[Report], float]] = {
                "pipe": through_pipe,
                "ray": lambda report: through_ray(report, 0),
                f"ray, {WAITING:,} runs waiting": lambda report: through_ray(report, WAITING),
                "sqlite": into_store,
            }
            for way, measure in ways.items():
                costs[way] = {name: 1e6 * measure(report) for name, report in told.items()}
                print(way, costs[way], flush=True)
            fetched = {name: fetching(name) for name in ("digits", "fashion-mnist")}
        import ray

        result = {
            "machine": {**machine(), "ray": ray.__version__},
            "runs": SEEDS * len(ARMS),
            "steps": options.steps,
            "cluster seconds": seconds,
            "connect seconds": statistics.median(r["ray"]["connect"] for r in rounds),
            "local seconds": statistics.median(r["local"]["runs"] for r in rounds),
            "ray seconds": statistics.median(r["ray"]["runs"] for r in rounds),
            "ray/local": statistics.median(r["ray"]["runs"] / r["local"]["runs"] for r in rounds),
            "rounds": rounds,
            "checkpoint bytes": len(told["report and checkpoint"].checkpoint or b""),
            "microseconds": costs,
            "data seconds": fetched,
        }
    write(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
