"""What synchronizing costs: two processes on gloo, one thread each.

    python benchmarks/sync.py --out benchmarks/results/sync.json

Forward and backward of SyncBatchNorm, of batch norm by each process alone, and of nothing but the
two collectives, with the same messages. Interleaved, in the same order in both processes, which
start each call together; a round's overhead is (synchronized - local) / collectives.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import normkit
from normkit.bench import harness
from normkit.common.files import write
from normkit.runtime.sync import _HEADER, _all_gather

SHAPES = (
    *((2, 64, 56, 56), (2, 512, 14, 14), (2, 2048, 7, 7)),
    *((32, 64, 56, 56), (32, 512, 14, 14), (32, 2048, 7, 7)),
)
"""Of one process: the small batches that synchronizing is for, and large ones."""
RANKS = 2


def contestants(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """A call of each."""
    torch.manual_seed(0)
    x, dy = torch.randn(shape).requires_grad_(), torch.randn(shape)
    channels = shape[1]
    forward = torch.randn(_HEADER + 3 * channels, dtype=torch.float64)
    everyone = forward.new_empty(RANKS * forward.numel())
    backward = torch.zeros(2, channels, dtype=torch.float64)

    def step(layer: torch.nn.Module) -> Callable[[], object]:
        wanted = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x), wanted, dy)

    def collectives() -> None:
        _all_gather(everyone, forward)
        dist.all_reduce(backward)

    return {
        "local": step(normkit.BatchNorm(channels)),
        "synchronized": step(normkit.SyncBatchNorm(channels)),
        "collectives": collectives,
    }


def rounds(steps: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call on this rank, until rank 0 has had enough."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(5):
            step()
    start, more = time.perf_counter(), torch.ones(1)
    while more:
        names = list(steps) if len(times["local"]) % 2 else list(reversed(steps))
        for name in names:
            dist.barrier()
            begin = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - begin)
        more.fill_(time.perf_counter() - start < seconds)
        dist.broadcast(more, 0)
    return times


def row(shape: tuple[int, ...], times: dict[str, list[float]]) -> dict[str, Any]:
    """What is kept of a shape."""
    local, synchronized, collectives = (times[name] for name in times)
    paired = list(zip(local, synchronized, collectives, strict=True))
    return {
        "shape": list(shape),
        "channels": shape[1],
        "rounds": len(paired),
        "local_ms": round(statistics.median(local) * 1e3, 4),
        "collectives_ms": round(statistics.median(collectives) * 1e3, 4),
        "synchronized/local": round(statistics.median(s / a for a, s, _ in paired), 4),
        "overhead/collectives": round(statistics.median((s - a) / c for a, s, c in paired), 4),
    }


def rank_main(rank: int, port: int, seconds: float, results: Any) -> None:
    """One of the two processes; the slower one's time of each call counts."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, RANKS, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    for shape in SHAPES:
        times = rounds(contestants(shape), seconds)
        table = torch.tensor(list(times.values()), dtype=torch.float64)
        dist.all_reduce(table, dist.ReduceOp.MAX)
        if rank == 0:
            results.put(row(shape, dict(zip(times, table.tolist(), strict=True))))
    if rank == 0:
        results.put(harness.machine())
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure, print a line a shape, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each shape (20)")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    store = dist.TCPStore("127.0.0.1", 0, RANKS, is_master=True, wait_for_workers=False)
    ranks = [
        spawn.Process(target=rank_main, args=(rank, store.port, options.seconds, results))
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    rows = []
    for _ in SHAPES:
        rows.append(results.get(timeout=600))
        print(json.dumps(rows[-1]), flush=True)
    machine = results.get(timeout=60)
    for process in ranks:
        process.join()
    if options.out:
        write(options.out, json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
