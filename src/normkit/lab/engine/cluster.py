"""Runs on a Ray cluster: each a task of its own, its reports streamed to this process."""

import functools
import logging
import os
import socket
import sys
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from normkit.common.errors import LabError
from normkit.common.user_code import fingerprint, is_reference, sources
from normkit.lab.engine import Again
from normkit.lab.engine.work import work
from normkit.lab.results.store import versions
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.lab.training.train import Report, Task

# A worker trains on while so many of its reports wait for this process, then it waits too.
_AHEAD = 8
# A run that is lost so often without a new checkpoint in between is at fault itself.
_LOSSES = 3
_CONNECT_SECONDS = 5
_QUIET_SECONDS = 10.0
# Read by Ray when it is imported, for this process alone. Without them an address where something
# else than Ray listens takes a quarter of an hour to fail.
_SETTINGS = {
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_py_gcs_connect_timeout_s": str(_CONNECT_SECONDS),
    "RAY_gcs_rpc_server_connect_timeout_s": str(_CONNECT_SECONDS),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Cluster:
    """Trains on whatever nodes have room; a run whose process is lost goes on on another.

    The data go into Ray's object store once, so that nodes need no files and load nothing. The
    user's own modules are shipped. normkit, torch and NumPy must be installed on every node, in
    the versions that they have here.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.ray: Any = None
        self._set: dict[str, str] = {}

    @property
    def width(self) -> int:
        """How many runs the nodes that are there now have room for."""
        self._connect()
        return min(max(self._room(), 1), self.config.jobs or sys.maxsize)

    def run(self, tasks: Sequence[Task], data: Data, again: Again) -> Generator[Report]:
        """Train all tasks and yield their reports, those of a run in order.

        A run that is lost with its worker or node is told on stderr and goes on from `again`.
        """
        self._connect()
        ray = self.ray
        shared = [ray.put(data)]
        train = ray.remote(_train).options(
            **self._needs(), max_retries=0, _generator_backpressure_num_objects=_AHEAD
        )
        waiting = deque(tasks)
        doing: dict[Any, Task] = {}
        losses: Counter[int] = Counter()
        warned = False
        while waiting or doing:
            while waiting and len(doing) < (self.config.jobs or len(tasks)):
                task = waiting.popleft()
                doing[train.remote(task, shared, _versions(task.config))] = task
            ready, _ = ray.wait(list(doing), timeout=_QUIET_SECONDS)
            if not ready:
                if not self._room() and not warned:
                    warned = True
                    _say(f"no node of the cluster has {self._words()} for a run; waiting for one")
                continue
            task = doing.pop(ready[0])
            try:
                message = ray.get(next(ready[0]))
            except ray.exceptions.RayError as error:
                losses[task.run] += 1
                self._check_lost(task, error, losses[task.run])
                waiting.appendleft(again(task))
                continue
            if isinstance(message, LabError):
                raise message
            if message.checkpoint is not None:
                losses[task.run] = 0
            yield message
            if message.status == "running":
                # Behind the others: Ray looks for one that is ready from the front.
                doing[ready[0]] = task

    def close(self) -> None:
        """Leave the cluster; it ends what still runs for this process."""
        if self.ray is not None:
            self.ray._private.worker._worker_logs_enabled = True
            self.ray.shutdown()
            self.ray = None
        for name in self._set:
            os.environ.pop(name, None)
        self._set = {}

    def _connect(self) -> None:
        if self.ray is not None:
            return
        self._set = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
        os.environ |= self._set
        try:
            import ray
        except ImportError as error:
            raise LabError(
                f"--engine ray needs Ray ({error}); pip install 'normkit[ray]'"
            ) from None
        if ray.is_initialized():
            raise LabError(
                "this process is connected to Ray already, and a study ships its modules with a "
                "connection of its own; call ray.shutdown() first"
            )
        address = self.config.ray_address or os.environ.get("RAY_ADDRESS") or "auto"
        if address != "auto":
            _check_reachable(address, ray.util.get_node_ip_address)
        shipped = sources(_references(self.config))
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"py_modules": shipped} if shipped else None,
            )
        except Exception as error:
            ray.shutdown()
            raise LabError(_refusal(address, str(error))) from None
        self.ray = ray
        # Whatever is asked of it, Ray prints a node's death to stdout, where JSON lines may go.
        ray._private.worker._worker_logs_enabled = False

    def _needs(self) -> dict[str, int]:
        gpus = 1 if self.config.device.startswith("cuda") else 0
        return {"num_cpus": self.config.threads, "num_gpus": gpus}

    def _words(self) -> str:
        gpu = " and a GPU" if self._needs()["num_gpus"] else ""
        return f"{self.config.threads} CPU{'s' * (self.config.threads > 1)}{gpu}"

    def _room(self) -> int:
        """Return how many runs fit on the nodes that are alive, were they idle."""
        needs = {"CPU": self._needs()["num_cpus"], "GPU": self._needs()["num_gpus"]}
        return sum(
            min(int(node["Resources"].get(kind, 0) // n) for kind, n in needs.items() if n)
            for node in self.ray.nodes()
            if node["Alive"]
        )

    def _check_lost(self, task: Task, error: Exception, losses: int) -> None:
        """Say that the run was lost and will be tried again, or raise where that can't help."""
        exceptions = self.ray.exceptions
        run = f"{task.arm.label}, seed {task.seed}"
        reason = " ".join(str(error).split())
        if not isinstance(
            error,
            exceptions.WorkerCrashedError
            | exceptions.NodeDiedError
            | exceptions.ObjectLostError
            | exceptions.OutOfMemoryError,
        ):
            raise LabError(
                f"a worker could not begin {run}: {reason[:1000]}. Every node needs normkit, "
                "torch and NumPy in the versions that this process has, and whatever else the "
                "model and the data import"
            ) from None
        kind = type(error).__name__
        if losses >= _LOSSES:
            raise LabError(
                f"{run} was lost {losses} times without a checkpoint in between, last by {kind} "
                f"({reason[:500]}); results up to its last checkpoint are kept. Give the same "
                "command again, on nodes with more memory if that ran out"
            ) from None
        _say(f"{run} was lost ({kind}); it goes on elsewhere from its last checkpoint")


def _references(config: Config) -> list[str]:
    return [name for name in (config.model, config.data) if is_reference(name)]


def _versions(config: Config) -> dict[str, str]:
    files = {name: fingerprint(name, "module")[:12] for name in _references(config)}
    return {**versions(), **files}


def _train(task: Task, shared: list[Any], ours: dict[str, str]) -> Iterator[Report | LabError]:
    """Train in a worker process."""
    node = f"node {socket.gethostname()}"
    try:
        try:
            theirs = _versions(task.config)
        except LabError as error:
            raise LabError(f"{node} lacks what the study names: {error}") from None
        if theirs != ours:
            differing = [
                f"{name} {theirs.get(name)} there and {version} here"
                for name, version in ours.items()
                if theirs.get(name) != version
            ]
            raise LabError(
                f"{node} has other versions: {', '.join(differing)}; the same "
                "numbers come from the same versions only. Install these there"
            )
        yield from work(task, _fetched(shared[0]))
    except LabError as error:
        yield error


@functools.lru_cache(maxsize=1)
def _fetched(reference: Any) -> Data:
    # In a list, Ray passes the reference and not a copy a task: a process fetches the data once.
    import ray

    data: Data = ray.get(reference)
    return data


def _check_reachable(address: str, own_ip: Any) -> None:
    """Raise unless something listens there: Ray itself would try for many minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in address:
        raise LabError(
            f"--ray-address {address!r} is not host:port; give what `ray start` printed on the "
            "head node, with the port of its GCS (6379 by default), and run this command on a "
            "node of the cluster"
        )
    # As Ray does: a cluster listens on the machine's own address, not on the loopback.
    host = own_ip() if host in ("localhost", "127.0.0.1", "::1") else host.strip("[]")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise LabError(
            f"--ray-address {address}: no Ray cluster can be reached at {host}:{port} ({error}); "
            "start one with `ray start --head`, or give the address of one that runs"
        ) from None


def _refusal(address: str, reason: str) -> str:
    said = " ".join(reason.split())
    if "Version mismatch" in said:
        return (
            f"--ray-address {address} is a cluster of another version. {said}. "
            "Install the cluster's Ray and Python here, or these on all of its nodes"
        )
    return (
        f"--ray-address {address}: {said[:1000]}. This command must run on a node of a running "
        "cluster: `ray start --address=HOST:PORT --num-cpus=0` makes this machine one that "
        "doesn't train"
    )


def _say(text: str) -> None:
    print(f"normkit: {text}", file=sys.stderr, flush=True)
