"""Where runs are trained: in processes of this machine, on a Ray cluster, by all ranks together.

Each engine yields the same reports: those of a run in their order, the same numbers in them.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from normkit.lab.training.config import Config
from normkit.lab.training.data import Data
from normkit.lab.training.train import Report, Task

Again = Callable[[Task], Task]
"""Sets a run that was cut off back to its last checkpoint, and returns the task from there."""


class Engine(Protocol):
    """Something that trains."""

    @property
    def width(self) -> int:
        """How many runs it trains at a time."""

    def run(self, tasks: Sequence[Task], data: Data, again: Again) -> Generator[Report]:
        """Train all tasks and yield their reports as they come.

        What was yielded must be recorded before the next report is asked for: a run whose process
        was lost goes on from what `again` finds recorded.

        Raises LabError when training can't go on, UserCodeError when the user's model raises.
        """

    def close(self) -> None:
        """Let go of processes and connections."""


def engine_for(config: Config) -> Engine:
    """Return the engine of a resolved configuration; it connects to nothing before it is used."""
    if config.ranks > 1:
        from normkit.lab.engine.together import Together

        return Together()
    if config.engine == "ray":
        from normkit.lab.engine.cluster import Cluster

        return Cluster(config)
    from normkit.lab.engine.local import Local

    return Local(config.jobs or 1)
