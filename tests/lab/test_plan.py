"""Several studies at once: the budget, what is left out and why, the one report."""

import json

import pytest

from normkit.common.errors import LabError
from normkit.lab.plan import seconds

FAST = ("--seeds", 1, "--steps", 20, "--eval-every", 10, "--jobs", 1)


@pytest.mark.parametrize(
    ("text", "value"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("0.5m", 30)]
)
def test_a_budget_is_a_time(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["20", "m", "-3m", "3 m", "1d", "", "3m!"])
def test_a_budget_without_a_unit_is_refused(text):
    with pytest.raises(LabError, match="give a time like"):
        seconds(text)


def test_a_budget_too_small_for_anything_names_the_shortest_study(command, tmp_path):
    ended = command("all", *FAST, "--budget", "0.001s")
    assert ended.returncode == 2
    assert "is too small for any study: the shortest, " in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_options_that_make_no_sense_are_refused(command):
    for words, said in (
        (("speed", "--budget", "3m"), "--budget is for `normkit study all`"),
        (("all", "--arms", "none"), "--arms names arms of one study"),
        (("al",), "Did you mean 'all'?"),
    ):
        ended = command(*words)
        assert ended.returncode == 2
        assert said in ended.stderr


def test_all_studies_make_one_report_and_what_does_not_apply_is_skipped(command, tmp_path):
    import numpy as np

    # 24 training samples: no batch of 32 for `batch-size`, too small a test part for `inference`.
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "small.npz", x=rng.normal(size=(40, 4)), y=np.arange(40) % 2)
    options = ("--data", "small.npz", "--batch-size", 8, "--out", "out", "--json", "--tensorboard")
    words = ("all", *FAST, *options)
    ended = command(*words)
    assert ended.returncode == 0, ended.stderr
    told = [json.loads(line) for line in ended.stdout.splitlines()]
    overview = told[-1]
    assert overview["event"] == "overview"
    assert "don't fill a batch of 32" in overview["skipped"]["batch-size"]
    assert "8 test samples" in overview["skipped"]["inference"]
    judged = {verdict["study"] for verdict in overview["verdicts"]}
    assert {"speed", "norms"} <= judged
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert len(page.encode()) < 10e6
    for study in judged:
        assert f'<article id="{study}"' in page
        assert f'<a href="#{study}">' in page
        assert (tmp_path / "out" / study / "results.sqlite").is_file()
        assert list((tmp_path / "out" / study / "tensorboard").glob("*/seed-0/events.out.*"))
    assert "fill a batch of 32" in page
    # Again: nothing to train.
    again = [json.loads(line) for line in command(*words).stdout.splitlines()]
    assert not [line for line in again if line["event"] == "report"]
    assert again[-1] == overview
