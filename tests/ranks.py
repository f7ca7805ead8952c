"""Run a function in processes that are ranks of one gloo group on 127.0.0.1."""

import datetime
import multiprocessing
import socket
import traceback

import torch


def on_ranks(function, *args, ranks=2):
    """{rank: what function(rank, *args) returned, or the error it raised, as text}."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    processes = [
        spawn.Process(target=_main, args=(rank, ranks, port, results, function, args))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        got = dict(results.get(timeout=200) for _ in processes)
        for process in processes:
            process.join(timeout=60)
            assert process.exitcode == 0
        return got
    finally:
        for process in processes:
            process.kill()


def _main(rank, ranks, port, results, function, args):
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, ranks, rank == 0)
    torch.distributed.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        results.put((rank, function(rank, *args)))
    except Exception as error:
        traceback.print_exc()
        results.put((rank, f"{type(error).__name__}: {error}"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
