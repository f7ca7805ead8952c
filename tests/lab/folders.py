"""Reading a finished study folder, independently of the store's own code."""

import json
import sqlite3
from pathlib import Path


def checkpoints(folder: Path):
    """The step of every checkpoint that is there, by arm and seed, as another process sees it."""
    try:
        database = sqlite3.connect(f"file:{folder / 'results.sqlite'}?mode=ro", uri=True)
        rows = database.execute(
            "select arm, seed, checkpoint_step from run where checkpoint is not null"
        ).fetchall()
        database.close()
    except sqlite3.OperationalError:
        return {}
    return {(arm, seed): step for arm, seed, step in rows}


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
