"""Studies under torchrun: two processes on gloo train each run together, one is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from folders import checkpoints, curves, steps_told
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normkit
from normkit.common.errors import LabError
from normkit.lab.plan import _pace
from normkit.lab.studies import all_studies
from normkit.lab.training.arms import Arm
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data
from normkit.lab.training.models import check
from normkit.lab.training.ranks import rehearse, synced
from ranks import on_ranks

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
    """Start `normkit study` on two ranks, in an empty folder."""
    started = []

    def start(*words, restarts=0, nodes=1, endpoint="127.0.0.1:0"):
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run"),
                *(f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}"),
                *("--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"),
                *("--local-addr=127.0.0.1", f"--max-restarts={restarts}", "-m", "normkit"),
                *("study", *map(str, words)),
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
    process = torchrun("speed", *SHORT, arms, "--out", "two")
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


# On two nodes only one of the agents counts the restart.
@pytest.mark.parametrize(("stats", "victim", "nodes"), [("sync", 1, 2), ("local", 0, 1)])
def test_a_killed_rank_starts_again_and_the_curves_are_bitwise_the_undisturbed_ones(
    stats, victim, nodes, torchrun, tmp_path
):
    (tmp_path / "dropping.py").write_text(DROPPING)
    words = ("speed", "--model", "dropping:net", "--steps", 300, "--eval-every", 10, "--seeds", 1)
    words = (*words, "--arms", "none,batch", "--stats", stats, "--json", "--out")
    undisturbed = torchrun(*words, "undisturbed")
    _, stderr = undisturbed.communicate(timeout=200)
    assert undisturbed.returncode == 0, stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"nodes": nodes, "endpoint": f"127.0.0.1:{free.getsockname()[1]}"}
    agents = [torchrun(*words, "killed", restarts=1, **where) for _ in range(nodes)]
    while not (saved := checkpoints(tmp_path / "killed")):
        for agent in agents:
            assert agent.poll() is None, agent.communicate()
        time.sleep(0.02)
    (rank,) = [
        child
        for agent in agents
        for child in psutil.Process(agent.pid).children()
        if child.environ().get("RANK") == str(victim)
    ]
    rank.send_signal(signal.SIGKILL)
    stdout, stderr = map("".join, zip(*(a.communicate(timeout=200) for a in agents), strict=True))
    assert [agent.returncode for agent in agents] == [0] * nodes, stderr
    assert "exitcode: -9" in stderr
    assert curves(tmp_path / "killed") == curves(tmp_path / "undisturbed")
    # The second of two, but on another node perhaps.
    (again,) = [part for part in stdout.split('{"event": "begin"')[1:] if '"result"' in part]
    assert json.loads(again.splitlines()[-1])["event"] == "result"
    told = steps_told("\n".join(again.splitlines()[1:]))
    assert all(told[run][0] > step for run, step in saved.items())


def test_a_list_of_the_studies_ends_all_ranks(torchrun):
    process = torchrun("--list")
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    assert stdout.count("norms: ") == 1


def synced_itself(norm):
    hidden = [nn.Linear(64, 8), *([norm(8)] if norm else []), normkit.SyncBatchNorm(8), nn.Tanh()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, 10))


def tried_by_rank_0(rank):
    if rank > 0:
        return None
    study = all_studies()["norms"]
    config = Config(model="test_torchrun:synced_itself", steps=4).resolved("norms")
    data = load_data(config)
    arm = Arm("batch", "batch norm", norm="batch")
    check(data, [(arm, config)])
    return _pace(study, arm, config, data)[0] > 0


def test_rank_0_tries_a_model_with_synced_norms_of_its_own_by_itself():
    assert on_ranks(tried_by_rank_0) == {0: True, 1: None}


class Own(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2.0


def test_a_norm_that_cannot_be_synced_is_named_with_the_remedy():
    model = nn.Sequential(nn.BatchNorm1d(4), Own(4))
    with pytest.raises(LabError, match=r"sync 1 of the model, a Own: .*; give --stats local"):
        synced(model, "sync")
    assert synced(model, "local") is model


def test_a_parameter_without_a_gradient_is_named():
    model = nn.Sequential(nn.Linear(4, 2), nn.Tanh())
    model.register_parameter("idle", nn.Parameter(torch.ones(())))
    x, y = torch.randn(6, 4), torch.zeros(6, dtype=torch.long)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(LabError, match="doesn't use idle, and ranks"):
            rehearse(DistributedDataParallel(model), x, y)
        model.idle.requires_grad_(False)
        rehearse(DistributedDataParallel(model), x, y)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (1, "torchrun --nproc-per-node 4 -m normkit study speed"),
        (
            2,
            "torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --nproc-per-node 2 "
            "-m normkit study speed",
        ),
    ],
)
def test_the_command_starts_as_many_ranks_on_as_many_nodes(nodes, said, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(nodes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(4 // nodes))
    command = Config().resolved("speed").command("speed")
    assert " ".join(command).startswith(said + " --data digits")


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
