"""The rule of `batch-size` by simulation, and its measure against NumPy."""

import dataclasses

import numpy as np
import pytest
import torch
from simulate import runs, share, words

from normkit.common.errors import LabError
from normkit.lab.studies.batch_size import STUDY, arms, errors, judge
from normkit.lab.study import Evidence, NotApplicable
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data

GIVEN = Config(steps=60)
CONFIG = GIVEN.resolved("batch-size")
DATA = load_data(CONFIG)
ARMS = arms(CONFIG, DATA)
BATCH = "Batch norm needs a large batch"
GROUP = "Group norm does without a large batch"
RENORM = "Batch renorm does without a large batch"


def evidence(rng, n=6, **small):
    """Every arm at 0.9, those named by norm at another accuracy with batches of 2."""
    found = {
        arm.name: runs(rng, arm.name, n, small.get(arm.name.removesuffix("-2"), 0.9))
        for arm in ARMS
    }
    return Evidence(CONFIG, ARMS, found, found, dict.fromkeys(found, 1.0))


def test_a_fall_of_batch_norm_alone_is_found():
    def made(rng):
        return evidence(rng, batch=0.7)

    assert share(judge, made, BATCH, "holds", 30) == 1
    # The others fall by nothing: within the margin of a point, with noise of half a point.
    assert share(judge, made, GROUP, "reversed", 30) == 0


def test_group_norm_that_falls_too_is_reversed_and_batch_norm_that_doesnt_as_well():
    found = words(judge(evidence(np.random.default_rng(0), group=0.7, renorm=0.95)))
    assert found[GROUP] == "reversed"
    assert found[RENORM] == "holds"
    assert share(judge, lambda rng: evidence(rng, batch=0.95), BATCH, "reversed", 20) == 1


def test_a_fall_of_just_the_margin_is_called_either_way_at_most_as_often_as_stated():
    def made(rng):
        return evidence(rng, batch=0.89)

    wrong = 1 - share(judge, made, BATCH, "inconclusive", 200)
    assert wrong < 0.07


def test_five_seeds_give_no_verdict_and_an_inconclusive_one_says_how_many_would():
    assert set(words(judge(evidence(np.random.default_rng(0), n=5))).values()) == {"range only"}
    verdict = judge(evidence(np.random.default_rng(0), batch=0.89)).verdicts[0]
    assert (verdict.word == "inconclusive") == ("would settle it" in verdict.because)


def test_the_arms_see_equal_samples_at_linearly_scaled_rates():
    for arm in ARMS:
        config = arm.applied(GIVEN, STUDY.name, STUDY.length)
        assert abs(config.steps * config.batch_size - 60 * 60) <= config.batch_size
        assert arm.rate == config.batch_size / 60
    assert not any(arm.name in ("ghost-2", "ghost-4", "ghost-8") for arm in ARMS)


def test_a_pattern_chooses_batch_sizes_and_the_baseline_must_be_among_them():
    chosen = [arm.name for arm in STUDY.chosen(ARMS, "*-2, group-8,*-32")]
    assert chosen == [
        *("batch-32", "batch-2", "ghost-32", "renorm-32", "renorm-2"),
        *("group-32", "group-2", "group-8"),
    ]
    with pytest.raises(LabError, match="unknown arm '\\*-3'"):
        STUDY.chosen(ARMS, "*-32,*-3")
    with pytest.raises(LabError, match="add it: --arms batch-32,\\*-2"):
        STUDY.chosen(ARMS, "*-2")


def test_a_batch_of_one_ghost_is_batch_norms():
    findings = judge(evidence(np.random.default_rng(0), batch=0.7))
    error = next(figure for figure in findings.figures if figure.name == "error")
    drawn = {t["name"]: t for t in error.traces if t["meta"] == "line" and t["xaxis"] == "x"}
    ghost, batch = (drawn[name] for name in ("ghost batch norm (8 samples)", "batch norm"))
    assert ghost["x"] == batch["x"] == [2, 4, 8, 32, 128]
    assert ghost["y"][:3] == batch["y"][:3]
    assert ghost["y"][3:] != batch["y"][3:]


def test_a_short_run_is_not_measured_more_often_than_every_six_steps():
    every = {arm.name: arm.applied(Config(), STUDY.name, STUDY.length) for arm in ARMS}
    assert [every[f"batch-{size}"].eval_every for size in (2, 32, 128)] == [180, 11, 3]
    assert Config(steps=3).resolved("speed").eval_every == 3
    assert Config().resolved("speed").eval_every == 30


def test_too_few_samples_are_said():
    few = dataclasses.replace(DATA, train=tuple(part[:20] for part in DATA.train))
    with pytest.raises(NotApplicable, match="20 training samples don't fill a batch of 32"):
        arms(CONFIG, few)


@pytest.mark.parametrize("shape", [(500, 3), (500, 3, 4)])
def test_the_error_of_a_batch_is_that_of_numpy(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2 + 5
    mean, variance = errors(x, 8, torch.Generator().manual_seed(7))
    generator, values = torch.Generator().manual_seed(7), x.double().numpy()
    axes = (0, 2)[: len(shape) - 1]
    m, v = values.mean(axes), values.var(axes)
    by_mean, by_variance = [], []
    for _ in range(32):
        batch = values[torch.randperm(500, generator=generator)[:8].numpy()]
        by_mean.append((batch.mean(axes) - m) / np.sqrt(v))
        by_variance.append(batch.var(axes) / v - 1)
    assert mean == pytest.approx(np.sqrt(np.mean(np.square(by_mean))))
    assert variance == pytest.approx(np.sqrt(np.mean(np.square(by_variance))))
    # 1 / sqrt(values): eight samples of one or four values.
    assert mean == pytest.approx(1 / np.sqrt(8 * np.prod(shape[2:])), rel=0.25)


def test_a_channel_that_does_not_vary_is_left_out():
    x = torch.randn(100, 2)
    x[:, 1] = 3.0
    generator = torch.Generator().manual_seed(0)
    assert errors(x, 4, generator)[0] < 2
    assert errors(x[:, 1:], 4, generator) == (0.0, 0.0)
