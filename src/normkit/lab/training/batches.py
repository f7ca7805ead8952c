"""The batch of every step."""

import torch
from torch import Tensor

from normkit.lab.training.data import Part


class Batches:
    """The batch of every step: one permutation an epoch, from the seed and the epoch alone."""

    def __init__(self, part: Part, size: int, seed: int) -> None:
        self.x, self.y = part
        self.size = size
        self.seed = seed
        # A last batch of few samples would change what batch norm sees: it is left out.
        self.per_epoch = len(self.x) // size
        self.epoch = -1
        self.order: tuple[Tensor, ...] = ()

    def __getitem__(self, step: int) -> Part:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.x), generator=generator).to(self.x.device)
            self.order, self.epoch = order.split(self.size), epoch
        index = self.order[place]
        return self.x.index_select(0, index), self.y.index_select(0, index)
