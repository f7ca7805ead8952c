"""`--tensorboard`: event files read back by TensorBoard's own reader, against the results."""

import importlib.util
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from folders import curves
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from normkit.common.errors import LabError
from normkit.lab.training.config import Config, read_toml

WORDS = ("speed", "--steps", 3000, "--eval-every", 50, "--seeds", 1, "--jobs", 1, "--arms", "none")


def scalars(folder):
    """Every scalar of a study's event files, by arm, seed, name and step, as TensorBoard reads."""
    found = []
    for own in sorted((folder / "tensorboard").glob("*/seed-*")):
        reader = EventAccumulator(
            str(own), size_guidance={"scalars": 0}, purge_orphaned_data=False
        ).Reload()
        seed = int(own.name.removeprefix("seed-"))
        found += [
            (own.parent.name, seed, name, event.step, event.value)
            for name in reader.Tags()["scalars"]
            for event in reader.Scalars(name)
        ]
    return sorted(found)


def stored(folder):
    """The same of the results; event files hold float32."""
    measured, ended = curves(folder)
    last = [(arm, seed, "test_accuracy", step, value) for arm, seed, _, step, value in ended]
    return sorted((*key, float(np.float32(value))) for *key, value in [*measured, *last])


def test_after_a_kill_every_step_stands_there_once_as_in_the_results(command, tmp_path):
    words = [sys.executable, "-m", "normkit", "study", *map(str, WORDS), "--tensorboard"]
    process = subprocess.Popen([*words, "--out", "out"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            database = sqlite3.connect(f"file:{tmp_path}/out/results.sqlite?mode=ro", uri=True)
            at = database.execute("select max(step), max(checkpoint_step) from run").fetchone()
            database.close()
        except sqlite3.OperationalError:
            at = (0, 0)
        if at[1] and at[0] > at[1]:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    written = list((tmp_path / "out/tensorboard/none/seed-0").iterdir())
    assert written
    ended = command(*WORDS, "--tensorboard", "--out", "out")
    assert ended.returncode == 0, ended.stderr
    found = scalars(tmp_path / "out")
    assert len(found) > 60 * 6
    assert found == stored(tmp_path / "out")
    # What the killed process wrote is gone, not hidden.
    now = list((tmp_path / "out/tensorboard/none/seed-0").iterdir())
    assert len(now) == 1
    assert not set(now) & set(written)


def test_runs_that_ended_without_the_option_are_written_when_it_is_given(command, tmp_path):
    words = ("speed", "--steps", 20, "--seeds", 2, "--jobs", 1, "--arms", "none,batch")
    assert command(*words, "--out", "out").returncode == 0
    assert not (tmp_path / "out/tensorboard").exists()
    ended = command(*words, "--out", "out", "--tensorboard")
    assert ended.returncode == 0, ended.stderr
    assert "--tensorboard" in ended.stdout.splitlines()[0].split()
    assert "runs to train" not in ended.stdout
    assert {key[:2] for key in scalars(tmp_path / "out")} == {
        (arm, seed) for arm in ("none", "batch") for seed in (0, 1)
    }
    assert scalars(tmp_path / "out") == stored(tmp_path / "out")


def test_without_the_package_it_is_said_before_anything_is_trained(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name)
    )
    with pytest.raises(LabError, match=r"pip install 'normkit\[tensorboard\]' brings it"):
        Config(tensorboard=True).resolved("speed")
    Config().resolved("speed")


def test_a_config_file_can_ask_for_it(tmp_path):
    (tmp_path / "c.toml").write_text("tensorboard = true\n")
    assert read_toml(tmp_path / "c.toml") == {"tensorboard": True}
    (tmp_path / "c.toml").write_text("tensorboard = 'yes'\n")
    with pytest.raises(LabError, match="'yes'; it takes a bool"):
        read_toml(tmp_path / "c.toml")
