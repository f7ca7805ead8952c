"""Run a function in two processes that are ranks of one gloo group on 127.0.0.1."""

import multiprocessing
import socket

import torch


def on_ranks(function, *args):
    """{rank: what function(rank, *args) returned, or the error it raised, as text}."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    ranks = [spawn.Process(target=_main, args=(r, port, results, function, args)) for r in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=100)
        assert rank.exitcode == 0
    return dict(results.get(timeout=1) for _ in ranks)


def _main(rank, port, results, function, args):
    torch.set_num_threads(1)
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        results.put((rank, function(rank, *args)))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
