"""The folder of results under attack: kills, damage, what vanishes, who else wants in."""

import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import warnings

import pytest

from normkit.common.errors import LabError
from normkit.lab.results import store as module
from normkit.lab.results.store import Store
from normkit.lab.training.arms import Arm
from normkit.lab.training.train import Report

IDENTITY = {"study": "speed", "data_sha256": "abc"}
BATCH = Arm("batch", "batch norm", "batch")


def report(run, step=10):
    return Report(run, step, {step: {"validation_loss": 1.5}})


def used(folder):
    """A folder in use, with a run that has reported once."""
    store = Store(folder, IDENTITY)
    run, _ = store.add(BATCH, 0, {})
    store.write(report(run.id))
    return store, run.id


def killed_at_line(number, folder):
    """Make a store in a process that is killed before that line of the module; False: it ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which this child uses not
        child = os.fork()
    if child == 0:
        lines = itertools.count()

        def trace(frame, event, _):
            if frame.f_code.co_filename != module.__file__:
                return None
            if event == "line" and next(lines) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            Store(folder, IDENTITY)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_every_state_that_a_kill_leaves_is_taken_up_again(tmp_path):
    for number in itertools.count():
        folder = tmp_path / str(number)
        killed = killed_at_line(number, folder)
        if (folder / Store.FILE).is_file():
            Store.reopen(folder).close()
        store, run = used(folder)
        assert store.identity() == IDENTITY
        assert [(r.id, r.step) for r in store.runs()] == [(run, 10)]
        store.close()
        if not killed:
            break
    assert number > 50


@pytest.mark.parametrize(
    "statements",
    [
        (),
        ("pragma journal_mode = wal",),
        ("create table meta (key text primary key, value text not null)",),
    ],
    ids=["empty file", "a header alone", "a table without identity"],
)
def test_a_database_that_was_never_claimed_is_begun(statements, tmp_path):
    (tmp_path / Store.FILE).touch()
    with sqlite3.connect(tmp_path / Store.FILE) as database:
        for statement in statements:
            database.execute(statement)
    database.close()
    store, run = used(tmp_path)
    assert [r.id for r in store.runs()] == [run]
    store.close()


@pytest.mark.parametrize(
    "attack",
    [
        lambda folder: (folder / Store.FILE).unlink(),
        lambda folder: (folder / f"{Store.FILE}-wal").unlink(),
        shutil.rmtree,
        lambda folder: folder.rename(folder.with_name("moved")),
        lambda folder: shutil.copy(folder / Store.FILE, folder / "c").replace(folder / Store.FILE),
    ],
    ids=["removed", "its log removed", "folder removed", "folder moved", "replaced by a copy"],
)
def test_results_that_vanish_stop_the_study(attack, tmp_path):
    folder = tmp_path / "out"
    store, run = used(folder)
    attack(folder)
    for act in (lambda: store.write(report(run, 20)), store.spend, lambda: list(store.runs())):
        with pytest.raises(LabError, match="was removed or replaced while the study ran"):
            act()
    store.close()
    moved = tmp_path / "moved"
    again = Store(moved if moved.exists() else folder, IDENTITY)
    assert [r.step for r in again.runs()] in ([], [10])
    again.close()


SECOND = """
import sys
from pathlib import Path
from normkit.common.errors import LabError
from normkit.lab.results.store import Store
try:
    Store(Path(sys.argv[1]), {"study": "speed", "data_sha256": "abc"})
except LabError as error:
    sys.exit(str(error))
"""


def test_no_second_command_gets_in_whatever_is_removed_beside_the_database(tmp_path):
    store, run = used(tmp_path)
    for other in tmp_path.iterdir():
        if not other.name.startswith(Store.FILE):
            other.unlink()
    second = [sys.executable, "-c", SECOND, str(tmp_path)]
    refused = subprocess.run(second, capture_output=True, text=True)
    assert "is in use by another process" in refused.stderr
    store.write(report(run, 20))
    store.close()
    used(tmp_path)[0].close()


def contents(folder):
    store, _ = used(folder)
    with sqlite3.connect(folder / Store.FILE) as database:
        database.execute("pragma wal_checkpoint(truncate)")
    database.close()
    store.close()
    return (folder / Store.FILE).read_bytes()


def test_a_damaged_database_is_called_that_and_not_a_full_disk(tmp_path):
    whole = contents(tmp_path)
    path = tmp_path / Store.FILE
    for damaged in (
        b"these are not results" * 99,
        whole[: len(whole) // 2],
        whole[:4096] + os.urandom(len(whole) - 4096),
        whole.replace(b'{"study"', b'{"study\xff'),
    ):
        path.write_bytes(damaged)
        with pytest.raises(LabError, match="is damaged, or no file of results") as caught:
            Store(tmp_path, IDENTITY)
        assert "can't be written" not in str(caught.value)
        assert "move it away" in str(caught.value)
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("create table recipes (name text)")
    database.close()
    theirs = path.read_bytes()
    with pytest.raises(LabError, match="it holds recipes, no results"):
        Store(tmp_path, IDENTITY)
    assert path.read_bytes() == theirs


def test_any_flipped_byte_is_read_over_or_told(tmp_path):
    whole = contents(tmp_path)
    for position in range(0, len(whole), 97):
        flipped = bytearray(whole)
        flipped[position] ^= 0xFF
        (tmp_path / Store.FILE).write_bytes(flipped)
        try:
            store = Store.reopen(tmp_path)
        except LabError:
            continue
        try:
            store.identity(), store.versions(), list(store.runs())
        except LabError:
            pass
        finally:
            store.close()


def test_a_report_that_could_not_be_written_is_told_before_the_training(tmp_path):
    (tmp_path / Store.REPORT).mkdir()
    with pytest.raises(LabError, match=r"report\.html: it is a folder"):
        Store(tmp_path, IDENTITY)
