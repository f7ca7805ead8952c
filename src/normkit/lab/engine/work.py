"""The part of every engine that runs where the training is."""

from collections.abc import Iterator

import torch

from normkit.common.errors import LabError, UserCodeError
from normkit.common.user_code import their_traceback
from normkit.lab.training import ranks
from normkit.lab.training.data import Data
from normkit.lab.training.train import Report, Task, train


def work(task: Task, data: Data) -> Iterator[Report]:
    """Train `task` on its number of threads; what goes wrong is a LabError that names the run."""
    torch.set_num_threads(task.config.threads)
    try:
        yield from train(task, data)
    except LabError:
        raise
    except Exception as error:
        what = f"training {task.arm.label}, seed {task.seed}"
        if ranks.lost(error):
            raise LabError(
                f"{what} lost a rank ({str(error).partition('. ')[0]}); the same command goes on "
                "from the last checkpoint, and torchrun gives it by itself with --max-restarts"
            ) from None
        if ":" in task.config.model:
            raise UserCodeError(their_traceback(error, what)) from None
        raise LabError(f"{what} failed with {type(error).__name__}: {error}") from None
