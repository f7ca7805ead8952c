"""Show a study as it goes: a live table in a terminal, lines elsewhere, JSON lines for machines."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from normkit.lab.results.measures import duration
from normkit.lab.results.verdict import TOO_FEW, Verdict, Word
from normkit.lab.study import Findings
from normkit.lab.training.train import Report, Task

_LINE_SECONDS = 5.0


class Progress(Protocol):
    """What a study tells while it runs; `plan`, `study` and `overview` are for many studies."""

    def plan(self, studies: Sequence[tuple[str, float]], budget: float | None) -> None:
        """These studies can be done, in about so many seconds each."""

    def study(self, name: str) -> None:
        """A study starts."""

    def overview(
        self, verdicts: Sequence[tuple[str, Verdict]], skipped: Mapping[str, str], report: str
    ) -> None:
        """All are done; `skipped` are those left out, with the reasons."""

    def begin(self, tasks: Sequence[Task], ended: int) -> None:
        """Training starts: `tasks` are to do, `ended` runs were done before."""

    def update(self, task: Task, report: Report) -> None:
        """A run reported."""

    def end(self) -> None:
        """Training is over, or was stopped."""

    def result(self, findings: Findings, report: str) -> None:
        """The study was judged; `report` is the path of its report."""


def progress_for(as_json: bool) -> Progress:
    """Return the way to show progress that fits where the output goes."""
    if as_json:
        return JsonLines()
    return Live() if sys.stdout.isatty() else Lines()


class _Clock:
    """Steps done and to do, and the time that is left at the pace so far."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.total = sum(task.config.steps or 0 for task in tasks)
        self.at: dict[int, int] = {}
        self.before: dict[int, int] = {}
        self.started = time.monotonic()

    def move(self, task: Task, report: Report) -> None:
        # A resumed run starts from its checkpoint: those steps cost no time now.
        first = min(report.rows, default=report.step)
        self.before.setdefault(report.run, first if task.checkpoint else 0)
        ended = report.status != "running"
        self.at[report.run] = (task.config.steps or 0) if ended else report.step

    def left(self) -> float:
        """Return the seconds left."""
        done = sum(self.at.values())
        earned = done - sum(self.before.values())
        if earned <= 0:
            return 0.0
        return (time.monotonic() - self.started) / earned * (self.total - done)


def _numbers(report: Report) -> dict[str, float]:
    return report.rows[max(report.rows)] if report.rows else {}


def _said(task: Task, report: Report) -> str:
    row = _numbers(report)
    text = f"{task.arm.name:<16} seed {task.seed:<3} step {report.step:>6}/{task.config.steps}"
    if row:
        text += f"  loss {row['train_loss']:.4f}  accuracy {row['validation_accuracy']:.3f}"
    return text


class _Words:
    """What is said in a terminal and elsewhere alike."""

    def plan(self, studies: Sequence[tuple[str, float]], budget: float | None) -> None:
        """Say what is going to be done and how long it will take."""
        whole = sum(seconds for _, seconds in studies)
        within = "" if budget is None else f" of a budget of {duration(budget)}"
        print(f"{len(studies)} studies, about {duration(whole)}{within}:", flush=True)
        for name, seconds in studies:
            print(f"    {name:<14} {duration(seconds)}", flush=True)

    def study(self, name: str) -> None:
        """Head a study's lines."""
        print(f"\n{name}", flush=True)

    def overview(
        self, verdicts: Sequence[tuple[str, Verdict]], skipped: Mapping[str, str], report: str
    ) -> None:
        """Print the table of claims and verdicts."""
        from rich.console import Console
        from rich.table import Table

        console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
        table = Table("Study", "Claim", "Verdict", box=None, padding=(0, 1), header_style="bold")
        for name, verdict in verdicts:
            table.add_row(name, verdict.claim, verdict.word)
        for name in skipped:
            table.add_row(name, "", "skipped")
        console.print()
        console.print(table)
        for name, reason in skipped.items():
            console.print(f"{name}: {reason}", markup=False)
        _print_end(console, [verdict for _, verdict in verdicts], report)

    def result(self, findings: Findings, report: str) -> None:
        """Print the table and the verdicts."""
        _print_findings(findings, report)


class Lines(_Words):
    """A line when a run ends, and one every few seconds between."""

    def begin(self, tasks: Sequence[Task], ended: int) -> None:
        """Say how much there is to do."""
        self.clock = _Clock(tasks)
        self.total = ended + len(tasks)
        self.ended = ended
        self.last = time.monotonic()
        skipped = f", {ended} done before" if ended else ""
        print(f"{len(tasks)} runs to train{skipped}", flush=True)

    def update(self, task: Task, report: Report) -> None:
        """Print a line for a run that ended, or when it is time."""
        self.clock.move(task, report)
        over = report.status != "running"
        self.ended += over
        if over or time.monotonic() - self.last > _LINE_SECONDS:
            self.last = time.monotonic()
            state = f"  {report.status}" if over else ""
            print(
                f"[{self.ended}/{self.total}] {_said(task, report)}{state}"
                f"  {duration(self.clock.left())} left",
                flush=True,
            )

    def end(self) -> None:
        """Nothing to clear away."""


