"""The results of a study: one SQLite file in an output folder, written as the runs go."""

import fcntl
import json
import os
import platform
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from normkit.common.errors import LabError
from normkit.common.files import check_writable
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.train import Report

_SCHEMA = (
    "create table if not exists meta (key text primary key, value text not null)",
    """
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
)""",
    """
create table if not exists metric (
    run integer not null references run (id),
    name text not null,
    step integer not null,
    value real,
    primary key (run, name, step)
) without rowid""",
    """
create table if not exists found (
    run integer primary key references run (id),
    value text not null                       -- what the study found at the run's end, as JSON
)""",
)
# SQLite uses none of a database's bytes from here on, so that one of them can stand for its owner.
_OWNER = 2**62
# Where the disk or another program is at fault; any other error of SQLite's is the file's.
_REFUSALS = (
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *(sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED),
)


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

    The owner is who locks a byte of the database itself: as long as that is there, no other process
    gets in, whatever else was removed from the folder.

    Args:
        folder: made where there is none.
        identity: the study, configuration and data; None takes those that the folder has.

    Raises:
        LabError: the folder can't be written, another process holds it, it holds the results of
            another study, configuration or data, its database is damaged; later, the database
            was removed.
    """

    FILE = "results.sqlite"
    REPORT = "report.html"

    def __init__(self, folder: Path, identity: dict[str, Any] | None) -> None:
        self.folder = folder
        path = folder / self.FILE
        self._files: dict[Path, os.stat_result] = {}
        with ExitStack() as opened, disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Closed last: with any handle that it closes, a process gives up all locks of a file.
            lock = opened.enter_context(path.open("ab"))
            self._database = opened.enter_context(
                closing(sqlite3.connect(path, isolation_level=None))
            )
            self._check_sound()
            self._database.execute("pragma journal_mode = wal")
            self._database.execute("pragma synchronous = normal")
            # Tables and claim at once: a kill leaves both or neither.
            with self._transaction() as database:
                # Not earlier: outside of this mode, SQLite gives up all locks after each read.
                self._own(lock)
                for table in _SCHEMA:
                    database.execute(table)
                if identity is not None:
                    self._claim(identity)
            beside = [path.with_name(path.name + end) for end in ("", "-wal", "-shm")]
            self._files = {file: file.stat() for file in beside}
            check_writable(folder / self.REPORT)
            self._opened = opened.pop_all()

    @classmethod
    def reopen(cls, folder: Path) -> "Store":
        """Open a folder that has results, whatever they are of; raises LabError if it has none."""
        if not (folder / cls.FILE).is_file():
            raise LabError(f"{folder} holds no {cls.FILE}; run a study there first")
        return cls(folder, None)

    def identity(self) -> dict[str, Any] | None:
        """Return the study, configuration and data of the folder's results; None before any."""
        with self._reading() as database:
            query = "select value from meta where key = 'identity'"
            row = database.execute(query).fetchone()
            return None if row is None else dict(json.loads(row[0]))

    def _own(self, lock: BinaryIO) -> None:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _OWNER)
        except (BlockingIOError, PermissionError):
            raise LabError(
                f"--out {self.folder} is in use by another process; wait until it ends, "
                "or give another folder with --out"
            ) from None

    def _check_sound(self) -> None:
        """Raise unless the database is empty, or whole and of ours."""
        with self._reading() as database:
            (sound,) = database.execute("pragma quick_check(1)").fetchone()
            if sound != "ok":
                raise sqlite3.DatabaseError(sound)
            names = {name for (name,) in database.execute("select name from sqlite_master")}
            if names and "meta" not in names:
                raise sqlite3.DatabaseError(f"it holds {', '.join(sorted(names))}, no results")

    def _claim(self, identity: dict[str, Any]) -> None:
        there = self.identity()
        if there is None:
            self._database.execute(
                "insert into meta values ('identity', ?), ('versions', ?)",
                (json.dumps(identity), json.dumps(versions())),
            )
            return
        # An option that is newer than the folder had its default when the results were made.
        defaults = Config().identity()
        held, identity = defaults | there, defaults | identity
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
        with self._reading() as database:
            rows = database.execute(
                "select id, arm, seed, status, step, seconds, test_accuracy, value from run "
                "left join found on found.run = id where ?1 is null or id = ?1 order by seed, id",
                (number,),
            ).fetchall()
        for number, arm, seed, status, step, seconds, accuracy, found in rows:
            with self._reading() as database:
                curves: dict[str, tuple[list[int], list[float]]] = {}
                for name, at, value in database.execute(
                    "select name, step, value from metric where run = ? order by name, step",
                    (number,),
                ):
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(at)
                    # SQLite keeps NaN as null.
                    values.append(float("nan") if value is None else value)
                what = json.loads(found) if found else {}
            yield Run(number, arm, seed, status, step, seconds, accuracy, curves, what)

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
        with self._reading() as database:
            rows = database.execute("select distinct versions from run").fetchall()
            return [json.loads(row[0]) for row in rows]

    def close(self) -> None:
        """Let go of the folder."""
        self._opened.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        self._check_there()
        with disk_errors(self.folder):
            try:
                yield self._database
            except (ValueError, TypeError) as error:
                raise sqlite3.DatabaseError(f"a value isn't what was written: {error}") from None

    def _check_there(self) -> None:
        """Raise where what is written goes into files that nobody will find."""
        for file, held in self._files.items():
            try:
                there = os.path.samestat(file.stat(), held)
            except OSError:
                there = False
            if not there:
                raise LabError(
                    f"--out {self.folder}: {file.name} was removed or replaced while the study "
                    "ran, so nothing more can be kept, and it stopped. Put the folder back as it "
                    "was, and the same command goes on from there; without it, it starts anew"
                )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._check_there()
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


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise LabError, with the remedies, where the disk refuses or the database is damaged."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        code = getattr(error, "sqlite_errorcode", None)
        if isinstance(error, OSError) or (code is not None and code & 0xFF in _REFUSALS):
            raise LabError(
                f"--out {folder} can't be written: {error}. Free some space or make it writable, "
                "then give the same command again: it goes on from the last checkpoint. Or give "
                "another folder with --out"
            ) from None
        raise LabError(
            f"{folder / Store.FILE} is damaged, or no file of results: {error}. Put a good copy in "
            "its place and give the same command again; or move it away, and the command starts "
            "anew. Or give another folder with --out"
        ) from None
