"""Studies under torchrun: two processes on gloo train each run together, one is killed."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from folders import curves
from test_run import progress_in

from normkit.lab.config import Config
from normkit.lab.errors import LabError

# Batches of 25 over two ranks are 13 and 12.
SHORT = ("--steps", 40, "--eval-every", 10, "--seeds", 1, "--batch-size", 25, "--arms")
# Slow enough for a checkpoint, which is due after a second, on any machine.
DROPPING = """
import time
from torch import nn

class Slow(nn.Sequential):
    def forward(self, x):
        if self.training:
            time.sleep(0.005)
        return super().forward(x)

def net(norm):
    hidden = [nn.Linear(64, 32), *([norm(32)] if norm else []), nn.Tanh()]
    return Slow(nn.Flatten(), *hidden, nn.Dropout(), nn.Linear(32, 10))
"""


@pytest.fixture
def torchrun(tmp_path):
    """Start `normkit study speed` on two ranks, in an empty folder."""
    started = []

    def start(*words, restarts=0):
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
                *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"),
                *("--local-addr=127.0.0.1", f"--max-restarts={restarts}", "-m", "normkit"),
                *("study", "speed", *map(str, words)),
            ],
            cwd=tmp_path,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_with_synced_statistics_two_ranks_train_like_one_process(torchrun, command, tmp_path):
    arms = "none,batch,batch-x5"
    process = torchrun(*SHORT, arms, "--out", "two")
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert stdout.count("3 runs to train") == stdout.count("Report: two") == 1
    assert command("speed", *SHORT, arms, "--out", "one").returncode == 0
    (two, two_ended), (one, one_ended) = curves(tmp_path / "two"), curves(tmp_path / "one")
    # Loss and percentiles to float32's rounding, carried through 40 steps.
    for (*key, ours), (*theirs, value) in zip(two, one, strict=True):
        assert key == theirs
        counted = "accuracy" in key[2]
        assert ours == pytest.approx(value, rel=1e-3, abs=0.003 if counted else 2e-4), key
    assert [row[:4] for row in two_ended] == [row[:4] for row in one_ended]
    # What was trained by two isn't mixed with what one trains, and a folder from before counts
    # as trained by one.
    refused = command("speed", *SHORT, arms, "--out", "two")
    assert "ranks is 2 there and 1 now; stats is 'sync' there and None now" in refused.stderr


@pytest.mark.parametrize(("stats", "victim"), [("sync", 1), ("local", 0)])
def test_a_killed_rank_starts_again_and_the_curves_are_bitwise_the_undisturbed_ones(
    stats, victim, torchrun, tmp_path
):
    (tmp_path / "dropping.py").write_text(DROPPING)
    words = ("--model", "dropping:net", "--steps", 300, "--eval-every", 10, "--seeds", 1)
    words = (*words, "--arms", "none,batch", "--stats", stats, "--out")
    undisturbed = torchrun(*words, "undisturbed")
    assert undisturbed.communicate(timeout=200) is not None
    assert undisturbed.returncode == 0
    killed = torchrun(*words, "killed", restarts=1)
    while not progress_in(tmp_path / "killed/results.sqlite")[2]:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.02)
    steps = progress_in(tmp_path / "killed/results.sqlite")[0]
    assert 0 < steps < 2 * 300
    (rank,) = [
        child
        for child in psutil.Process(killed.pid).children()
        if child.environ().get("RANK") == str(victim)
    ]
    rank.send_signal(signal.SIGKILL)
    stdout, stderr = killed.communicate(timeout=200)
    assert killed.returncode == 0, stderr
    assert "exitcode: -9" in stderr
    assert stdout.count("Report: killed") == 1
    assert curves(tmp_path / "killed") == curves(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"jobs": 2}, "--jobs 2 under torchrun"),
        ({"engine": "ray"}, "--engine ray under torchrun"),
        ({"stats": "synced"}, "Did you mean 'sync'"),
        ({"stats": "local", "batch_size": 3}, "--batch-size 3 over 2 ranks"),
    ],
)
def test_options_that_do_not_go_together_under_torchrun(options, said, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LabError, match=said):
        Config(**options).resolved("speed")
    assert Config().resolved("speed").stats == "sync"


def test_options_of_torchrun_and_ray_without_them(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for options, said in (
        ({"stats": "local"}, "there is one process"),
        ({"ranks": 2}, "ranks is 2 and torchrun started 1"),
        ({"ray_address": "h:1"}, "--ray-address h:1 is for --engine ray"),
        ({"engine": "rai"}, "Did you mean 'ray'"),
    ):
        with pytest.raises(LabError, match=said):
            Config(**options).resolved("speed")
