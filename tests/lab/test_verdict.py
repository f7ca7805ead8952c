"""The whole verdict rule, by simulation: planted effects, no effect, reversed effects."""

import dataclasses
import math

import numpy as np
import pytest

from normkit.lab.results.measures import target_of
from normkit.lab.results.store import Run
from normkit.lab.results.verdict import estimate, log_speedup, smoothed, steps_to, word
from normkit.lab.studies.speed import ARMS, arms, judge
from normkit.lab.study import Evidence
from normkit.lab.training.config import Config

CONFIG = Config(steps=3000, eval_every=30).resolved("speed")
RELU = Config(steps=3000, eval_every=30, activation="relu").resolved("speed")
SIGMOIDS = "Sigmoids need batch norm"


def simulated(arm, seed, rng, pace, final=0.97, status="finished"):
    """A run whose accuracy rises to `final` with a time constant of `pace` steps, with noise."""
    steps = np.arange(30, 3001, 30)
    pace = pace * rng.lognormal(0, 0.15)
    noise = rng.normal(0, 0.003, len(steps))
    accuracy = 0.1 + (final - 0.1) * (1 - np.exp(-steps / pace)) + noise
    curves = {"validation_accuracy": (steps.tolist(), accuracy.tolist())}
    test = final + rng.normal(0, 0.003) if status == "finished" else None
    return Run(seed, arm, seed, status, 3000, 1.0, test, curves)


def study(rng, n, config=CONFIG, **named):
    """Runs of every arm; what isn't given is as without norm."""
    return {
        arm.name: [
            simulated(arm.name, seed, rng, **{"pace": 200, **named.get(arm.name, {})})
            for seed in range(n)
        ]
        for arm in arms(config, None)
    }


def judged(runs, config=CONFIG):
    return judge(Evidence(config, arms(config, None), runs))


def words(runs, config=CONFIG):
    return {v.claim: v.word for v in judged(runs, config).verdicts}


def rates(claim, repeats, n, config=CONFIG, **named):
    rng = np.random.default_rng(0)
    found = [words(study(rng, n, config, **named), config)[claim] for _ in range(repeats)]
    return {word: found.count(word) / repeats for word in set(found)}


BATCH = {"batch": {"pace": 80}}


def test_a_planted_speedup_is_found():
    assert rates("Fewer steps", 40, 6, **BATCH).get("holds", 0) >= 0.95


def test_a_planted_slowdown_is_reversed():
    assert rates("Fewer steps", 40, 6, batch={"pace": 500}).get("reversed", 0) >= 0.95


@pytest.mark.parametrize("n", [6, 10])
def test_without_an_effect_both_claims_are_inconclusive_at_the_stated_rate(n):
    # At most 1 in 20 may be conclusive; more than 10 of 100 has a chance near 1 %.
    for claim in ("Fewer steps", "Control (A/A)", "Larger rates", SIGMOIDS):
        found = rates(claim, 100, n)
        assert found["inconclusive"] >= 0.9, (claim, found)


def test_the_chance_of_a_wrong_word_is_what_the_docstring_says():
    rng = np.random.default_rng(1)
    found = [word(estimate(rng.normal(size=6))) for _ in range(4000)]
    wrong = 1 - found.count("inconclusive") / 4000
    # 1 in 32, within three standard errors.
    assert abs(wrong - 1 / 32) < 3 * math.sqrt(1 / 32 / 4000)


def test_larger_rates_hold_where_only_the_network_without_norm_breaks():
    broken = {"none-x30": {"pace": 200, "final": 0.1}}
    assert rates("Larger rates", 20, 6, **BATCH, **broken) == {"holds": 1.0}


def test_larger_rates_are_reversed_where_only_batch_norm_breaks():
    broken = {"batch-x30": {"pace": 200, "final": 0.5}}
    assert rates("Larger rates", 20, 6, **BATCH, **broken) == {"reversed": 1.0}


def test_breaking_less_is_not_bearing_a_rate():
    both = {"none-x30": {"final": 0.1}, "batch-x30": {"final": 0.8}}
    assert rates("Larger rates", 20, 6, **BATCH, **both).get("holds", 0) == 0
    # At 5x it may still bear what the network without norm does not.
    both |= {"none-x5": {"final": 0.9}}
    assert rates("Larger rates", 20, 6, **BATCH, **both) == {"holds": 1.0}


STUCK = {"none-sigmoid": {"final": 0.1}, "none-x5-sigmoid": {"final": 0.1}}


def test_sigmoids_that_only_train_with_batch_norm_are_found():
    # Three points behind the network's own activation, as in the paper.
    trains = {"batch-x5-sigmoid": {"final": 0.94}}
    assert rates(SIGMOIDS, 20, 6, RELU, **STUCK, **trains) == {"holds": 1.0}
    # The sigmoid network's own arms are the ones that count.
    stuck = {"none": {"final": 0.1}, "none-x5": {"final": 0.1}}
    assert rates(SIGMOIDS, 20, 6, **stuck) == {"holds": 1.0}


def test_sigmoids_that_batch_norm_does_not_train_either_are_no_success():
    stuck_too = {"batch-x5-sigmoid": {"final": 0.5}}
    assert rates(SIGMOIDS, 20, 6, RELU, **STUCK, **stuck_too) == {"inconclusive": 1.0}


