"""The ranges of `learning-rate` by hand, and its rules by simulation."""

import dataclasses
import math

import numpy as np
import pytest
from simulate import run, share, words

from normkit.lab.results.verdict import estimate
from normkit.lab.studies.learning_rate import (
    FACTORS,
    ONE_STEP,
    STUDY,
    arms,
    judge,
    larger_rate,
    reach_of,
    working,
)
from normkit.lab.study import Evidence, NotApplicable
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data

GIVEN = Config(steps=60)
CONFIG = GIVEN.resolved("learning-rate")
DATA = load_data(CONFIG)
ARMS = arms(CONFIG, DATA)
NAMES = ("none-60", "batch-60", "layer-60", "none-8", "batch-8")
WIDE, LARGER = "Wider range at batches of 60", "Larger best rate at batches of 60"
WIDE_SMALL, SIMILAR = "Wider range at batches of 8", "Similar best rate at batches of 8"


def test_a_range_ends_where_the_line_between_two_rates_crosses_its_share():
    logs = [-1.0, 0.0, 1.0, 2.0]
    assert working(logs, [0.7, 1.0, 0.8, 0.1], 0.9) == pytest.approx((-1 / 3, 0.5))
    # What works again behind a rate that doesn't is another range.
    assert working(logs, [0.95, 0.5, 1.0, 0.95], 0.9) == pytest.approx((0.8, 2.0))
    assert working(logs, [1.0, 1.0, 1.0, 1.0], 0.9) == (-1.0, 2.0)
    assert working(logs, [0.0, 0.0, 0.0, 0.0], 0.9) == (-1.0, -1.0)
    assert working([0.0], [0.5], 0.9) == (0.0, 0.0)


def made(log, seed, rng, low=-0.6, high=0.6, best=0.0, noise=0.0003):
    """A run at a rate: 0.95 in a range, falling by a fifth a decade below and to chance above."""
    value = 0.95 - 0.2 * max(0.0, low - log) - 0.003 * abs(log - best)
    value += noise * rng.normal()
    stable = log <= high + 1e-9
    each = run("", seed, value if stable else 0.1, found={"stable": stable}, steps=10)
    return dataclasses.replace(each, id=seed)


def evidence(rng, n=6, **given):
    """Every arm like no norm, but where its range is given."""
    found = {}
    shifts = 0.05 * rng.normal(size=n)
    for name in NAMES:
        shape = given.get(name.replace("-", "_"), {})
        for factor in FACTORS:
            log = math.log10(factor)
            found[f"{name}@{factor:g}"] = [
                made(log + shifts[seed], seed, rng, **shape) for seed in range(n)
            ]
    return Evidence(CONFIG, ARMS, found)


@pytest.mark.parametrize(
    ("claim", "word", "given"),
    [
        (WIDE, "holds", {"batch_60": {"low": -1.6, "high": 1.6}}),
        (WIDE, "reversed", {"none_60": {"low": -1.6, "high": 1.6}}),
        (WIDE, "holds", {"none_60": {"high": -9.0}}),
        (WIDE_SMALL, "holds", {"batch_8": {"low": -1.6, "high": 1.6}}),
        (LARGER, "holds", {"batch_60": {"best": 1.5, "high": 1.7}}),
        (LARGER, "reversed", {"none_60": {"best": 1.5, "high": 1.7}}),
        (LARGER, "little difference", {}),
        (SIMILAR, "holds", {"batch_60": {"best": 1.5, "high": 1.7}}),
        (SIMILAR, "reversed", {"batch_8": {"best": 1.5, "high": 1.7}}),
        (SIMILAR, "reversed", {"none_8": {"best": 1.5, "high": 1.7}}),
    ],
)
def test_planted_effects_are_found(claim, word, given):
    assert share(judge, lambda rng: evidence(rng, **given), claim, word, 4) == 1


def test_equal_widths_are_little_difference_and_hardly_ever_wider_under_noise():
    rng = np.random.default_rng(0)
    quiet = {name.replace("-", "_"): {"noise": 0.0} for name in NAMES}
    found = words(judge(evidence(rng, **quiet)))
    assert found[WIDE] == found[WIDE_SMALL] == "little difference"
    loud = {name.replace("-", "_"): {"noise": 0.004} for name in NAMES}
    found = [words(judge(evidence(rng, **loud))) for _ in range(20)]
    said = [each[claim] for each in found for claim in (WIDE, WIDE_SMALL)]
    # Of forty at most 1 in 32 is wrong; more than four have a chance near 1 in 100.
    assert said.count("holds") + said.count("reversed") <= 4


