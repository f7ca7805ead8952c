"""Write docs/norms.md, the table of every norm, from the code: `python docs/norms.py`.

What a layer pools, where its statistics come from and which backends take it is read off the calls
that it makes; its affine, epilogue and extras off its constructor and its forward.
"""

import copy
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normkit
from normkit import api, backend, parametrizations
from normkit.common.files import write
from normkit.factory import NORMS, Entry, arguments
from normkit.formula.spec import Inputs, Spec

PAGE = Path(__file__).parent / "norms.md"

WEIGHTS = (
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.weight_standardization,
)

POOLS = {
    "ns": "batch, positions",
    "s": "positions",
    "ks": "channels of a group, positions",
    "k": "channels",
}

EPILOGUE = ("act", "residual", "add")
METHODS = ("freeze", "accumulate", "synchronize")

TEXT = """\
# Every norm

Written by `python docs/norms.py` from the code. C are channels, G groups, S samples.

## Cases of the formula

    y = act((x - mean) * rstd * weight + bias [+ residual])

*Pool*: the elements that share a mean and a variance. *Source*: the batch's own statistics or the
running averages. *Extras*: what the call takes besides, a weight and a bias given by the caller
(conditional affine) among it, and methods.

{formula}

`create` makes these for the channels of (N, C, \\*). The layers named as torch's take torch's
constructor.

## Beside the formula

{beside}

## Reparametrized weights

{weights}
"""

HEAD = ("norm", "`create`", "pool", "source in training", "source in evaluation")
HEAD += ("affine", "epilogue", "backends", "extras")


def rows(name: str, entry: Entry) -> dict[str, str]:
    """How the layers of an entry are made -> the name in `normkit.create`, if it has one."""
    letters = {entry.features: "C"}
    if entry.number is not None:
        letters[entry.number] = entry.number.rpartition("_")[2][0].upper()
    given = [letters[argument] for argument in arguments(entry.layer) if argument in letters]
    preset = [f"{argument}={value}" for argument, value in entry.preset.items()]

    def text(layer: type[nn.Module], *more: str) -> str:
        return f"{layer.__name__}({', '.join([*given, *more])})"

    created = text(entry.layer, *preset)
    found = {text(layer): "" for layer in entry.ranked}
    if preset and entry.pool:
        found[text(entry.layer)] = ""
    found[created] = ":".join([name, *(letters[n] for n in [entry.number] if n is not None)])
    if getattr(make(created), "track_running_stats", True) is False:
        found[text(entry.layer, "track_running_stats=True")] = ""
    return found


def make(text: str, **more: Any) -> nn.Module:
    """The layer of a row, with 8 channels in 2 groups, and ghost batches of 4 samples."""
    return eval(f"{text[:-1]}, **more)", vars(api) | {"C": 8, "G": 2, "S": 4, "more": more})


def table_of(*, formula: bool) -> dict[str, str]:
    """All rows of the norms that are cases of the formula, or of those that aren't."""
    chosen = [rows(name, entry) for name, entry in NORMS.items() if bool(entry.pool) == formula]
    return {text: name for found in chosen for text, name in found.items()}


def call(layer: nn.Module) -> tuple[Spec, Inputs]:
    """What the layer hands to a backend by itself, for an input of the first rank that it takes."""
    if isinstance(layer, normkit.BatchNorm):
        layer = copy.deepcopy(layer)
        layer.merge = None
    for rank in (3, 4, 5):
        with torch.no_grad(), backend.watch() as calls:
            try:
                layer(torch.randn((8,) * rank))
            except ValueError:
                continue
        return calls[-1]
    raise AssertionError(f"{layer} takes no input of three to five axes")


FORMULA = table_of(formula=True)
BESIDE = table_of(formula=False) | {"Standardize(C)": ""}


def formula_row(text: str) -> list[str]:
    """The cells of a case of the formula."""
    layer = make(text)
    constructor = arguments(type(layer))
    forward = list(inspect.signature(type(layer).forward).parameters)[2:]
    methods = [f"{name}()" for name in METHODS if hasattr(layer, name)]
    spec, inputs = call(layer.train())
    return [
        f"`{text}`",
        code([FORMULA[text]] if FORMULA[text] else []),
        pool(spec),
        source(layer.train()),
        source(layer.eval()),
        affine(text),
        code([name for name in EPILOGUE if name in (*constructor, *forward)]),
        ", ".join(n for n, b in backend.BACKENDS.items() if b.why_not(spec, inputs) is None),
        code([*(name for name in forward if name not in EPILOGUE), *methods]),
    ]


def pool(spec: Spec) -> str:
    """The elements that share statistics, in words."""
    name = "last axes" if spec.pool.trailing else POOLS[spec.pool.summed]
    name = name.replace("batch", "ghost batch") if spec.pool.ghosts else name
    return name if spec.center else f"{name}; no mean"


def source(layer: nn.Module) -> str:
    """Where the statistics come from: what the layer hands over, and what its output depends on."""
    spec, inputs = call(layer)
    if spec.given:
        return "running"
    outputs = []
    for mean in (0.0, 1.0):
        copied: Any = copy.deepcopy(layer)
        copied.merge = None
        values = {"running_mean": mean, "running_var": 1.0, "num_batches_tracked": 10**6}
        for name, buffer in copied.named_buffers():
            buffer.fill_(values[name])
        outputs.append(copied(inputs.x))
    if isinstance(layer, normkit.SyncBatchNorm):
        return "batches of all ranks"
    return "batch" if torch.equal(*outputs) else "batch, corrected towards running"


def affine(text: str) -> str:
    """The names of weight and bias, and whether they must be asked for, or are fixed."""
    options = {"affine", "elementwise_affine"} & set(arguments(type(make(text))))
    layer, full = make(text), make(text, **dict.fromkeys(options, True))
    names = code([n for n in ("weight", "bias") if getattr(full, n, None) is not None])
    if layer.weight is None:
        return f"off; {names}"
    return names if list(layer.parameters()) else f"{names}, fixed"


def code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def summary(thing: object) -> str:
    """The first sentence of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page() -> str:
    """The whole page."""
    beside = [
        (f"`{text}`", code([name] if name else []), summary(type(make(text))), parameters(text))
        for text, name in BESIDE.items()
    ]
    weights = [(f"`{f.__name__}(layer)`", summary(f)) for f in WEIGHTS]
    return TEXT.format(
        formula=table(HEAD, map(formula_row, FORMULA)),
        beside=table(("layer", "`create`", "what it is", "parameters and buffers"), beside),
        weights=table(("in `normkit.parametrizations`", "what it is"), weights),
    )


def parameters(text: str) -> str:
    return code(list(make(text).state_dict()))


if __name__ == "__main__":
    write(PAGE, page())