def test_sigmoids_must_stay_behind_at_both_rates():
    at_one = {"none-x5-sigmoid": {"final": 0.1}}
    assert rates(SIGMOIDS, 20, 6, RELU, **at_one) == {"inconclusive": 1.0}


def test_sigmoids_that_train_better_without_batch_norm_are_reversed():
    broken = {"batch-x5-sigmoid": {"final": 0.9}}
    assert rates(SIGMOIDS, 20, 6, RELU, **broken) == {"reversed": 1.0}


def test_of_a_users_network_nothing_is_said_about_sigmoids():
    rng = np.random.default_rng(0)
    own = dataclasses.replace(RELU, model="mine:net")
    assert [arm.name for arm in arms(own, None)] == [arm.name for arm in ARMS]
    findings = judged(study(rng, 6, own), own)
    assert SIGMOIDS not in [verdict.claim for verdict in findings.verdicts]
    assert any("Nothing is said of sigmoids" in note for note in findings.notes)


def test_a_gain_within_the_margin_of_one_point_is_no_larger_rate():
    slight = {"none-x30": {"pace": 200, "final": 0.963}}
    assert "holds" not in rates("Larger rates", 20, 6, **slight)


def test_five_seeds_give_a_range_and_no_verdict():
    rng = np.random.default_rng(0)
    findings = judged(study(rng, 5, **BATCH))
    assert {v.word for v in findings.verdicts} == {"range only"}


def test_runs_that_never_reach_the_target_are_counted_and_do_not_stop_the_verdict():
    rng = np.random.default_rng(0)
    runs = study(rng, 6, **BATCH)
    runs["none"][5] = simulated("none", 5, rng, 200, final=0.5)
    findings = judged(runs)
    assert findings.verdicts[0].word == "holds"
    assert "1 of 6 runs without never got there" in findings.verdicts[0].because
    assert findings.rows[0][2] == "5 of 6"


def test_batch_norm_that_never_arrives_is_reversed():
    rng = np.random.default_rng(0)
    findings = judged(study(rng, 6, batch={"final": 0.5}))
    assert findings.verdicts[0].word == "reversed"
    assert findings.rows[1][1].startswith("never")


def test_diverged_runs_are_counted_and_have_accuracy_zero():
    rng = np.random.default_rng(0)
    runs = study(rng, 6, **BATCH)
    runs["none-x30"] = [simulated("none-x30", s, rng, 200, status="diverged") for s in range(6)]
    findings = judged(runs)
    row = next(row for row in findings.rows if row[0] == "no norm, 30× rate")
    assert row[2:4] == ["0 of 6", "6"]
    assert row[5].startswith("0.0%")
    assert findings.verdicts[1].word == "holds"


def test_a_baseline_that_diverged_gives_a_target_that_nobody_reaches():
    rng = np.random.default_rng(0)
    runs = study(rng, 6, **BATCH)
    runs["none"] = [simulated("none", s, rng, 200, status="diverged") for s in range(6)]
    assert target_of(runs["none"]) == 0
    assert judged(runs).verdicts[0].word == "inconclusive"


def test_the_target_is_98_percent_of_the_median_final_not_of_the_best_point():
    rng = np.random.default_rng(0)
    runs = [simulated("none", s, rng, 50) for s in range(3)]
    for run, level in zip(runs, (0.8, 0.9, 0.95), strict=True):
        values = run.curves["validation_accuracy"][1]
        values[:] = [0.99] * 10 + [level] * (len(values) - 10)
    assert target_of(runs) == pytest.approx(0.98 * 0.9)


def test_smoothing_is_the_mean_of_the_last_five():
    assert smoothed([1, 0, 0, 0, 0, 0, 5]) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 0, 1])


def test_steps_to_is_the_first_arrival_or_never():
    assert steps_to(0.5, [10, 20, 30], [0.0, 1.0, 1.0]) == 20
    assert steps_to(0.9, [10, 20, 30], [0.0, 1.0, 1.0]) == math.inf


def test_never_counts_as_the_horizon_and_two_nevers_tie():
    assert log_speedup(math.inf, 100, 1000) == pytest.approx(math.log(10))
    assert log_speedup(100, math.inf, 1000) == pytest.approx(-math.log(10))
    assert log_speedup(math.inf, math.inf, 1000) == 0


def test_the_interval_of_six_is_from_the_smallest_to_the_largest_and_of_three_a_range():
    six = estimate([3, 1, 2, 6, 5, 4])
    assert (six.median, six.low, six.high, six.is_range) == (3.5, 1, 6, False)
    assert estimate([1, 2, 3]).is_range
    twelve = estimate(range(12))
    assert (twelve.low, twelve.high) == (2, 9)


def test_the_interval_covers_the_median_at_least_as_often_as_it_says():
    rng = np.random.default_rng(2)
    for n in (6, 9, 15):
        inside = [e.low <= 0 <= e.high for e in (estimate(rng.normal(size=n)) for _ in range(1000))]
        assert np.mean(inside) >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 1000)


def test_medians_take_never_as_a_value():
    assert estimate([1.0, math.inf, math.inf]).median == math.inf
    assert estimate([math.inf] * 6).low == math.inf
    with pytest.raises(ValueError, match="no values"):
        estimate([])
