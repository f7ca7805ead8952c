"""A study as a user runs it: resume after a kill, folders in use, full disks, bad input."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from folders import curves, rows_in

FAST = ("--steps", 60, "--eval-every", 10, "--seeds", 1, "--arms", "none,batch", "--jobs", 1)


def refused(ended, *said):
    assert ended.returncode == 2, ended.stdout + ended.stderr
    for text in said:
        assert text in ended.stderr
    assert "Traceback" not in ended.stderr or "Traceback" in said
    return ended.stderr


def test_a_study_trains_judges_and_reports(command, tmp_path):
    ended = command("speed", *FAST, "--out", "out")
    assert ended.returncode == 0, ended.stderr
    assert "range only" in ended.stdout
    page = (tmp_path / "out/report.html").read_text("utf-8")
    for text in (ended.stdout, page):
        assert "Fewer than 6 seeds give ranges, no intervals and no verdict: give --seeds 6" in text
    assert 1e6 < len(page.encode()) < 8e6
    database = sqlite3.connect(tmp_path / "out/results.sqlite")
    config, versions = database.execute("select config, versions from run").fetchone()
    database.close()
    assert json.loads(config)["batch_size"] == 60
    assert json.loads(versions).keys() >= {"torch", "normkit", "numpy", "python"}
    database = sqlite3.connect(tmp_path / "out/results.sqlite")
    (spent,) = database.execute("select value from meta where key = 'seconds'").fetchone()
    training = database.execute("select sum(seconds) from run").fetchone()[0]
    database.close()
    assert float(spent) > training > 0
    assert "by the clock, 1 run at a time" in page
    # Again: nothing to train, the same verdict, no more time.
    again = command("speed", *FAST, "--out", "out")
    database = sqlite3.connect(tmp_path / "out/results.sqlite")
    found = database.execute("select value from meta where key = 'seconds'").fetchone()
    database.close()
    assert float(found[0]) == float(spent)
    assert "runs to train" not in again.stdout
    assert again.stdout.splitlines()[-3:] == ended.stdout.splitlines()[-3:]
    # More seeds go into the same folder; what is there is kept.
    more = command("speed", *FAST, "--seeds", 2, "--out", "out")
    assert "2 runs to train, 2 done before" in more.stdout


def test_json_lines_are_json_and_end_with_the_result(command):
    ended = command("speed", *FAST, "--lr", "1e30", "--activation", "relu", "--json")
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert lines[0] == {"event": "begin", "runs": 2, "ended_before": 0}
    reports = [line for line in lines if line["event"] == "report"]
    assert {line["status"] for line in reports if line["arm"] == "none"} == {"diverged"}
    assert lines[-1]["event"] == "result"
    assert lines[-1]["rows"][0][3] == "1"


def test_a_config_file_holds_the_same_options(command, tmp_path):
    toml = "steps = 60\neval-every = 10\nseeds = 1\narms = 'none,batch'\njobs = 1\nlr = 2\n"
    (tmp_path / "c.toml").write_text(toml + "out = 'here'\n")
    assert command("speed", "--config", "c.toml", "--lr", 0.5).returncode == 0
    flags = command("speed", *FAST, "--lr", 0.5, "--out", "there")
    assert flags.returncode == 0
    assert curves(tmp_path / "here") == curves(tmp_path / "there")
    (tmp_path / "c.toml").write_text("stepz = 3\n")
    refused(command("speed", "--config", "c.toml"), "unknown option 'stepz'. Did you mean 'steps'?")
    (tmp_path / "c.toml").write_text("steps = 'many'\n")
    refused(command("speed", "--config", "c.toml"), "'many'; it takes a int")
    (tmp_path / "c.toml").write_text("steps = \n")
    refused(command("speed", "--config", "c.toml"), "not valid TOML")
    refused(command("speed", "--config", "d.toml"), "no such file")


LONG = ("--steps", 2000, "--eval-every", 50, "--seeds", 2, "--arms", "none,batch")


def start(folder, *words):
    with open(folder / "stderr.txt", "w") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "normkit", "study", "speed", *map(str, words)],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            # A shell's background jobs inherit an ignored Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def progress_in(path):
    """Steps written, runs begun and checkpoints kept, as another process sees them."""
    query = "select sum(step), sum(step > 0), sum(checkpoint is not null) from run"
    found = rows_in(path, query)
    return tuple(value or 0 for value in found[0]) if found else (0, 0, 0)


@pytest.mark.parametrize(("jobs", "whole_group"), [(1, False), (2, True)])
def test_after_kill_9_the_same_command_ends_with_bitwise_the_unbroken_curves(
    jobs, whole_group, tmp_path
):
    words = (*LONG, "--jobs", jobs)
    unbroken = start(tmp_path, *words, "--out", "unbroken")
    assert unbroken.wait() == 0
    killed = 0
    # Twice: early, and when a checkpoint of an unfinished run is there to go on from.
    for least in (1, 2):
        process = start(tmp_path, *words, "--out", "killed")
        path = tmp_path / "killed/results.sqlite"
        while process.poll() is None:
            steps, begun, checkpoints = progress_in(path)
            if (steps and least == 1) or (begun >= 2 and checkpoints):
                if whole_group:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
                killed += 1
                break
            time.sleep(0.01)
        process.wait()
    assert killed == 2
    assert progress_in(tmp_path / "killed/results.sqlite")[0] < 4 * 2000
    ended = start(tmp_path, *words, "--out", "killed")
    assert ended.wait() == 0, (tmp_path / "stderr.txt").read_text()
    assert curves(tmp_path / "killed") == curves(tmp_path / "unbroken")


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    process = start(tmp_path, *LONG, "--jobs", 2, "--steps", 2_000_000, "--out", "out")
    while not progress_in(tmp_path / "out/results.sqlite")[1] >= 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("a worker went on without its parent")


def test_ctrl_c_keeps_what_was_trained_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path, *LONG, "--jobs", 2, "--steps", 2_000_000, "--out", "out")
    while not progress_in(tmp_path / "out/results.sqlite")[0]:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait() == 130
    said = (tmp_path / "stderr.txt").read_text()
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert progress_in(tmp_path / "out/results.sqlite")[0] > 0


def test_a_worker_that_is_killed_is_named_and_the_rest_is_kept(command, tmp_path):
    (tmp_path / "dying.py").write_text(
        "import os\nfrom torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        Net.calls += 1\n"
        "        if Net.calls > 30:\n"
        "            os.kill(os.getpid(), 9)\n"
        "        return super().forward(x)\n"
        "def net(norm):\n"
        "    n = [norm(8)] if norm else []\n"
        "    return Net(nn.Flatten(), nn.Linear(64, 8), *n, nn.Tanh(), nn.Linear(8, 10))\n"
    )
    ended = command("speed", *FAST, "--jobs", 2, "--model", "dying:net", "--out", "out")
    refused(ended, "ended with signal SIGKILL", "Give the same command again")


def test_two_processes_on_one_folder(command, tmp_path):
    process = start(tmp_path, *LONG, "--jobs", 1, "--steps", 2_000_000, "--out", "out")
    try:
        while not progress_in(tmp_path / "out/results.sqlite")[0]:
            assert process.poll() is None
            time.sleep(0.02)
        refused(command("speed", *FAST, "--out", "out"), "--out out is in use by another process")
    finally:
        process.kill()
        process.wait()


def test_a_folder_with_other_results_is_refused_and_left_as_it_was(command, tmp_path):
    assert command("speed", *FAST, "--out", "out").returncode == 0
    before = curves(tmp_path / "out")
    said = refused(command("speed", *FAST, "--out", "out", "--lr", 0.5), "holds other results")
    assert "lr is 1.0 there and 0.5 now" in said
    assert "Give another folder with --out" in said
    assert curves(tmp_path / "out") == before
    database = sqlite3.connect(tmp_path / "out/results.sqlite")
    database.execute("update meta set value = replace(value, '\"speed\"', '\"affine\"')")
    database.commit()
    database.close()
    refused(command("speed", *FAST, "--out", "out"), "study is 'affine' there and 'speed' now")


def test_data_that_changed_under_the_same_name_is_refused(command, tmp_path):
    import numpy as np

    x, y = np.random.default_rng(0).normal(size=(200, 4)), np.arange(200) % 2
    np.savez(tmp_path / "d.npz", x=x, y=y)
    assert command("speed", *FAST, "--data", "d.npz", "--out", "out").returncode == 0
    np.savez(tmp_path / "d.npz", x=x + (np.arange(200) == 7)[:, None], y=y)
    refused(command("speed", *FAST, "--data", "d.npz", "--out", "out"), "data_sha256 is")


def test_a_folder_that_cannot_be_written(command, tmp_path):
    (tmp_path / "file").write_text("")
    refused(command("speed", *FAST, "--out", "file"), "--out file can't be written")
    refused(command("speed", *FAST, "--out", "/proc/normkit"), "can't be written")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/results.sqlite").write_text("these are not the results of a study" * 99)
    refused(command("speed", *FAST, "--out", "other"), "file is not a database")


def test_a_full_disk_is_said_and_the_same_command_goes_on(command, tmp_path):
    import resource

    words = (*FAST, "--seeds", 2, "--steps", 400, "--jobs", 2, "--eval-every", 1)
    small = (60_000, resource.RLIM_INFINITY)
    full = command(
        "speed",
        *words,
        "--out",
        "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small),
    )
    refused(full, "--out out can't be written", "it goes on from the last checkpoint")
    assert command("speed", *words, "--out", "out").returncode == 0
    assert command("speed", *words, "--out", "whole").returncode == 0
    assert curves(tmp_path / "out") == curves(tmp_path / "whole")


def test_a_users_module_that_fails_shows_their_traceback_not_ours(command, tmp_path):
    (tmp_path / "broken.py").write_text("def net(norm):\n    pass\n\nimport nothing_of_the_kind\n")
    said = refused(command("speed", *FAST, "--model", "broken:net"), "Traceback")
    assert "import nothing_of_the_kind" in said
    assert "normkit/lab" not in said
    (tmp_path / "later.py").write_text("def net(norm):\n    return undefined_name\n")
    said = refused(command("speed", *FAST, "--model", "later:net"), "Traceback", "undefined_name")
    assert "normkit/lab" not in said
    (tmp_path / "syntax.py").write_text("def net(norm:\n")
    refused(command("speed", *FAST, "--model", "syntax:net"), "syntax.py", "SyntaxError")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sped",), "unknown study 'sped'. Did you mean 'speed'?"),
        (("speed", "--data", "digit"), "Did you mean 'digits'?"),
        (("speed", "--model", "resnt"), "Did you mean 'resnet'?"),
        (("speed", "--activation", "sigmod"), "Did you mean 'sigmoid'?"),
        (("speed", "--optimizer", "adm"), "Did you mean 'adam'?"),
        (("speed", "--arms", "none,bach"), "unknown arm 'bach'. Did you mean 'batch'?"),
        (("speed", "--arms", "batch"), "add it: --arms none,batch"),
        (("speed", "--seeds", 0), "--seeds is 0"),
        (("speed", "--lr", "nan"), "--lr is nan"),
        (("speed", "--batch-size", 1), "batch norm needs at least 2 samples"),
        (("speed", "--batch-size", 5000), "more than the 1078 training samples"),
        (("speed", "--steps", 10, "--eval-every", 20), "--eval-every 20 is more than --steps 10"),
        (("speed", "--device", "cuba"), "--device 'cuba' can't be used here"),
        (("speed", "--device", "meta"), "--device 'meta' can't be used here"),
        (("speed", "--model", "cnn", "--data", "d.npz"), "takes images (C, H, W)"),
    ],
)
def test_a_bad_option_names_the_value_and_the_near_match(words, said, command, tmp_path):
    import numpy as np

    np.savez(
        tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(200, 4)), y=np.arange(200) % 2
    )
    refused(command(*words), said)
    assert not (tmp_path / "runs").exists()
