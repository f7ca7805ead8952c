"""The results of a study: one SQLite file in an output folder, written as the runs go."""

import fcntl
import json
import os
import platform
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from normkit.common.errors import LabError
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.train import Report

_SCHEMA = """
create table if not exists meta (key text primary key, value text not null);
create table if not exists run (
    id integer primary key,
    arm text not null,
    seed integer not null,
    status text not null default 'running',   -- running, finished, diverged
    step integer not null default 0,
    seconds real not null default 0,          -- training, evaluations apart
    test_accuracy real,
    config text not null,
    versions text not null,
    checkpoint blob,
    checkpoint_step integer not null default 0,
    checkpoint_seconds real not null default 0,
    unique (arm, seed)
);
create table if not exists metric (
    run integer not null references run (id),
    name text not null,
    step integer not null,
    value real,
    primary key (run, name, step)
) without rowid;
create table if not exists found (
    run integer primary key references run (id),
    value text not null                       -- what the study found at the run's end, as JSON
);
"""


@dataclass(frozen=True)
class Run:
    """What is known of one run.

    `curves` maps a measure's name to its steps and values; `found` is what the study's `finish`
    returned, empty for a run that has not finished.
    """

    id: int
    arm: str
    seed: int
    status: str
    step: int
    seconds: float
    test_accuracy: float | None
    curves: dict[str, tuple[list[int], list[float]]]
    found: dict[str, Any] = field(default_factory=dict)


