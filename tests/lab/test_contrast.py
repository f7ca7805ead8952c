"""The rules of `placement` and `affine`, which say much or little, by simulation."""

import math

import numpy as np
import pytest
from simulate import paced, share, words

from normkit.lab.report.contrast import Contrast, contrast
from normkit.lab.results.verdict import any_of, seeds_to_place, seeds_to_settle
from normkit.lab.studies import affine, placement
from normkit.lab.study import Evidence
from normkit.lab.training.config import Config

CONFIG = Config(steps=400).resolved("placement")
SIGMOID = "Before is better with sigmoid"
TANH, RELU = "Little difference with tanh", "Little difference with ReLU"
MATTER, SCALE, SHIFT = "Scale and shift matter", "The scale matters", "The shift matters"
BEHIND = "Behind the activation they matter little"
ALL = {placement: placement.ARMS, affine: affine.ARMS + affine.BEHIND}


def evidence(rng, study, n=6, **arms):
    """Runs of every arm, all alike but where an arm is given an accuracy or a pace."""
    found = {
        arm.name: paced(rng, arm.name, n, **arms.get(arm.name.replace("-", "_"), {}))
        for arm in ALL[study]
    }
    return Evidence(CONFIG, ALL[study], found, found, dict.fromkeys(found, 1.0))


def rate(study, claim, word, repeats, **arms):
    return share(study.judge, lambda rng: evidence(rng, study, **arms), claim, word, repeats)


@pytest.mark.parametrize(
    ("study", "claim", "word", "arms"),
    [
        (placement, SIGMOID, "holds", {"sigmoid_after": {"mean": 0.85}}),
        (placement, SIGMOID, "holds", {"sigmoid_after": {"pace": 100}}),
        (placement, SIGMOID, "reversed", {"sigmoid_before": {"mean": 0.85}}),
        (placement, SIGMOID, "reversed", {"sigmoid_before": {"pace": 100}}),
        (placement, SIGMOID, "little difference", {}),
        (placement, TANH, "holds", {}),
        (placement, RELU, "holds", {"sigmoid_after": {"mean": 0.85}}),
        (placement, TANH, "reversed", {"tanh_after": {"mean": 0.85}}),
        (placement, TANH, "reversed", {"tanh_before": {"mean": 0.85}}),
        (placement, RELU, "reversed", {"relu_before": {"pace": 100}}),
        (placement, RELU, "reversed", {"relu_after": {"pace": 100}}),
        (affine, MATTER, "holds", {"neither": {"mean": 0.8}}),
        (affine, MATTER, "reversed", {"neither": {"mean": 0.95}}),
        (affine, MATTER, "little difference", {}),
        (affine, SCALE, "holds", {"shift": {"pace": 100}}),
        (affine, SCALE, "little difference", {"scale": {"mean": 0.8}}),
        (affine, SHIFT, "holds", {"scale": {"mean": 0.8}}),
        (affine, SHIFT, "reversed", {"scale": {"pace": 15}}),
        (affine, BEHIND, "holds", {"neither": {"mean": 0.8}}),
        (affine, BEHIND, "reversed", {"behind_neither": {"mean": 0.8}}),
    ],
)
def test_planted_effects_and_their_absence_are_found(study, claim, word, arms):
    small = {"spread": 0.001, "noise": 0.03}
    quiet = {arm.name.replace("-", "_"): small for arm in ALL[study]}
    quiet |= {name: small | given for name, given in arms.items()}
    assert rate(study, claim, word, 4, **quiet) == 1


def contrasts(accuracy, steps, spread=0.004, noise=0.15, repeats=1000):
    """Contrasts over six seeds around a difference of accuracy and a log ratio of steps."""
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        yield Contrast(accuracy + spread * rng.normal(size=6), steps + noise * rng.normal(size=6))


@pytest.mark.parametrize("sign", [1, -1])
def test_at_the_margins_a_word_is_wrong_at_most_as_often_as_stated(sign):
    at = list(contrasts(sign * 0.01, sign * math.log(1.5)))
    # 1 of 32 and three standard errors.
    most = 1 / 32 + 3 * math.sqrt(1 / 32 / 1000)
    for found in ([each.matters() for each in at], [each.negligible() for each in at]):
        wrong = [word for word in found if word != "inconclusive"]
        assert len(wrong) / len(found) <= most
        assert wrong


