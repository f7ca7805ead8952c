"""One run at a time, trained by all ranks of torchrun: rank 0 leads, the others follow."""

from collections.abc import Generator, Sequence

from normkit.common.errors import LabError
from normkit.lab.engine import Again
from normkit.lab.engine.work import work
from normkit.lab.training import ranks
from normkit.lab.training.data import Data
from normkit.lab.training.train import Report, Task


class Together:
    """Rank 0's part: it sends the data and every task to the others and trains along.

    A rank that dies ends them all; torchrun starts them again if told to (`--max-restarts`).
    """

    width = 1

    def run(self, tasks: Sequence[Task], data: Data, again: Again) -> Generator[Report]:
        """Train all tasks and yield their reports."""
        ranks.meet()
        ranks.sent(data)
        for task in tasks:
            ranks.sent(task)
            yield from work(task, data)

    def close(self) -> None:
        """Nothing: the others learn of the end from `dismiss`, or from this process's exit."""


def dismiss() -> None:
    """Let the others end, where there are any and all went well."""
    if ranks.size() > 1:
        ranks.meet()
        ranks.sent(None)
        ranks.part()


def follow() -> None:
    """Train along with rank 0 until it is done; raises LabError, with this rank, where it fails."""
    try:
        ranks.meet()
        while (message := ranks.sent(None)) is not None:
            if isinstance(message, Data):
                data = message
            else:
                for _ in work(message, data):
                    pass
        ranks.part()
    except LabError as error:
        raise LabError(f"rank {ranks.rank()}: {error}") from None
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise LabError(f"rank {ranks.rank()} ends, rank 0 is gone: {reason}") from None
