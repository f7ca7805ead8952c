"""The rule of `inference` by simulation, and what it measures against plain batch norm."""

import numpy as np
import pytest
import torch
from simulate import run, words

import normkit
from normkit.lab.studies.inference import ARMS, _by_batch, _drifted, judge, probe
from normkit.lab.study import Evidence
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data
from normkit.lab.training.models import build

CONFIG = Config(steps=60).resolved("inference")
DATA = load_data(CONFIG)


def evidence(rng, n=6, running=0.9, batch=0.9, pairs=0.6, exact=0.9, stream=0.9, single=1e-7):
    def noisy(value):
        return float(value + 0.001 * rng.normal())

    made = []
    for seed in range(n):
        found = {
            "running": noisy(running),
            "single": single,
            "batch": {"1": None, "2": noisy(pairs), "256": noisy(batch)},
            "recalibrated": noisy(exact),
            "stream": {
                "running": [noisy(stream)] * 4,
                "batch": [noisy(0.9)] * 4,
                "following": [noisy(0.9)] * 4,
            },
        }
        made.append(run("batch", seed, 0.9, found))
    return Evidence(CONFIG, ARMS[:1], {"batch": made})


def test_planted_effects_are_found_and_absent_ones_are_not():
    rng = np.random.default_rng(0)
    assert words(judge(evidence(rng, stream=0.5))) == {
        "Running averages serve": "holds",
        "Batch statistics need a batch": "holds",
        "Single samples work": "holds",
        "Recalibration changes little": "holds",
        "A drifting stream breaks the averages": "holds",
    }
    assert words(judge(evidence(rng, running=0.8, pairs=0.95, exact=0.95, single=0.1))) == {
        "Running averages serve": "reversed",
        "Batch statistics need a batch": "reversed",
        "Single samples work": "reversed",
        "Recalibration changes little": "reversed",
        "A drifting stream breaks the averages": "inconclusive",
    }
    assert set(words(judge(evidence(rng, n=5))).values()) == {"range only"}


def trained():
    model = build(CONFIG, DATA, ARMS[0], 0)
    with torch.no_grad():
        model.train()
        model(DATA.train[0][:200])
    return model


@pytest.mark.parametrize("size", [2, 7, 16, 100])
def test_scores_by_batch_are_those_of_training_mode_and_no_average_moves(size):
    model = trained()
    x = DATA.test[0][:100]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = _by_batch(model, x, size)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.training
    with torch.no_grad():
        model.train()
        first = model(x[:size])
        last = model(x[-size:])
    assert torch.equal(scores[:size], first)
    left = 100 % size or size
    assert torch.equal(scores[-left:], last[-left:])
    assert scores.shape == (100, 10)


def test_one_value_per_channel_has_no_batch_statistics_and_says_so():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        _by_batch(trained(), DATA.test[0][:4], 1)


def test_the_stream_ends_at_twice_the_size_and_one_deviation_further():
    x = torch.ones(70, 1, 2, 2)
    drifted = _drifted(x)
    assert len(drifted) == 64
    assert drifted[0].unique().tolist() == [1.0]
    assert drifted[-1].unique().tolist() == [3.0]


def test_the_probe_is_validation_accuracy_with_the_statistics_of_batches():
    class At:
        model, data, config = trained(), DATA, CONFIG

    x, y = DATA.validation
    with torch.no_grad():
        At.model.train()
        for norm in At.model.modules():
            if isinstance(norm, normkit.BatchNorm):
                norm.momentum = 0.0
        whole = len(x) - len(x) % 60
        right = sum(
            int((At.model(a).argmax(1) == b).sum())
            for a, b in zip(x[:whole].split(60), y[:whole].split(60), strict=True)
        )
        rest = At.model(x[-60:])[-(len(x) - whole) :]
        right += int((rest.argmax(1) == y[whole:]).sum())
    assert probe(At)["batch_accuracy"] == pytest.approx(right / len(x))
