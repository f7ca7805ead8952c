"""Look at a network in the middle of its training, and leave no trace of having looked."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from normkit.lab.training.arms import Arm
from normkit.lab.training.batches import Batches
from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.tools.restore import preserved


@dataclass(frozen=True)
class Probe:
    """What a study's `probe` and `finish` are given: a run as it stands after `step` steps.

    `batches[step]` is the batch of the step that comes next. The optimizer's rate is
    `optimizer.param_groups[0]["lr"]`. The model is in training mode. All of it may be used and
    changed: it is put back.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    step: int
    data: Data
    config: Config
    arm: Arm
    seed: int


Seen = TypeVar("Seen")


def look(probe: Callable[[Probe], Seen], at: Probe) -> Seen:
    """Return what `probe` sees; the model, the optimizer and the random state stay as they were."""
    with untouched(at.model, at.optimizer):
        at.model.train()
        return probe(at)


@contextmanager
def untouched(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Put model, optimizer and random state back at the end, also after an exception.

    Weights, buffers, gradients, hooks, the mode of each module, the optimizer's state and rates.
    """
    state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    with preserved(model):
        try:
            yield
        finally:
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(before)