@pytest.mark.parametrize(
    ("logs", "said"),
    [
        ([0.5, 0.5, 0.0, -0.5, 0.0, 0.0], "little difference"),
        ([ONE_STEP - 1e-4] * 6, "little difference"),
        ([1.0, 0.5, 0.5, 0.5, 0.5, 1.5], "holds"),
        ([-1.0, -0.5, -0.5, -0.5, -0.5, -1.5], "reversed"),
        ([1.0, 0.5, 0.5, 0.5, 0.0, 1.5], "inconclusive"),
        ([1.0] * 5, "range only"),
    ],
)
def test_best_rates_are_similar_within_a_step_of_the_grid(logs, said):
    assert larger_rate(estimate(logs)) == said


def test_a_rate_that_is_not_stable_does_not_work_whatever_its_accuracy():
    rng = np.random.default_rng(0)
    runs = evidence(rng).runs
    for factor in FACTORS:
        for each in runs[f"none-60@{factor:g}"]:
            each.found["stable"] = False
    assert all(reach.width == 0 for reach in reach_of(runs, "none-60").values())
    assert all(reach.stable == -math.inf for reach in reach_of(runs, "none-60").values())
    assert words(judge(Evidence(CONFIG, ARMS, runs)))[WIDE] == "holds"


def test_a_seed_lacking_a_rate_is_left_out_and_equal_best_rates_are_averaged():
    rng = np.random.default_rng(0)
    runs = {key: list(found) for key, found in evidence(rng).runs.items()}
    del runs["none-60@1"][2]
    for factor in FACTORS:
        for each in runs[f"none-60@{factor:g}"]:
            each.curves["validation_accuracy"][1][:] = [0.9 if factor in (1, 100) else 0.5] * 10
    reach = reach_of(runs, "none-60")
    assert sorted(reach) == [0, 1, 3, 4, 5]
    assert reach[0].best == pytest.approx(1.0)


def test_five_seeds_are_a_range_and_an_open_verdict_says_how_many_would_settle_it():
    rng = np.random.default_rng(0)
    assert set(words(judge(evidence(rng, n=5))).values()) == {"range only"}
    for verdict in judge(evidence(rng, batch_60={"low": -0.85})).verdicts:
        assert (verdict.word == "inconclusive") == ("settle" in verdict.because)


def test_every_arm_sees_as_many_samples_and_the_same_rates():
    assert {arm.name.partition("@")[0] for arm in ARMS} == set(NAMES)
    for arm in ARMS:
        config = arm.applied(GIVEN, STUDY.name, STUDY.length)
        assert abs(config.steps * config.batch_size - 60 * 60) <= config.batch_size
        assert config.lr == 1.0
        assert arm.rate == float(arm.name.partition("@")[2])
    small = dataclasses.replace(CONFIG, batch_size=8)
    assert {arm.name.partition("@")[0] for arm in arms(small, DATA)} == {
        "none-8",
        "batch-8",
        "layer-8",
    }


def test_too_few_samples_are_said():
    few = dataclasses.replace(DATA, train=tuple(part[:20] for part in DATA.train))
    with pytest.raises(NotApplicable, match="20 training samples don't fill a batch of 60"):
        arms(CONFIG, few)


def test_it_runs_from_end_to_end(tmp_path, command):
    words = ("--steps", 2, "--eval-every", 1, "--seeds", 1, "--jobs", 1, "--out", "out")
    names = [f"{norm}-60@{factor:g}" for norm in ("none", "batch") for factor in FACTORS]
    ended = command("learning-rate", *words, "--arms", ",".join(names))
    assert ended.returncode == 0, ended.stderr
    assert f"{WIDE}: range only" in ended.stdout
    page = (tmp_path / "out/report.html").read_text("utf-8")
    for figure in ("accuracy", "widths", "best", "stable"):
        assert f'id="figure-learning-rate-{figure}"' in page
