"""Runs in this process, or in several on this machine."""

import signal
from collections.abc import Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import multiprocessing

from normkit.common.errors import LabError
from normkit.lab.engine import Again
from normkit.lab.engine.work import work
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data, load_data
from normkit.lab.training.train import Report, Task


class Local:
    """Trains up to `width` runs at a time; a process that dies ends the study, with its name."""

    def __init__(self, width: int) -> None:
        self.width = width

    def run(self, tasks: Sequence[Task], data: Data, again: Again) -> Generator[Report]:
        """Train all tasks and yield their reports; nothing is tried again."""
        if self.width == 1 or len(tasks) == 1:
            return _here(tasks, data)
        return _workers(tasks, data, min(self.width, len(tasks)))

    def close(self) -> None:
        """Nothing is left open between two calls of `run`."""


def _here(tasks: Sequence[Task], data: Data) -> Generator[Report]:
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    try:
        for task in tasks:
            yield from work(task, data)
    finally:
        torch.set_rng_state(state)
        torch.set_num_threads(threads)


def _workers(tasks: Sequence[Task], data: Data, jobs: int) -> Generator[Report]:
    context: Any = multiprocessing.get_context("spawn")
    fingerprint = data.fingerprint()
    waiting = list(reversed(tasks))
    doing: dict[Connection, tuple[BaseProcess, Task]] = {}
    processes: list[BaseProcess] = []
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, tasks[0].config, fingerprint), daemon=True
            )
            process.start()
            theirs.close()
            processes.append(process)
            doing[ours] = (process, waiting.pop())
            ours.send(doing[ours][1])
        while doing:
            for ready in wait(list(doing)):
                assert isinstance(ready, Connection)
                process, task = doing[ready]
                try:
                    message = ready.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    raise LabError(
                        f"the process that trained {task.arm.label}, seed {task.seed}, ended with "
                        f"{_exit(process)}; results up to its last checkpoint are kept. Give the "
                        "same command again, with fewer --jobs if memory ran out"
                    ) from None
                if isinstance(message, LabError):
                    raise message
                yield message
                if message.status != "running":
                    if waiting:
                        doing[ready] = (process, waiting.pop())
                        ready.send(doing[ready][1])
                    else:
                        ready.send(None)
                        del doing[ready]
    finally:
        for process in processes:
            if doing:
                process.kill()
            process.join()


def _work(pipe: Connection, config: Config, fingerprint: str) -> None:
    # Ctrl-C reaches the whole group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(config.threads)
    try:
        try:
            data = load_data(config)
            if data.fingerprint() != fingerprint:
                raise LabError(
                    f"data {config.data!r} came out different when it was loaded again; "
                    "make the function give the same samples each time"
                )
        except LabError as error:
            pipe.send(error)
            return
        while (task := pipe.recv()) is not None:
            try:
                for report in work(task, data):
                    pipe.send(report)
            except LabError as error:
                pipe.send(error)
                return
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The parent is gone: what it had written is all that there is to keep.
        return


def _exit(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