class Store:
    """An output folder, held by this process alone until `close`.

    Raises LabError when the folder can't be written, another process holds it, or it holds the
    results of another study, configuration or data.
    """

    FILE = "results.sqlite"

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # "a" and no writing: the lock file of a folder in use stays as it is.
            self._lock = open(folder / ".lock", "a")  # noqa: SIM115
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LabError(
                    f"--out {folder} is in use by another process; wait until it ends, "
                    "or give another folder with --out"
                ) from None
            with disk_errors(folder):
                self._database = sqlite3.connect(folder / self.FILE, isolation_level=None)
                self._database.execute("pragma journal_mode = wal")
                self._database.execute("pragma synchronous = normal")
                self._database.executescript(_SCHEMA)
                self._claim(identity)
        except BaseException:
            self._lock.close()
            raise

    @classmethod
    def reopen(cls, folder: Path) -> "Store":
        """Open a folder that has results, whatever they are of; raises LabError if it has none."""
        if not (folder / cls.FILE).is_file():
            raise LabError(f"{folder} holds no {cls.FILE}; run a study there first")
        with disk_errors(folder):
            database = sqlite3.connect(folder / cls.FILE)
            row = database.execute("select value from meta where key = 'identity'").fetchone()
            database.close()
        return cls(folder, json.loads(row[0]))

    def identity(self) -> dict[str, Any]:
        """Return the study, configuration and data that the folder's results are of."""
        row = self._database.execute("select value from meta where key = 'identity'").fetchone()
        return dict(json.loads(row[0]))

    def _claim(self, identity: dict[str, Any]) -> None:
        row = self._database.execute("select value from meta where key = 'identity'").fetchone()
        if row is None:
            self._database.execute(
                "insert into meta values ('identity', ?), ('versions', ?)",
                (json.dumps(identity), json.dumps(versions())),
            )
            return
        # An option that is newer than the folder had its default when the results were made.
        defaults = Config().identity()
        held, identity = defaults | json.loads(row[0]), defaults | identity
        differing = [
            f"{key} is {held.get(key)!r} there and {identity.get(key)!r} now"
            for key in sorted(held.keys() | identity.keys())
            if held.get(key) != identity.get(key)
        ]
        if differing:
            raise LabError(
                f"--out {self.folder} holds other results: {'; '.join(differing)}. "
                "Nothing was changed. Give another folder with --out, repeat the options of the "
                "results there to go on with them, or delete the folder to start anew"
            )

    def add(self, arm: Arm, seed: int, config: dict[str, Any]) -> tuple[Run, bytes | None]:
        """Return the run of `arm` and `seed`, made if it is new, and its checkpoint.

        A run that was cut off is set back to its checkpoint.
        """
        with self._transaction() as database:
            database.execute(
                "insert or ignore into run (arm, seed, config, versions) values (?, ?, ?, ?)",
                (arm.name, seed, json.dumps(config), json.dumps(versions())),
            )
            number, status, checkpoint = database.execute(
                "select id, status, checkpoint from run where arm = ? and seed = ?",
                (arm.name, seed),
            ).fetchone()
            if status == "running":
                database.execute(
                    "delete from metric where run = ? and step > "
                    "(select checkpoint_step from run where id = ?)",
                    (number, number),
                )
                database.execute(
                    "update run set step = checkpoint_step, seconds = checkpoint_seconds "
                    "where id = ?",
                    (number,),
                )
        return next(self.runs(number)), checkpoint

    def write(self, report: Report) -> None:
        """Record what a run reported, whole or not at all."""
        with self._transaction() as database:
            database.executemany(
                "insert or replace into metric values (?, ?, ?, ?)",
                [
                    (report.run, name, step, value)
                    for step, row in report.rows.items()
                    for name, value in row.items()
                ],
            )
            database.execute(
                "update run set status = ?, step = ?, seconds = seconds + ?, test_accuracy = ? "
                "where id = ?",
                (report.status, report.step, report.seconds, report.test_accuracy, report.run),
            )
            if report.checkpoint is not None:
                database.execute(
                    "update run set checkpoint = ?, checkpoint_step = step, "
                    "checkpoint_seconds = seconds where id = ?",
                    (report.checkpoint, report.run),
                )
            if report.found is not None:
                database.execute(
                    "insert or replace into found values (?, ?)",
                    (report.run, json.dumps(report.found)),
                )
            if report.status != "running":
                database.execute("update run set checkpoint = null where id = ?", (report.run,))

    def runs(self, number: int | None = None) -> Iterator[Run]:
        """Yield all runs with their curves, or the one of that number."""
        rows = self._database.execute(
            "select id, arm, seed, status, step, seconds, test_accuracy from run "
            "where ?1 is null or id = ?1 order by seed, id",
            (number,),
        ).fetchall()
        for row in rows:
            curves: dict[str, tuple[list[int], list[float]]] = {}
            for name, step, value in self._database.execute(
                "select name, step, value from metric where run = ? order by name, step", (row[0],)
            ):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(step)
                # SQLite keeps NaN as null.
                values.append(float("nan") if value is None else value)
            run, arm, seed, status, step, seconds, accuracy = row
            kept = self._database.execute("select value from found where run = ?", (run,))
            found = kept.fetchone()
            yield Run(
                run,
                arm,
                seed,
                status,
                step,
                seconds,
                accuracy,
                curves,
                json.loads(found[0]) if found else {},
            )

    def spend(self, seconds: float = 0.0) -> float:
        """Add to the wall-clock time that training took in this folder; return the whole."""
        total = "select cast(value as real) from meta where key = 'seconds'"
        with self._transaction() as database:
            database.execute(
                "insert into meta values ('seconds', ?1) "
                "on conflict (key) do update set value = cast(value as real) + ?1",
                (seconds,),
            )
            return float(database.execute(total).fetchone()[0])

    def versions(self) -> list[dict[str, str]]:
        """Return the distinct sets of versions that made the runs."""
        rows = self._database.execute("select distinct versions from run").fetchall()
        return [json.loads(row[0]) for row in rows]

    def close(self) -> None:
        """Let go of the folder."""
        self._database.close()
        self._lock.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with disk_errors(self.folder):
            self._database.execute("begin immediate")
            try:
                yield self._database
                self._database.execute("commit")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("rollback")
                raise


def versions() -> dict[str, str]:
    """Return the versions and the machine that make a run's numbers."""
    found = {name: metadata.version(name) for name in ("normkit", "torch", "numpy")}
    return {**found, "python": platform.python_version(), "machine": platform.machine()}


def write_file(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises LabError where the disk refuses."""
    part = path.with_name(path.name + ".part")
    with disk_errors(path.parent):
        try:
            part.write_text(text, "utf-8")
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise LabError, with the remedies, where the disk refuses."""
    try:
        yield
    except (OSError, sqlite3.DatabaseError) as error:
        raise LabError(
            f"--out {folder} can't be written: {error}. Free some space or make it writable, then "
            "give the same command again: it goes on from the last checkpoint. Or give another "
            "folder with --out"
        ) from None
