"""The doctor's catalogue: each fault is named first in both networks, and its advice mends it."""

import copy

import pytest
import torch
from digits import NETWORKS, fit, loss
from planted import CATALOGUE
from torch import nn

import normkit

EVERY = [(fault, name) for fault in CATALOGUE for name in NETWORKS]
IDS = [f"{fault.name} in the {name}" for fault, name in EVERY]

CHANGES_INPUTS = ("x = ", "isfinite", "and the batches too")


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def evaluated(model, batches):
    """The mean loss in evaluation; infinite where it is NaN."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        value = float(sum(loss(model(b[0]), b) for b in batches) / len(batches))
    return value if value == value else float("inf")


def mended(case, finding):
    """The case after the printed lines were run as they stand, and what they leave to be done."""
    scope = {"normkit": normkit, "torch": torch, "model": case.model, "loader": case.loader}
    scope |= case.more
    if finding.fix.startswith("x = "):
        scope["x"] = torch.empty(0)
    exec(finding.fix, scope)
    case.loader = scope["loader"]
    if finding.fix.startswith("x = "):

        def prepared(batches):
            result = []
            for scope["x"], y in batches:
                exec(finding.fix, scope)
                result.append((scope["x"], y))
            return result

        if "validation data" in finding.fix:
            case.more["validation"] = prepared(case.more["validation"])
        else:
            case.loader = prepared(case.loader)
    if "and the batches too" in finding.fix:
        case.loader = [(x.bfloat16(), y) for x, y in case.loader]
    if "then train on" in finding.fix:
        fit(case.model, list(case.loader), 3, training=case.model.training)
    if "remove the train()" in finding.fix:
        case.model = nn.Sequential(*case.model)
    return case


@pytest.mark.parametrize(("fault", "name"), EVERY, ids=IDS)
def test_each_fault_is_named_first_and_its_advice_mends_it(fault, name):
    case = fault.plant(name)
    first, *_ = case.inspect().rows
    assert first.name == fault.rule
    batches = list(case.loader)
    before = evaluated(case.model, batches)
    case = mended(case, first)
    assert fault.rule not in {f.name for f in case.inspect().rows}
    if any(words in first.fix for words in CHANGES_INPUTS):
        batches = list(case.loader)
    assert evaluated(case.model, batches) <= before + 1e-3
