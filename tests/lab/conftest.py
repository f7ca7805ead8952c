"""What the lab's tests share: the command as a user gives it, in a process of its own."""

import importlib.util
import os
import subprocess
import sys

import pytest

# The studies are an extra: without it there is nothing to collect here.
_NEEDS = ("numpy", "scipy", "sklearn", "rich", "plotly", "playwright", "tensorboard")
collect_ignore_glob = [] if all(map(importlib.util.find_spec, _NEEDS)) else ["test_*.py"]


@pytest.fixture
def command(tmp_path):
    """Run `normkit study speed` with more options in an empty folder; return the ended process."""

    def run(*words, **kwargs):
        return subprocess.run(
            [sys.executable, "-m", "normkit", "study", *map(str, words)],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            env={**os.environ, "PYTHONWARNINGS": "error::UserWarning"},
            **kwargs,
        )

    return run
