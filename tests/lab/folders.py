"""Reading a finished study folder, independently of the store's own code."""

import json
import sqlite3
from pathlib import Path


def rows_in(database: Path, query: str):
    """What a query finds, as another process sees it; nothing where there is nothing yet."""
    try:
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
        found = connection.execute(query).fetchall()
        connection.close()
    except sqlite3.OperationalError:
        return []
    return found


def checkpoints(folder: Path):
    """The step of every checkpoint that is there, by arm and seed, as another process sees it."""
    query = "select arm, seed, checkpoint_step from run where checkpoint is not null"
    return {(arm, seed): step for arm, seed, step in rows_in(folder / "results.sqlite", query)}


def steps_told(lines: str):
    """The steps that a command with --json reported, by arm and seed, in order."""
    told = {}
    for line in map(json.loads, lines.splitlines()):
        if line["event"] == "report":
            told.setdefault((line["arm"], line["seed"]), []).append(line["step"])
    return told


def curves(folder: Path):
    """Every measurement of a folder, by arm, seed, name and step, and each run's outcome."""
    database = sqlite3.connect(folder / "results.sqlite")
    metrics = database.execute(
        "select arm, seed, name, metric.step, value from metric join run on run.id = run "
        "order by 1, 2, 3, 4"
    ).fetchall()
    outcomes = database.execute(
        "select arm, seed, status, step, test_accuracy from run order by 1, 2"
    ).fetchall()
    database.close()
    return metrics, outcomes
