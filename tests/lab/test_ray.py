"""Studies on a real Ray cluster of two nodes, with nodes and drivers killed in the middle."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import ray
import torch
from folders import checkpoints, curves, steps_told
from two_nodes import ENVIRONMENT

from normkit.common.errors import LabError
from normkit.lab.engine.cluster import Cluster
from normkit.lab.training.config import Config

LONG = ("--steps", 1500, "--eval-every", 50, "--seeds", 2, "--arms", "none,batch", "--json")
MODULES = {
    "mine.py": "import parts\n\ndef net(norm):\n    return parts.network(norm)\n",
    # The modules are on the driver's path alone: elsewhere they can only have been shipped. Slow
    # enough for a checkpoint, which is due after a second, on any machine.
    "parts.py": """
import os
import time
from torch import nn

class Slow(nn.Sequential):
    def forward(self, x):
        if self.training:
            time.sleep(0.001)
        return super().forward(x)

def network(norm):
    assert "DRIVER" in os.environ or "py_modules_files" in __file__
    hidden = [nn.Linear(64, 32), *([norm(32)] if norm else []), nn.Tanh()]
    return Slow(nn.Flatten(), *hidden, nn.Dropout(0.1), nn.Linear(32, 10))
""",
}


class Study:
    """`normkit study speed` in a folder, on the cluster or here."""

    def __init__(self, folder, address, raylet):
        self.folder, self.address, self.raylet = folder, address, raylet
        self.on_ray = ("--engine", "ray", "--ray-address", address)
        (folder / "modules").mkdir()
        for name, text in MODULES.items():
            (folder / "modules" / name).write_text(text)

    def start(self, *words, program=("-m", "normkit")):
        path = os.pathsep.join([str(self.folder / "modules"), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, *program, "study", "speed", *map(str, words)],
            cwd=self.folder,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "DRIVER": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def end(self, *words, **kwargs):
        process = self.start(*words, **kwargs)
        stdout, stderr = process.communicate(timeout=250)
        return process.returncode, stdout, stderr

    def wait_for_checkpoints(self, process, out, count):
        while len(found := checkpoints(self.folder / out)) < count:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return found


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    nodes = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("two_nodes.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    address, raylet = nodes.stdout.readline().split()
    try:
        yield Study(tmp_path_factory.mktemp("ray"), address, int(raylet))
    finally:
        nodes.communicate(timeout=60)


@pytest.fixture(scope="module")
def unbroken(study):
    """The curves of the local engine."""
    code, _, stderr = study.end(*LONG, "--model", "mine:net", "--out", "local")
    assert code == 0, stderr
    return curves(study.folder / "local")


def test_a_killed_driver_goes_on_and_ends_with_the_curves_of_the_local_engine(study, unbroken):
    words = (*LONG, "--model", "mine:net", *study.on_ray, "--out", "driver")
    process = study.start(*words)
    saved = study.wait_for_checkpoints(process, "driver", 2)
    process.kill()
    process.communicate()
    code, stdout, stderr = study.end(*words)
    assert (code, stderr) == (0, "")
    assert json.loads(stdout.splitlines()[0])["runs"] == 4
    assert all(steps_told(stdout)[run][0] > step for run, step in saved.items())
    assert curves(study.folder / "driver") == unbroken


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("ray", "is a cluster of another version"),
        ("torch", f"torch {torch.__version__} there and 9 here"),
        ("module", "lacks what the study names: module 'mine:net': no module 'mine' in "),
    ],
)
def test_workers_that_differ_are_refused(lacking, said, study):
    driver = {
        "ray": "import ray; ray.__version__ = '2.9.9'",
        "torch": "import normkit.lab.engine.cluster as c, normkit.lab.results.store as s; "
        "c.versions = lambda: {**s.versions(), 'torch': '9'}",
        "module": "import normkit.lab.engine.cluster as c; c.sources = lambda names: []",
    }
    program = (
        "-c",
        f"{driver[lacking]}; import normkit.cli.main, sys; sys.exit(normkit.cli.main.main())",
    )
    words = ("--model", "mine:net", "--steps", 20, "--seeds", 1, "--out", lacking)
    code, _, stderr = study.end(*words, *study.on_ray, program=program)
    assert code == 2
    assert said in stderr
    assert "Traceback" not in stderr


def test_a_model_that_kills_its_worker_is_given_up_and_named(study):
    (study.folder / "modules/deadly.py").write_text(
        "import mine, os, signal\n\ndef net(norm):\n"
        "    if 'DRIVER' not in os.environ:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return mine.net(norm)\n"
    )
    code, _, stderr = study.end(
        "--steps", 20, "--seeds", 1, "--arms", "none", "--model", "deadly:net", *study.on_ray
    )
    assert code == 2
    assert stderr.count("no norm, seed 0 was lost (WorkerCrashedError)") == 2
    assert "was lost 3 times without a checkpoint in between" in stderr


def test_settings_of_ray_are_gone_with_the_engine(monkeypatch):
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "2")
    before = dict(os.environ)
    # Nothing listens on port 1.
    cluster = Cluster(Config(engine="ray", ray_address="127.0.0.1:1"))
    with pytest.raises(LabError, match="no Ray cluster can be reached"), closing(cluster):
        assert cluster.width
    assert dict(os.environ) == before
    assert not ray.is_initialized()


def test_an_address_without_a_cluster_is_refused_within_seconds(study):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{free.getsockname()[1]}"
        words = ("--engine", "ray", "--steps", 20, "--out", "nowhere", "--ray-address")
        code, _, stderr = study.end(*words, nowhere)
        assert code == 2
        assert f"no Ray cluster can be reached at {nowhere}" in stderr
        free.listen()
        code, _, stderr = study.end(*words, nowhere)
        assert code == 2
        assert f"--ray-address {nowhere}: Failed to connect to Ray cluster" in stderr
    code, _, stderr = study.end(*words, "ray://127.0.0.1:10001")
    assert code == 2
    assert "'ray://127.0.0.1:10001' is not host:port" in stderr


# The last one: it takes a node from the cluster.
def test_a_killed_node_loses_nothing_and_nothing_is_twice(study, unbroken):
    words = (*LONG, "--model", "mine:net", *study.on_ray, "--out", "node")
    process = study.start(*words)
    saved = study.wait_for_checkpoints(process, "node", 2)
    raylet = psutil.Process(study.raylet)
    for part in [raylet, *raylet.children(recursive=True)]:
        os.kill(part.pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=250)
    assert process.returncode == 0, stderr
    # One run or both, as Ray had placed them.
    assert stderr.count("was lost") >= 1
    assert "goes on elsewhere from its last checkpoint" in stderr
    assert json.loads(stdout.splitlines()[-1])["event"] == "result"
    assert curves(study.folder / "node") == unbroken
    database = sqlite3.connect(study.folder / "node/results.sqlite")
    assert database.execute("select count(*), count(distinct arm || seed) from run").fetchone() == (
        4,
        4,
    )
    database.close()
    # What was lost went on from its checkpoint, not from its beginning.
    told = steps_told(stdout)
    for run, step in saved.items():
        reached = next(place for place, at in enumerate(told[run]) if at >= step)
        assert min(told[run][reached:]) >= step
