"""The curves of a study's runs as event files for TensorBoard, beside the results."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from normkit.lab.results.store import Run, disk_errors
from normkit.lab.training.train import Report

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_SECONDS = 10


class Events:
    """Event files of runs: a folder `arm/seed-N` of scalars for each, named as its curves.

    They follow the store: where a run starts, goes on or had ended before, its folder is made anew
    from its stored curves, so that each step stands there once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._runs: dict[int, Run] = {}
        self._writers: dict[int, SummaryWriter] = {}

    def begin(self, run: Run) -> None:
        """Take a run up as it is stored: one that has ended is written now, others as they go."""
        if run.id in self._runs:
            return
        self._runs[run.id] = run
        if run.status != "running":
            with disk_errors(self.folder):
                self._open(run)
                self._end(run.id, run.step, run.test_accuracy)

    def again(self, run: Run) -> None:
        """Take up a run that was set back to its checkpoint."""
        self._runs[run.id] = run
        if run.id in self._writers:
            with disk_errors(self.folder):
                self._writers.pop(run.id).close()

    def write(self, report: Report) -> None:
        """Add what a run reported."""
        with disk_errors(self.folder):
            if report.run not in self._writers:
                self._open(self._runs[report.run])
            for step, row in report.rows.items():
                self._add(report.run, row, step)
            if report.status != "running":
                self._end(report.run, report.step, report.test_accuracy)

    def close(self) -> None:
        """Write out and close what is open."""
        with disk_errors(self.folder):
            while self._writers:
                self._writers.popitem()[1].close()

    def _open(self, run: Run) -> None:
        # Imported for those alone who asked for it: it is slow, and a package of its own.
        from torch.utils.tensorboard import SummaryWriter

        own = self.folder / run.arm / f"seed-{run.seed}"
        shutil.rmtree(own, ignore_errors=True)
        self._writers[run.id] = SummaryWriter(str(own), flush_secs=_FLUSH_SECONDS)
        for name, (steps, values) in run.curves.items():
            for step, value in zip(steps, values, strict=True):
                self._add(run.id, {name: value}, step)

    def _add(self, run: int, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self._writers[run].add_scalar(name, value, step)

    def _end(self, run: int, step: int, test_accuracy: float | None) -> None:
        if test_accuracy is not None:
            self._add(run, {"test_accuracy": test_accuracy}, step)
        self._writers.pop(run).close()