def test_noise_that_hides_a_difference_is_no_little_difference():
    for hidden in contrasts(0.0, 0.0, spread=0.03, repeats=200):
        assert hidden.negligible() != "holds"
        assert hidden.matters() != "little difference"


def test_effects_of_opposite_signs_are_a_difference_and_nobodys_victory():
    rng = np.random.default_rng(0)
    lower = {name: {"mean": 0.85} for name in ("sigmoid_after", "tanh_after")}
    made = evidence(rng, placement, **lower)
    for name in ("sigmoid-after", "tanh-after"):
        for each in made.tuned[name]:
            # On validation it is good from the first step on.
            each.curves["validation_accuracy"][1][:] = [0.95] * 400
    found = words(placement.judge(made))
    assert found[SIGMOID] == "inconclusive"
    assert found[TANH] == "reversed"


def test_five_seeds_are_a_range_and_an_open_verdict_says_how_many_would_settle_it():
    rng = np.random.default_rng(0)
    for study in ALL:
        assert set(words(study.judge(evidence(rng, study, n=5))).values()) == {"range only"}
    loud = {arm.name.replace("-", "_"): {"spread": 0.02} for arm in ALL[placement]}
    for verdict in placement.judge(evidence(rng, placement, **loud)).verdicts:
        assert (verdict.word == "inconclusive") == ("settle" in verdict.because)


def test_a_contrast_is_paired_by_seed_and_takes_the_target_of_the_first():
    rng = np.random.default_rng(0)
    made = evidence(rng, affine, both={"pace": 40, "noise": 0}, neither={"pace": 80, "noise": 0})
    ours, theirs = made.tuned["both"], made.tuned["neither"]
    found = contrast(made, "both", "neither")
    assert found.accuracy == pytest.approx(
        [a.test_accuracy - b.test_accuracy for a, b in zip(ours, theirs, strict=True)]
    )
    # Four steps later the mean of five is at the target of 98 %: 45 steps against 85.
    assert found.steps == pytest.approx([math.log(85 / 45)] * 6)


def test_diverged_runs_count_as_wrong_and_as_never_there():
    rng = np.random.default_rng(0)
    made = evidence(rng, affine, neither={"status": "diverged"})
    assert words(affine.judge(made))[MATTER] == "holds"
    assert contrast(made, "both", "neither").accuracy[0] == made.tuned["both"][0].test_accuracy


def test_one_effect_within_and_one_open_is_open():
    assert Contrast([0.0] * 6, [0.5, -0.5] * 3).matters() == "inconclusive"
    assert Contrast([0.0] * 6, [0.5, -0.5] * 3).negligible() == "inconclusive"
    assert Contrast([0.05] * 6, [0.5, -0.5] * 3).matters() == "holds"
    assert "seeds" in Contrast([0.0] * 6, [0.5, -0.5] * 3).settled_by()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["holds", "inconclusive"], "holds"),
        (["little difference", "reversed"], "reversed"),
        (["holds", "reversed"], "inconclusive"),
        (["little difference", "little difference"], "little difference"),
        (["little difference", "inconclusive"], "inconclusive"),
        (["holds", "range only"], "range only"),
    ],
)
def test_one_of_several_effects_is_enough_where_none_contradicts(words, said):
    assert any_of(words) == said


def test_the_seeds_that_place_an_effect_are_those_of_its_harder_side():
    # Inside -1 and 1 but for one above: 1 is the harder side, -1 would be settled soon.
    values = [0.0, 0.1, -0.1, 0.2, 0.0, 1.5]
    above = seeds_to_settle([value - 1 for value in values])
    assert seeds_to_place(values, 1.0) == above
    assert seeds_to_place([-value for value in values], 1.0) == above
    assert above > seeds_to_settle([value + 1 for value in values])
    # As many above 1 as below: no number of seeds would tell.
    assert seeds_to_place([0.9, 1.1] * 3, 1.0) is None
