"""The distributions of layers' values: NumPy's, of the right values, without a trace."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from normkit.lab.report.distributions import PERCENTS, figure, look, percentiles
from normkit.lab.results.store import Run
from normkit.lab.training.arms import Arm
from normkit.lab.training.batches import Batches
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data
from normkit.lab.training.models import build
from normkit.lab.training.probe import Probe
from normkit.lab.training.probe import look as looked
from normkit.lab.training.train import advance, make_optimizer

PLAIN, BATCH = Arm("none", "no norm"), Arm("batch", "batch norm", norm="batch")


def probe(arm, **options):
    config = Config(**options).resolved("speed")
    data = load_data(config)
    model = build(config, data, arm, 0)
    optimizer = make_optimizer(model, config, 1.0)
    batches = Batches(data.train, 60, 0)
    advance(model, optimizer, batches, 0, 5)
    return Probe(model, optimizer, batches, 5, data, config, arm, 0)


def numpys(values):
    return {p: float(np.percentile(values, p, method="nearest")) for p in PERCENTS}


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300))
def test_percentiles_are_numpys(values):
    assert percentiles(torch.tensor(values)) == numpys(np.array(values, np.float32))


def test_a_layer_with_a_value_that_is_not_finite_has_none():
    assert percentiles(torch.tensor([1.0, float("nan")])) == {}
    assert percentiles(torch.tensor([1.0, float("inf")])) == {}


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_they_are_those_of_what_goes_into_and_comes_out_of_every_norm(model):
    at = probe(BATCH, model=model)
    found = looked(look, at)
    x = at.data.validation[0][:100]
    expected, place = {}, 0
    with torch.no_grad():
        at.model.eval()
        # The network is a Sequential: its layers one after the other are an oracle of the hooks.
        for layer in at.model:
            after = layer(x)
            if type(layer).__name__ == "BatchNorm":
                place += 1
                for side, values in (("before", x), ("after", after)):
                    for percent, value in numpys(values.numpy().ravel()).items():
                        expected[f"layer {place} {side} p{percent}"] = value
            x = after
    assert place == 3
    assert found == expected


def test_without_norms_they_are_those_of_the_activations_inputs():
    at = probe(PLAIN, activation="tanh")
    found = looked(look, at)
    x, expected = at.data.validation[0][:100], {}
    with torch.no_grad():
        for layer in at.model:
            if isinstance(layer, nn.Tanh):
                place = 1 + len(expected) // len(PERCENTS)
                for percent, value in numpys(x.numpy().ravel()).items():
                    expected[f"layer {place} before p{percent}"] = value
            x = layer(x)
    assert len(expected) == 15
    assert found == expected


class Functional(nn.Module):
    """A network whose activations are no modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)).relu())


def test_without_any_modules_to_look_at_they_are_the_layers_outputs():
    at = probe(PLAIN)
    own = Functional()
    found = look(Probe(own, at.optimizer, at.batches, 0, at.data, at.config, PLAIN, 0))
    with torch.no_grad():
        values = own.first(at.data.validation[0][:100].flatten(1)).numpy()
    expected = {f"layer 1 before p{p}": value for p, value in numpys(values.ravel()).items()}
    assert found == expected


def test_no_trace_is_left_and_the_next_step_is_bitwise_the_same():
    at = probe(BATCH, model="cnn")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in at.model.modules()]
    untouched = Probe(copy.deepcopy(at.model), None, at.batches, 5, at.data, at.config, BATCH, 0)
    state = torch.get_rng_state()
    looked(look, at)
    assert torch.equal(torch.get_rng_state(), state)
    assert at.model.training
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in at.model.modules()]
    assert after == hooks
    other = make_optimizer(untouched.model, at.config, 1.0)
    advance(at.model, at.optimizer, at.batches, 5, 6)
    advance(untouched.model, other, at.batches, 5, 6)
    mine, theirs = at.model.state_dict(), untouched.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def run(seed, shift, layers, sides, status="finished"):
    curves = {
        f"layer {place} {side} p{percent}": ([10, 20], [shift + percent, shift + 2 * percent])
        for place in range(1, layers + 1)
        for side in sides
        for percent in PERCENTS
    }
    return Run(seed, "arm", seed, status, 20, 1.0, 0.9, curves)


def test_the_figure_has_a_row_for_every_arm_and_side_and_the_median_over_the_seeds():
    runs = {
        "none": [run(seed, seed, 3, ["before"]) for seed in range(3)],
        "batch": [run(seed, 10 * seed, 3, ["before", "after"]) for seed in range(3)],
    }
    made = figure("d", "D", runs, {"none": ("no norm", 0), "batch": ("batch norm", 1)})
    lines = {(t["xaxis"], t["yaxis"]): t for t in made.traces if t["meta"] == "line"}
    # Three rows of three layers, each with two bands and one line.
    assert len(lines) == 9
    assert sum(t["meta"] == "band" for t in made.traces) == 18
    assert lines["x", "y"]["y"] == [51.0, 101.0]
    assert lines["x6", "y6"]["y"] == [60.0, 110.0]
    bands = [t["y"] for t in made.traces if t["meta"] == "band" and t["xaxis"] == "x4"]
    assert bands == [[105, 200, 20, 15], [95, 180, 40, 25]]
    assert made.layout["headings"][0] == "layer 1 · no norm, into the activation"
    assert made.layout["headings"][8] == "layer 3 · batch norm, after the norm"
    # All layers of a row share an axis; rows don't.
    assert [made.layout[f"yaxis{i}"].get("matches") for i in (2, 3, 4, 5)] == ["y", "y", None, "y4"]
    assert "N = 3" in made.caption
    assert "15th, 50th and 85th percentile 16, 51, 86 at first" in made.alt


def test_of_many_layers_five_are_shown_and_the_caption_says_so():
    made = figure("d", "D", {"none": [run(0, 0, 19, ["before"])]}, {"none": ("no norm", 0)})
    assert [text.partition(" · ")[0] for text in made.layout["headings"]] == [
        f"layer {place}" for place in (1, 6, 10, 14, 19)
    ]
    assert "5 of 19 layers are shown" in made.caption


def test_arms_that_were_not_looked_at_or_diverged_give_no_figure():
    shown = {"none": ("no norm", 0)}
    assert figure("d", "D", {"none": [run(0, 0, 0, [])]}, shown) is None
    assert figure("d", "D", {"none": [run(0, 0, 3, ["before"], "diverged")]}, shown) is None
    assert figure("d", "D", {}, shown) is None
