"""The processes that torchrun started: they train each run together, a share of a batch each.

Alone, every function here is what one process needs: nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from normkit.layers import BatchNorm
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


def meet() -> None:
    """Wait for the others: from here on the ranks can talk. May be called again."""
    if dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # torchrun keeps its store over a restart, and gloo would find the addresses of the dead in it.
    store, *_ = next(dist.rendezvous("env://"))
    attempt = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=attempt, rank=rank(), world_size=size())


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
        return isinstance(layer, _BatchNorm) and not hasattr(layer, "synchronize")

    model = swap(model, "sync", only=foreign).model
    for layer in model.modules():
        # Those of normkit stay what they are: ghosts and corrections too have ranks.
        if isinstance(layer, _BatchNorm):
            cast(BatchNorm, layer).synchronize()
    return model


def parallel(model: nn.Module) -> nn.Module:
    """Return what to train in the model's place, in DDP; the model stays the one to measure.

    Running averages are rank 0's.
    """
    return DistributedDataParallel(model) if size() > 1 else model


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