class Live(_Words):
    """A table that redraws itself: a bar for the whole, a line for each run in progress."""

    def begin(self, tasks: Sequence[Task], ended: int) -> None:
        """Open the live display."""
        from rich.live import Live as RichLive

        self.clock = _Clock(tasks)
        self.total = ended + len(tasks)
        self.ended = ended
        self.current: dict[int, str] = {}
        self.display = RichLive(refresh_per_second=4)
        self.display.start()

    def update(self, task: Task, report: Report) -> None:
        """Redraw."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        self.clock.move(task, report)
        if report.status == "running":
            if report.rows:
                self.current[report.run] = _said(task, report)
        else:
            self.ended += 1
            self.current.pop(report.run, None)
            if report.status == "diverged":
                self.display.console.print(f"{_said(task, report)}  diverged", highlight=False)
        done = sum(self.clock.at.values())
        head = f"{self.ended} of {self.total} runs, {duration(self.clock.left())} left"
        self.display.update(
            Group(
                Text(head, style="bold"),
                ProgressBar(total=max(self.clock.total, 1), completed=done, width=60),
                *(Text(line) for line in self.current.values()),
            )
        )

    def end(self) -> None:
        """Close the live display."""
        if hasattr(self, "display"):
            self.display.update("")
            self.display.stop()


class JsonLines:
    """One JSON object a line: `begin`, `report`, `result`; `plan`, `study`, `overview` of many."""

    def plan(self, studies: Sequence[tuple[str, float]], budget: float | None) -> None:
        """Say what is going to be done and how long it will take."""
        _json_line({"event": "plan", "seconds": dict(studies), "budget": budget})

    def study(self, name: str) -> None:
        """Say which study the next lines are of."""
        _json_line({"event": "study", "study": name})

    def overview(
        self, verdicts: Sequence[tuple[str, Verdict]], skipped: Mapping[str, str], report: str
    ) -> None:
        """Print all verdicts."""
        told = [{"study": name, **vars(verdict)} for name, verdict in verdicts]
        _json_line(
            {"event": "overview", "verdicts": told, "skipped": dict(skipped), "report": report}
        )

    def begin(self, tasks: Sequence[Task], ended: int) -> None:
        """Say how much there is to do."""
        self.clock = _Clock(tasks)
        _json_line({"event": "begin", "runs": len(tasks), "ended_before": ended})

    def update(self, task: Task, report: Report) -> None:
        """Print a run's newest numbers."""
        self.clock.move(task, report)
        _json_line(
            {
                "event": "report",
                "arm": task.arm.name,
                "seed": task.seed,
                "step": report.step,
                "steps": task.config.steps,
                "status": report.status,
                **_numbers(report),
                "test_accuracy": report.test_accuracy,
                "seconds_left": round(self.clock.left(), 1),
            }
        )

    def end(self) -> None:
        """Nothing to clear away."""

    def result(self, findings: Findings, report: str) -> None:
        """Print the verdicts and the table."""
        _json_line(
            {
                "event": "result",
                "headline": findings.headline,
                "verdicts": [vars(verdict) for verdict in findings.verdicts],
                "columns": findings.columns,
                "rows": findings.rows,
                "report": report,
            }
        )


def _json_line(value: dict[str, Any]) -> None:
    # JSON has no NaN and no infinity: a diverged run's numbers are null.
    clean = {
        key: None if isinstance(v, float) and not abs(v) < float("inf") else v
        for key, v in value.items()
    }
    print(json.dumps(clean, ensure_ascii=False, allow_nan=False), flush=True)


def _print_findings(findings: Findings, report: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(*findings.columns, box=None, padding=(0, 1), header_style="bold")
    for row in findings.rows:
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print()
    for verdict in findings.verdicts:
        console.print(f"[bold]{verdict.claim}: {verdict.word}.[/bold] ", end="")
        console.print(verdict.because, markup=False)
    _print_end(console, findings.verdicts, report)


def _print_end(console: Any, verdicts: Sequence[Verdict], report: str) -> None:
    if any(verdict.word == Word.RANGE_ONLY for verdict in verdicts):
        console.print(f"\n{TOO_FEW}", markup=False)
    console.print(f"\nReport: {report}", markup=False, soft_wrap=True)
