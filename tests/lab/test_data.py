"""Data: the split, the standardization, and each way in which a file can be bad."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch

from normkit.common.errors import LabError, UserCodeError
from normkit.lab.training.config import Config
from normkit.lab.training.data import load_data, scaled


def load(data, **options):
    return load_data(Config(data=str(data), **options).resolved("speed"))


def test_digits_are_split_by_the_stated_rule_and_standardized_by_the_training_part():
    data = load("digits")
    assert [len(part[0]) for part in (data.train, data.validation, data.test)] == [1078, 359, 360]
    x = data.train[0].double()
    assert abs(float(x.mean())) < 1e-6
    assert float(x.std(correction=0)) == pytest.approx(1, abs=1e-6)
    assert abs(float(data.test[0].mean())) > 1e-4
    assert data.fingerprint() == load("digits").fingerprint()


def test_vectors_are_standardized_per_feature_and_constants_stay_finite(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal([0, 5, 3], [1, 100, 0], (300, 3))
    np.savez(tmp_path / "d.npz", x=x, y=rng.integers(0, 3, 300))
    data = load(tmp_path / "d.npz")
    assert torch.allclose(data.train[0].mean(0), torch.zeros(3), atol=1e-5)
    assert data.train[0].std(0, correction=0).tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    assert data.classes == 3


def test_an_npz_with_its_own_parts_keeps_them(tmp_path):
    y = np.arange(120) % 2
    x = np.arange(240.0).reshape(120, 2)
    np.savez(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x[:30], y_test=y[:30])
    data = load(tmp_path / "d.npz")
    assert [len(part[0]) for part in (data.train, data.validation, data.test)] == [100, 20, 30]


def idx(path, array, cut=0):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + array.astype(np.uint8).tobytes()
    packed = gzip.compress(raw[: len(raw) - cut]) if path.suffix == ".gz" else raw
    path.write_bytes(packed)


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for stem, n in (("train", 120), ("t10k", 40)):
        idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", rng.integers(0, 255, (n, 6, 6)))
        idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", np.arange(n) % 10)
    return tmp_path


def test_idx_files_are_read_gzipped_or_not(fashion):
    data = load("fashion-mnist", data_root=str(fashion))
    assert tuple(data.train[0].shape) == (100, 1, 6, 6)
    assert [len(data.validation[0]), len(data.test[0]), data.classes] == [20, 40, 10]
    packed = fashion / "t10k-images-idx3-ubyte.gz"
    (fashion / "t10k-images-idx3-ubyte").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    assert load("fashion-mnist", data_root=str(fashion)).fingerprint() == data.fingerprint()


def test_idx_files_that_are_missing_truncated_or_something_else(fashion):
    path = fashion / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()

    def refused(said):
        with pytest.raises(LabError, match=said):
            load("fashion-mnist", data_root=str(fashion))

    path.write_bytes(whole[: len(whole) // 2])
    refused("train-images-idx3-ubyte.gz is truncated or not gzip")
    path.write_bytes(b"not gzip at all")
    refused("truncated or not gzip")
    idx(path, np.zeros((120, 6, 6)), cut=100)
    refused("its header promises 4,320 bytes, it holds 4,220")
    path.write_bytes(gzip.compress(b"<html>"))
    refused("not an IDX file of unsigned bytes in 3 dimensions")
    idx(path, np.zeros((119, 6, 6)))
    refused("119 train images but 120 labels")
    path.unlink()
    refused("--data-root")


def test_pickled_objects_in_an_npz_are_refused_and_never_unpickled(tmp_path):
    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    np.savez(tmp_path / "d.npz", x=np.array([Trap(), Trap()], dtype=object), y=np.arange(2))
    with pytest.raises(LabError, match="array 'x' holds pickled Python objects"):
        load(tmp_path / "d.npz")
    (tmp_path / "e.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(LabError, match=r"e\.npz is truncated or not an \.npz"):
        load(tmp_path / "e.npz")
    assert not marker.exists()


Y = np.arange(100) % 2
X = np.random.default_rng(0).normal(size=(100, 4))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": X, "y": Y[:99]}, "one label per input"),
        ({"x": X, "y": Y + 0.5}, "labels are torch.float64; give whole class numbers"),
        ({"x": X, "y": Y - 1}, "a label is -1; class numbers start at 0"),
        ({"x": X, "y": Y * 0}, "two classes at least"),
        ({"x": np.where(X > 2, np.nan, X), "y": Y}, "an input is not finite"),
        ({"x": X[:, 0], "y": Y}, r"inputs have shape \(60,\)"),
        ({"x": X.astype(str), "y": Y}, "array 'x' has dtype <U"),
        ({"a": X}, "holds a; an .npz holds either x and y"),
        ({"x": X[:50], "y": Y[:50]}, "--batch-size 60 is more than the 30 training samples"),
        (
            {"x_train": X, "y_train": Y, "x_test": X, "y_test": Y[:9]},
            "test part: 100 inputs but 9 labels",
        ),
    ],
)
def test_a_bad_npz_is_named_with_the_remedy(arrays, said, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(LabError, match=said):
        load(tmp_path / "d.npz")


def test_other_arrays_of_an_npz_stay_unread(tmp_path):
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    plain = load(tmp_path / "d.npz").fingerprint()
    others = {
        "class_names": np.array(["a", "b"]),
        "objects": np.array([{}, None], dtype=object),
        "when": np.array(["2026-01-01"], dtype="datetime64[D]"),
        "spectrum": np.ones(3, complex),
    }
    np.savez(tmp_path / "d.npz", x=X, y=Y, **others)
    assert load(tmp_path / "d.npz").fingerprint() == plain


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threads": 100_000}, "--threads is 100000; .* at most 1,024"),
        ({"seeds": 10**30}, "--seeds is 10{30}; .* at most 100,000"),
        ({"steps": 10**20}, "--steps is 10{20}; .* at most 1,000,000,000"),
        ({"jobs": -1}, "--jobs is -1"),
        ({"device": "meta"}, "--device 'meta' can't be used here"),
        ({"out": "caf\udce9"}, "--out 'caf.*' isn't UTF-8"),
        ({"data_root": "\udcff"}, "--data-root .* isn't UTF-8"),
        ({"out": "a\0b"}, "--out .* holds a zero character"),
        ({"out": ""}, "--out is empty"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_could_only_fail_later_is_refused_at_once(options, said):
    with pytest.raises(LabError, match=said):
        Config(**options).resolved("speed")


def test_an_npz_that_is_missing_or_truncated(tmp_path):
    with pytest.raises(LabError, match="no such file"):
        load(tmp_path / "none.npz")
    np.savez(tmp_path / "d.npz", x=X, y=Y)
    whole = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LabError, match="truncated or not an"):
        load(tmp_path / "d.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(LabError, match="can't be read"):
        load(tmp_path / "folder.npz")


USER = """
import torch
from torch.utils.data import Dataset, TensorDataset
g = torch.Generator().manual_seed(0)
x, y = torch.randn(200, 3, generator=g), torch.arange(200) % 3
def tensors():
    return (x[:100], y[:100]), (x[100:150], y[100:150]), (x[150:], y[150:])
