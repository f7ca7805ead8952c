"""The generated page of the docs, and that no norm is missing from it."""

import importlib.util
from pathlib import Path

import pytest
import torch

import normkit
from normkit.factory import NORMS
from normkit.layers import _Norm

DOCS = Path(__file__).parent.parent / "docs"


def generator(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def norms():
    return generator(DOCS / "norms.py")


def test_the_picture_of_the_layers_is_that_of_the_code():
    said = "docs/design.md is out of date; run make docs"
    assert (DOCS / "design.md").read_text("utf-8") == generator(
        DOCS / "make" / "layers.py"
    ).page(), said


def test_the_committed_table_is_what_the_code_generates(norms):
    said = "docs/norms.md is out of date; run python docs/norms.py"
    assert (DOCS / "norms.md").read_text("utf-8") == norms.page(), said


def test_no_norm_and_no_name_is_missing(norms):
    rows = norms.FORMULA | norms.BESIDE
    public = [getattr(normkit, name) for name in normkit.__all__]
    layers = {c for c in public if isinstance(c, type) and issubclass(c, _Norm)}
    assert {type(norms.make(text)) for text in rows} == layers
    assert [name.partition(":")[0] for name in rows.values() if name] == list(NORMS)


def test_what_create_makes_is_what_its_row_says(norms):
    for text, name in (norms.FORMULA | norms.BESIDE).items():
        if name:
            layer = normkit.create(name.replace("G", "2").replace("S", "4"), 8)
            assert repr(layer) == repr(norms.make(text))


def test_the_table_reads_the_calls(norms):
    cells = dict(zip(norms.HEAD, norms.formula_row("BatchNorm(C)"), strict=True))
    assert cells["source in training"] == "batch"
    assert cells["source in evaluation"] == "running"
    assert cells["pool"] == "batch, positions"
    assert cells["epilogue"] == "`act`, `residual`"
    assert cells["affine"] == "`weight`, `bias`"
    assert "reference" in cells["backends"]
    cells = dict(zip(norms.HEAD, norms.formula_row("RMSNorm(C)"), strict=True))
    assert cells["pool"] == "last axes; no mean"
    assert cells["epilogue"] == "`act`, `add`"
    spec, inputs = norms.call(normkit.GroupNorm(2, 8))
    assert spec.pool.groups == 2
    assert isinstance(inputs.x, torch.Tensor)
