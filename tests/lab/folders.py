"""Reading a finished study folder, independently of the store's own code."""

import sqlite3
from pathlib import Path


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