class Mine(Dataset):
    def __init__(self, a, b):
        self.a, self.b = a, b
    def __len__(self):
        return self.b - self.a
    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return x[self.a + i], int(y[self.a + i])
def datasets():
    return Mine(0, 100), TensorDataset(x[100:150], y[100:150]), Mine(150, 200)
def two():
    return (x, y), (x, y)
def raises():
    return 1 / 0
"""


def test_a_function_may_give_tensors_or_datasets_and_its_errors_are_its_own(tmp_path, monkeypatch):
    (tmp_path / "userdata.py").write_text(USER)
    monkeypatch.syspath_prepend(tmp_path)
    assert load("userdata:tensors").fingerprint() == load("userdata:datasets").fingerprint()
    with pytest.raises(LabError, match="must return three parts"):
        load("userdata:two")
    with pytest.raises(LabError, match="Did you mean 'tensors'"):
        load("userdata:tensor")
    with pytest.raises(LabError, match="no module 'nosuchmodule'"):
        load("nosuchmodule:f")
    with pytest.raises(UserCodeError) as caught:
        load("userdata:raises")
    assert "return 1 / 0" in str(caught.value)
    assert "ZeroDivisionError" in str(caught.value)
    assert "normkit" not in str(caught.value)


def test_unknown_data_names_the_near_match():
    with pytest.raises(LabError, match="Did you mean 'digits'"):
        load("digit")


@pytest.mark.parametrize("name", ["digits", "wine", "breast-cancer"])
def test_inputs_can_be_scaled_in_other_ways_by_the_training_part_alone(name):
    data = load_data(Config(data=name))
    assert scaled(data, "standardized") is data
    raw = scaled(data, "raw")
    back = (raw.test[0].double() - data.mean) / data.deviation
    assert torch.allclose(back, data.test[0].double(), atol=1e-3)
    over = [0, *range(2, data.train[0].ndim)]
    between = scaled(data, "min-max").train[0]
    assert torch.allclose(between.amin(over), torch.zeros(()), atol=1e-6)
    assert torch.allclose(between.amax(over), torch.ones(()), atol=1e-6)
    white = scaled(data, "whitened").train[0].double().flatten(1).numpy()
    variances = np.linalg.eigvalsh(np.cov(white.T, bias=True))
    # 1, or less for directions below the floor; never more.
    assert variances.max() < 1 + 1e-3
    assert np.median(variances) == pytest.approx(1, abs=1e-3)
    assert torch.equal(raw.test[1], data.test[1])


def test_raw_wine_is_what_scikit_learn_gives():
    from sklearn.datasets import load_wine

    data = load_data(Config(data="wine"))
    parts = scaled(data, "raw")
    together = torch.cat([parts.train[0], parts.validation[0], parts.test[0]]).double()
    order = torch.randperm(178, generator=torch.Generator().manual_seed(0))
    wanted = torch.from_numpy(load_wine().data)[order]
    assert torch.allclose(together, wanted, rtol=1e-5, atol=1e-5)
