"""The processes that torchrun started: they train each run together, a share of a batch each.

Alone, every function here is what one process needs: nothing.
"""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from normkit.common.errors import LabError
from normkit.layers import _BatchLayer
from normkit.tools.swap import swap

Sent = TypeVar("Sent")
# Ranks draw different dropout masks; far from the seeds of any run.
_RANK_SEED = 10_000_019


def size() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank() -> int:
    """Return which of them this is; rank 0 holds the results."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def launcher() -> list[str]:
    """Return the command that starts as many; with several nodes, to be given on each of them."""
    nodes = int(os.environ["GROUP_WORLD_SIZE"])
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:PORT"]
    several = ["--nnodes", str(nodes), *rendezvous] if nodes > 1 else []
    return ["torchrun", *several, "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]


def meet() -> None:
    """Wait for the others: from here on the ranks can talk. May be called again.

    Raises LabError where they can't be reached.
    """
    if dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, *_ = next(dist.rendezvous("env://"))
        # torchrun keeps its store over a restart, and gloo would find the dead's addresses in it.
        attempt = dist.PrefixStore(_attempt(store), store)
        dist.init_process_group(backend, store=attempt, rank=rank(), world_size=size())
    except RuntimeError as error:
        raise LabError(
            f"rank {rank()} of {size()} could not meet the others "
            f"({str(error).partition('. ')[0]}); see what they say, then give the same command"
        ) from None


def _attempt(store: dist.Store) -> str:
    """Return a name that only the ranks share that torchrun started together with this one.

    Its own count of restarts differs between machines. Rank 0 answers every rank that it finds in
    the store, also a dead one, until the one that now has that number has thanked.
    """
    name = uuid.uuid4().hex
    if rank() > 0:
        store.set(f"rank {rank()}", name)
        attempt = store.get(f"answer to {name}").decode()
        store.set(f"{attempt} has {rank()}", "")
        return attempt
    for other in range(1, size()):
        while not store.check([f"{name} has {other}"]):
            store.set(f"answer to {store.get(f'rank {other}').decode()}", name)
            time.sleep(0.01)
    return name


def part() -> None:
    """Leave the others, when all are here: one that left earlier might take its last word along."""
    dist.barrier()
    dist.destroy_process_group()


def sent(value: Sent) -> Sent:
    """Return rank 0's value on every rank, by pickle."""
    if size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    return box[0]


def mean(value: Tensor) -> Tensor:
    """Return the mean over the ranks."""
    if size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / size()


def gathered(value: Tensor) -> Tensor:
    """Return the vectors (n,) of all ranks in one of (ranks * n,)."""
    if size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(size())]
    dist.all_gather(parts, value)
    return torch.cat(parts)


def own(value: Tensor) -> Tensor:
    """Return this rank's part of what `gathered` returned."""
    # A copy: torch takes a random state's memory from the start of what it lies in.
    return value.view(size(), -1)[rank()].clone()


def lost(error: Exception) -> bool:
    """Say whether an error means that another rank is gone."""
    return isinstance(error, dist.DistError) or (size() > 1 and "gloo" in str(error))


def seed(value: int) -> None:
    """Set torch's global seed, another on each rank."""
    torch.manual_seed(value + _RANK_SEED * rank())


@contextmanager
def alike() -> Iterator[None]:
    """Draw rank 0's random numbers on every rank."""
    if size() == 1:
        yield
        return
    state = torch.get_rng_state()
    torch.set_rng_state(sent(state))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def synced(model: nn.Module, stats: str | None) -> nn.Module:
    """Return the model with batch norms that take the batches of all ranks, for `stats` "sync"."""
    if stats != "sync":
        return model

    def foreign(name: str, layer: nn.Module) -> bool:
        return isinstance(layer, _BatchNorm) and not isinstance(layer, _BatchLayer)

    report = swap(model, "sync", only=foreign)
    for row in report.rows:
        if row.left:
            raise LabError(
                f"--stats sync can't sync {row.layer} of the model, a {row.was}: "
                f"{row.left}; give --stats local"
            )
    model = report.model
    for layer in model.modules():
        # Those of normkit stay what they are: ghosts and corrections too have ranks.
        if isinstance(layer, _BatchLayer):
            layer.synchronize()
    return model


def alone(model: nn.Module) -> nn.Module:
    """Return the model with no batch norm that waits for other ranks, for one rank to try it."""

    def waits(name: str, layer: nn.Module) -> bool:
        return isinstance(layer, nn.SyncBatchNorm) and not isinstance(layer, _BatchLayer)

    model = swap(model, "batch", only=waits).model
    for layer in model.modules():
        if isinstance(layer, _BatchLayer):
            layer.merge = None
    return model


def parallel(model: nn.Module) -> nn.Module:
    """Return what to train in the model's place, in DDP; the model stays the one to measure.

    Running averages are rank 0's.
    """
    return DistributedDataParallel(model) if size() > 1 else model


def rehearse(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Do a step's forward and backward in DDP.

    Raises LabError for parameters without a gradient: DDP would wait for it in the next step.
    """
    loss(model, x, y).backward()
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    idle = [name.removeprefix("module.") for name, p in parameters if p.grad is None]
    if idle:
        raise LabError(
            f"the model doesn't use {', '.join(idle)}, and ranks train only parameters that all "
            "get a gradient; leave them out of the model, or call requires_grad_(False) on them"
        )


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross entropy on a batch: in DDP, this rank's share of it.

    With B samples in the batch and R ranks it is R / B times the sum over the rank's samples. DDP's
    average over the ranks then is the gradient of the mean over the batch, however it was cut.
    """
    if not isinstance(model, DistributedDataParallel):
        return nn.functional.cross_entropy(model(x), y)
    mine, labels = (part.tensor_split(size())[rank()] for part in (x, y))
    total = nn.functional.cross_entropy(model(mine), labels, reduction="sum")
    return total * (size() / len(x))
