"""The data of a study, as tensors that stay in memory: training, validation and test parts.

Split by a fixed rule, the same for every seed: where the source has no parts of its own, one
permutation (drawn with seed 0) gives 60 % training, 20 % validation and 20 % test. Inputs are
standardized by the training part only: one mean and one deviation per channel of an image, per
feature of a vector. `scaled` gives them as they came, or scaled in other ways.
"""

import dataclasses
import functools
import gzip
import hashlib
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.common.errors import LabError, unknown
from normkit.common.user_code import call, load
from normkit.lab.training.config import NAMED_DATA, Config

PARTS = ("train", "validation", "test")
_FASHION_ROOT = "/usr/share/datasets/fashion-mnist"
_FASHION_VALIDATION = 10_000
# Accuracy along the way is measured on at most this many validation samples.
_VALIDATION_CAP = 1_000


@dataclass(frozen=True)
class Data:
    """Standardized inputs (N, C, ...) and labels (N,) of three parts, all on one device.

    `mean` and `deviation`, (1, C, ...) in float64, are those of the training part as it came.
    """

    name: str
    rule: str
    classes: int
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    mean: Tensor
    deviation: Tensor

    def fingerprint(self) -> str:
        """Return the SHA-256 of all values, to notice data that changed between two runs."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation, self.test):
            for tensor in part:
                digest.update(str(tuple(tensor.shape)).encode())
                digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
        return digest.hexdigest()


def load_data(config: Config) -> Data:
    """Load the data that `config.data` names, split and standardized, on `config.device`.

    Raises LabError when it is unknown, missing, truncated, of the wrong type, or doesn't fit.
    """
    name = config.data
    if name == "digits":
        parts, rule = _digits()
    elif name in ("wine", "breast-cancer"):
        parts, rule = _table(name)
    elif name == "fashion-mnist":
        parts, rule = _fashion(Path(config.data_root or _FASHION_ROOT))
    elif name.endswith(".npz"):
        path = Path(name)
        parts, rule = _npz(path if path.is_absolute() else Path(config.data_root or ".") / path)
    elif ":" in name:
        parts, rule = _from_function(name)
    else:
        hint = "Or a file.npz, or package.module:function."
        raise unknown("data", name, NAMED_DATA, hint)
    return _finish(name, rule, parts, config)


Part = tuple[Tensor, Tensor]


def _finish(name: str, rule: str, parts: dict[str, Part], config: Config) -> Data:
    for part, (x, y) in parts.items():
        where = f"data {name!r}, {part} part"
        if x.ndim < 2:
            raise LabError(f"{where}: inputs have shape {tuple(x.shape)}; give (N, features...)")
        if y.ndim != 1:
            raise LabError(f"{where}: labels have shape {tuple(y.shape)}; give (N,) class numbers")
        if len(x) != len(y):
            raise LabError(
                f"{where}: {len(x)} inputs but {len(y)} labels; give one label per input"
            )
        if len(x) == 0:
            raise LabError(f"{where} is empty; give at least one sample")
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise LabError(f"{where}: labels are {y.dtype}; give whole class numbers from 0")
        if int(y.min()) < 0:
            raise LabError(f"{where}: a label is {int(y.min())}; class numbers start at 0")
        if not bool(torch.isfinite(x).all()):
            raise LabError(f"{where}: an input is not finite; remove or fill those values first")
        if x.shape[1:] != parts["train"][0].shape[1:]:
            raise LabError(
                f"{where}: inputs of shape {tuple(x.shape[1:])}, "
                f"but {tuple(parts['train'][0].shape[1:])} in the training part"
            )
    x, y = parts["train"]
    if len(x) < config.batch_size:
        raise LabError(
            f"--batch-size {config.batch_size} is more than the {len(x)} training samples of "
            f"{name!r}; give a smaller one"
        )
    classes = int(max(int(y.max()) for _, y in parts.values())) + 1
    if classes < 2:
        raise LabError(f"data {name!r}: all labels are 0; two classes at least are needed")
    over = [0, *range(2, x.ndim)]
    mean = x.double().mean(over, keepdim=True)
    deviation = x.double().std(over, keepdim=True, correction=0)
    deviation[deviation == 0] = 1.0

    def put(x: Tensor, y: Tensor) -> Part:
        standard = ((x.double() - mean) / deviation).float()
        return standard.contiguous().to(config.device), y.long().contiguous().to(config.device)

    x, y = parts["validation"]
    return Data(
        name=name,
        rule=rule,
        classes=classes,
        train=put(*parts["train"]),
        validation=put(x[:_VALIDATION_CAP], y[:_VALIDATION_CAP]),
        test=put(*parts["test"]),
        mean=mean.to(config.device),
        deviation=deviation.to(config.device),
    )


def scaled(data: Data, inputs: str) -> Data:
    """Return the data with its inputs scaled in another way, always by the training part alone.

    "standardized" is the data as it is. "raw" undoes that. "min-max" brings each feature or channel
    into [0, 1]; one that doesn't vary becomes 0. "whitened" makes all features (those of an image:
    its pixels) uncorrelated with variance 1, turned back to where they were (ZCA); directions with
    less than 1e-3 of the mean variance are left at the scale of that floor.
    """
    if inputs == "standardized":
        return data
    x = data.train[0].double()
    if inputs == "raw":
        change = _affine(data.deviation, data.mean)
    elif inputs == "min-max":
        over = [0, *range(2, x.ndim)]
        low, high = x.amin(over, keepdim=True), x.amax(over, keepdim=True)
        span = torch.where(high > low, high - low, 1.0)
        change = _affine(1 / span, -low / span)
    else:
        flat = x.flatten(1)
        mean = flat.mean(0)
        values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
        floor = 1e-3 * values.mean()
        turn = vectors @ torch.diag(values.clamp(min=floor).rsqrt()) @ vectors.T
        change = functools.partial(_whiten, mean=mean, turn=turn)

    def changed(part: Part) -> Part:
        return change(part[0].double()).float(), part[1]

    return dataclasses.replace(
        data,
        train=changed(data.train),
        validation=changed(data.validation),
        test=changed(data.test),
    )


def _affine(scale: Tensor, shift: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x * scale + shift


def _whiten(x: Tensor, mean: Tensor, turn: Tensor) -> Tensor:
    return ((x.flatten(1) - mean) @ turn).reshape(x.shape)


def _split(x: Tensor, y: Tensor) -> tuple[dict[str, Part], str]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    a, b = int(0.6 * len(x)), int(0.8 * len(x))
    cut = dict(zip(PARTS, (order[:a], order[a:b], order[b:]), strict=True))
    return (
        {part: (x[index], y[index]) for part, index in cut.items()},
        "60 % training, 20 % validation, 20 % test, by one permutation drawn with seed 0",
    )


def _digits() -> tuple[dict[str, Part], str]:
    from sklearn import datasets  # type: ignore[import-untyped]

    found = datasets.load_digits()
    x = torch.from_numpy(found.images).float().unsqueeze(1)
    return _split(x, torch.from_numpy(found.target).long())


def _table(name: str) -> tuple[dict[str, Part], str]:
    from sklearn import datasets

    load = {"wine": datasets.load_wine, "breast-cancer": datasets.load_breast_cancer}[name]
    found = load()
    return _split(torch.from_numpy(found.data), torch.from_numpy(found.target).long())


def _fashion(root: Path) -> tuple[dict[str, Part], str]:
    def pair(stem: str) -> Part:
        x = _idx(root, f"{stem}-images-idx3-ubyte", 3)
        y = _idx(root, f"{stem}-labels-idx1-ubyte", 1)
        if len(x) != len(y):
            raise LabError(
                f"{root}: {len(x)} {stem} images but {len(y)} labels; get both files anew"
            )
        return x.unsqueeze(1).float(), y.long()

    x, y = pair("train")
    # A sixth of a smaller copy, so that a cut-down data set still has a training part.
    held = min(_FASHION_VALIDATION, len(x) // 6)
    cut = len(x) - held
    parts = {"train": (x[:cut], y[:cut]), "validation": (x[cut:], y[cut:]), "test": pair("t10k")}
    rule = f"the first {cut:,} training images train, the last {held:,} validate; its own test part"
    return parts, rule


def _idx(root: Path, stem: str, dims: int) -> Tensor:
    """Read one IDX file, gzipped or not: magic, big-endian sizes, unsigned bytes."""
    path = next((p for p in (root / f"{stem}.gz", root / stem) if p.is_file()), None)
    if path is None:
        raise LabError(
            f"{root / stem}.gz: no such file. Install Debian's package dataset-fashion-mnist, "
            "or name the folder that holds the four IDX files with --data-root"
        )
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise LabError(f"{path} is truncated or not gzip ({error}); get the file anew") from None
    except OSError as error:
        raise LabError(f"{path} can't be read: {error}") from None
    header = 4 + 4 * dims
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, dims)):
        raise LabError(
            f"{path} is not an IDX file of unsigned bytes in {dims} dimensions "
            f"(it starts with {raw[:4].hex() or 'nothing'}); get the file anew"
        )
    sizes = struct.unpack(f">{dims}I", raw[4:header])
    expected = int(np.prod(sizes, dtype=np.int64))
    if len(raw) - header != expected:
        raise LabError(
            f"{path} is truncated or too long: its header promises {expected:,} bytes, "
            f"it holds {len(raw) - header:,}; get the file anew"
        )
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).reshape(sizes)


_NPZ_HELP = (
    "an .npz holds either x and y, or x_train, y_train, x_test, y_test "
    "and, if it likes, x_validation, y_validation"
)
_NPZ_KEYS = {f"{name}{part}" for name in "xy" for part in ("", "_train", "_validation", "_test")}


def _npz(path: Path) -> tuple[dict[str, Part], str]:
    try:
        # Never unpickled: a pickle runs code when it is read.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not hasattr(archive, "files"):
                raise LabError(f"{path} is a single array, not an .npz; {_NPZ_HELP}")
            # Others stay unread: they may be class names, or anything else.
            known = [key for key in archive.files if key in _NPZ_KEYS]
            arrays = {key: _array(path, archive, key) for key in known}
            found = ", ".join(sorted(archive.files)) or "nothing"
    except FileNotFoundError:
        raise LabError(f"data file {path}: no such file") from None
    except (zipfile.BadZipFile, EOFError, zlib.error, ValueError) as error:
        raise LabError(f"{path} is truncated or not an .npz ({error}); save it anew") from None
    except OSError as error:
        raise LabError(f"{path} can't be read: {error}") from None
    if {"x", "y"} <= arrays.keys():
        _same_count(path, arrays["x"], arrays["y"])
        return _split(arrays["x"], arrays["y"])
    if not {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        raise LabError(f"{path} holds {found}; {_NPZ_HELP}")
    x, y = arrays["x_train"], arrays["y_train"]
    _same_count(path, x, y)
    test = (arrays["x_test"], arrays["y_test"])
    if {"x_validation", "y_validation"} <= arrays.keys():
        held = (arrays["x_validation"], arrays["y_validation"])
        return {"train": (x, y), "validation": held, "test": test}, "the file's own three parts"
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cut = len(x) - len(x) // 6
    parts = {
        "train": (x[order[:cut]], y[order[:cut]]),
        "validation": (x[order[cut:]], y[order[cut:]]),
        "test": test,
    }
    return parts, "a sixth of the training part validates, drawn with seed 0; its own test part"


def _array(path: Path, archive: Any, key: str) -> Tensor:
    try:
        array = archive[key]
    except ValueError as error:
        if "pickle" not in str(error).lower():
            raise
        raise LabError(
            f"{path}: array {key!r} holds pickled Python objects, which are never loaded, since "
            "that runs code; save it as a plain number array (np.savez with a numeric dtype)"
        ) from None
    if array.dtype.kind not in "fiub":
        raise LabError(f"{path}: array {key!r} has dtype {array.dtype}; give numbers")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


def _same_count(path: Path, x: Tensor, y: Tensor) -> None:
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise LabError(
            f"{path}: inputs of shape {tuple(x.shape)} but labels of shape {tuple(y.shape)}; "
            "give one label per input"
        )


def _from_function(name: str) -> tuple[dict[str, Part], str]:
    returned = call(load(name, "data"), f"loading data {name!r}")
    if not isinstance(returned, tuple | list) or len(returned) != 3:
        raise LabError(
            f"data {name!r} returned a {type(returned).__name__}; it must return three parts "
            "(train, validation, test), each a pair of tensors (x, y) or a Dataset"
        )
    parts = {
        part: call(_as_part, f"reading the {part} part of {name!r}", value, name, part)
        for part, value in zip(PARTS, returned, strict=True)
    }
    return parts, "the three parts that the function returns"


def _as_part(value: Any, name: str, part: str) -> Part:
    if isinstance(value, torch.utils.data.TensorDataset):
        value = value.tensors
    if isinstance(value, tuple | list) and len(value) == 2:
        x, y = value
        if isinstance(x, np.ndarray | Tensor) and isinstance(y, np.ndarray | Tensor):
            return torch.as_tensor(x), torch.as_tensor(y)
    if hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        pairs = [value[i] for i in range(len(value))]
        if pairs and all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            x = torch.stack([torch.as_tensor(pair[0]) for pair in pairs])
            return x, torch.stack([torch.as_tensor(pair[1]) for pair in pairs])
    raise LabError(
        f"data {name!r}: the {part} part is a {type(value).__name__}; "
        "give a pair of tensors (x, y) or a Dataset of such pairs"
    )
