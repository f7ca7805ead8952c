"""Norms of other packages, recognized by what they compute.

A module that looks like a norm, by its class's name or by a weight and an eps, is copied. The copy
gets weights of its own and runs on inputs of its own, in several shapes, layouts, dtypes and
scales, in training and in evaluation; so does every layer of normkit that has its tensors. It is
the one whose outputs, strides, dtypes, gradients and running statistics agree. The module itself is
never called.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normkit.factory import NORMS
from normkit.tools.build import adopt, behind, make
from normkit.tools.followed import follow
from normkit.tools.known import Norm, Unknown, children_behind, dims_of, fused, known
from normkit.tools.restore import preserved

_NAMED = re.compile(r"[Nn]orm|NORM|(BN|GRN|FRN|DyT|A[Bb]n)(\d[dD])?(_?[Aa]ct)?$")
_NOT_NORMS = re.compile(r"normal(?!i)|denorm|abnorm", re.IGNORECASE)
_HELPERS = ("torch.nn.utils", "torch.distributions", "normkit.parametrizations")
_FAMILIES = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12, 1e-3)
"""What an eps is that stands in a forward and in no attribute."""

_EQUAL = 2e-5
"""Largest error over largest output in float32 and float64: other orders of summation."""
_ROUNDED = {torch.bfloat16: 2**-5, torch.float16: 2**-8}
"""The same in half precision where a norm rounds between its steps: 4 units in the last place."""
_FLIPPED = 0.02
"""Share of outputs that may be a unit in the last place off, where the order of casts agrees."""


def recognize(module: nn.Module) -> Norm | Unknown | None:
    """What norm a module computes, of those in `NORMS`; None where it doesn't look like one.

    A verdict is kept for all modules of one class with equal attributes and shapes.
    """
    if not _looks_like_one(module):
        return None
    if why := _unusable(module):
        return Unknown(why)
    key = _key(module)
    if key is None:
        return _verdict(module)
    if key not in _VERDICTS:
        _VERDICTS[key] = _verdict(module)
    return _VERDICTS[key]


_VERDICTS: dict[Hashable, Norm | Unknown] = {}


@functools.cache
def _is_named(package: str, name: str) -> bool:
    """Whether a class is called a norm."""
    return not package.startswith(_HELPERS) and bool(_NAMED.search(_NOT_NORMS.sub("", name)))


def _looks_like_one(module: nn.Module) -> bool:
    """By its class's name, or by having an eps and tensors of one value a channel.

    What holds a norm or a layer with weights inside, and no tensor itself, is made of others.
    """
    own = _tensors(module)
    if isinstance(module, _FAMILIES):
        return True
    if not _is_named(type(module).__module__, type(module).__name__):
        eps = any("eps" in name and isinstance(v, float) for name, v in vars(module).items())
        sizes = {t.numel() for t in own.values() if t.dim()}
        rows = all(t.numel() == max(t.shape) for t in own.values() if t.dim())
        return eps and rows and len(sizes) == 1 and not module._modules
    inside = [child for child in module.modules() if child is not module]
    if any(known(child) or _looks_like_one(child) for child in inside):
        return False
    return bool(own) or not any(_tensors(child) for child in inside)


def _unusable(module: nn.Module) -> str | None:
    """Why a module can't be held against normkit's layers; None where it can."""
    if "forward" in vars(module):
        return "its forward was replaced on the module"
    if "parametrizations" in module._modules:
        return "it is parametrized, and its class isn't known"
    if isinstance(module, nn.SyncBatchNorm):
        return "it has a forward of its own, and what ranks exchange can't be tried here"
    if any(child._modules or isinstance(child, nn.ModuleList) for child in module.children()):
        return f"it holds modules of its own: {', '.join(module._modules)}"
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if len(parameters) != 1 or parameters[0].kind is not parameters[0].POSITIONAL_OR_KEYWORD:
        names = ", ".join(str(p) for p in parameters) or "nothing"
        return f"its forward takes {names}, not a tensor alone"
    strange = [name for name in _tensors(module) if name not in _ROLES]
    if strange:
        return f"it has {', '.join(strange)}, and a swap would change names in the state dict"
    if _shape(module) is None:
        return "it has no weight and no normalized_shape that tell what it normalizes"
    return None


_ROLES = ("weight", "bias", "tau", "running_mean", "running_var", "num_batches_tracked")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _shape(module: nn.Module) -> tuple[int, ...] | None:
    tensors = _tensors(module)
    for name in ("weight", "bias", "running_mean"):
        if name in tensors and tensors[name].dim():
            return tuple(tensors[name].shape)
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, int):
        return (shape,)
    return tuple(shape) if shape else None


def _key(module: nn.Module) -> Hashable | None:
    """What a verdict depends on, where all of that can be compared."""
    plain = (int, float, str, tuple, list, type(None), torch.dtype)
    attributes = {
        name: value
        for name, value in vars(module).items()
        if name not in ("training", *vars(_EMPTY))
    }
    if not all(isinstance(value, plain) for value in attributes.values()):
        return None
    tensors = _tensors(module)
    return (
        type(module),
        type(module).forward,
        repr(sorted(attributes.items())),
        tuple((n, t.shape, t.dtype, n in module._parameters) for n, t in tensors.items()),
        tuple((n, type(c), repr(c)) for n, c in module._modules.items()),
    )


_EMPTY = nn.Module()


def _verdict(module: nn.Module) -> Norm | Unknown:
    generator = torch.Generator().manual_seed(0)
    try:
        twin = _twin(module, generator)
    except Exception as error:
        return Unknown(f"it can't be copied: {error}")
    with (
        preserved(twin),
        warnings.catch_warnings(action="ignore"),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        return _held_against(twin, generator)


def _twin(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy on the CPU with random values, without hooks."""
    twin = type(module).__new__(type(module))
    tensors = ("_parameters", "_buffers")
    for name, value in vars(module).items():
        fresh: Any = OrderedDict() if "_hooks" in name else {} if name in tensors else None
        vars(twin)[name] = copy.deepcopy(value) if fresh is None else fresh
    for name in tensors:
        for key, tensor in getattr(module, name).items():
            if tensor is None:
                getattr(twin, name)[key] = None
                continue
            value = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            if key in ("weight", "running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            else:
                value.normal_(0, 0.5, generator=generator)
            if not tensor.is_floating_point():
                value = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
            if name == "_parameters":
                value = nn.Parameter(value, tensor.requires_grad)
            getattr(twin, name)[key] = value
    return twin


def _held_against(twin: nn.Module, generator: torch.Generator) -> Norm | Unknown:
    """The norm that the twin computes, or the nearest one and what differs."""
    nearest, why, refused = float("inf"), "", ""
    for norm in _candidates(twin):
        probes = _probes(norm, generator)
        first, said = _first_taken(twin, probes)
        if first is None:
            refused = refused or said
            continue
        off = _distance(_run(twin, first).y, _run(_ours(twin, norm), first).y)
        if off <= _EQUAL:
            found = _in_all(twin, norm, first, probes)
            if isinstance(found, Norm):
                return found
            said = f"{norm.kind}, but {found}"
        else:
            said = f"{norm.kind}, off by {off:.2g} of the largest output"
        if not why or (off < nearest and nearest > _EQUAL):
            nearest, why = off, said
    if not why:
        return Unknown(f"it takes none of the inputs that a norm takes: {refused}")
    return Unknown(f"it computes no norm of normkit's; the nearest is {why}")


def _first_taken(twin: nn.Module, probes: list[_Probe]) -> tuple[_Probe | None, str]:
    """The first input that the twin takes, or what it says of the first.

    Of three axes or more: of two alone, a norm over the channels is one over the last axis too.
    """
    refused = ""
    for probe in (p for p in probes if p.x.dim() > 2):
        try:
            _run(twin, probe)
        except Exception as error:
            refused = refused or f"{type(error).__name__}: {error}".split("\n")[0]
        else:
            return probe, ""
    return None, refused


def _candidates(twin: nn.Module) -> Iterator[Norm]:
    """What its tensors allow it to be, with a first guess of eps."""
    m: Any = twin
    tensors, shape = _tensors(twin), _shape(twin)
    assert shape is not None
    act, names = fused(children_behind(twin))
    apart = {"act": "?" if children_behind(twin) else None, "behind": tuple(children_behind(twin))}
    one = len(shape) == 1
    base = Norm(
        "layer",
        shape,
        False,
        _eps_of(twin)[0],
        dims=dims_of(twin),
        momentum=getattr(m, "momentum", None),
        tracks="running_mean" in tensors,
        act=act,
        behind=names,
    )
    of = functools.partial(dataclasses.replace, base)
    if {"running_mean", "running_var"} <= set(tensors):
        if not any(name in twin._parameters for name in tensors):
            yield of(kind="frozen", channels_first=True)
        yield of(kind="batch", channels_first=True)
        yield of(kind="instance", channels_first=True)
        return
    if "tau" in tensors:
        yield of(kind="frn", channels_first=True, **apart)
        return
    if "bias" not in tensors:
        for first in (False, True)[: 1 + one]:
            yield of(kind="rms", channels_first=first)
            if "weight" in tensors:
                yield of(kind="rms", channels_first=first, zero_centered_weight=True)
    for first in (False, True)[: 1 + one]:
        yield of(kind="layer", channels_first=first)
    if one:
        yield of(kind="batch", channels_first=True)
        yield of(kind="instance", channels_first=True)
        yield of(kind="group", channels_first=True, groups=getattr(m, "num_groups", 1))
        if "bias" in tensors and "weight" in tensors:
            yield of(kind="frn", channels_first=True, tlu=False, **apart)
            for first in (True, False):
                yield of(kind="grn", channels_first=first, **apart)


def _eps_of(twin: nn.Module) -> list[float]:
    """Its own small numbers, then the usual ones."""
    floats = {n: v for n, v in vars(twin).items() if isinstance(v, float) and n != "momentum"}
    return list(dict.fromkeys([*(v for v in floats.values() if 0 <= v < 0.1), *_USUAL_EPS]))


@dataclasses.dataclass(frozen=True)
class _Probe:
    """One call: an input, the dtype of the parameters, whether in training."""

    x: Tensor
    training: bool = False
    parameters: torch.dtype = torch.float32

    def of(self, dtype: torch.dtype, parameters: torch.dtype) -> _Probe:
        """The same in other dtypes."""
        return dataclasses.replace(self, x=self.x.to(dtype), parameters=parameters)


@dataclasses.dataclass(frozen=True)
class _Result:
    """The output, and what else a call made: gradients and buffers."""

    y: Tensor
    others: tuple[Tensor, ...]


def _probes(norm: Norm, generator: torch.Generator) -> list[_Probe]:
    """Inputs with the norm's channels where it expects them; no other axis is as long."""
    last = norm.entry.pool in ("row", None) and not norm.channels_first
    sizes = [n for n in (3, 4, 5, 6, 7) if n not in norm.shape]
    a, b, c = sizes[:3]
    shapes = (
        [(a, b, c, *norm.shape), (b, a, *norm.shape), (c, *norm.shape)]
        if last
        else [(n, *norm.shape, *more) for n, *more in ((a, b, c), (b, a), (c, a, b, 2), (b,))]
    )
    if not last and norm.dims is not None:
        ranks = NORMS["batch"].ranked[norm.dims - 1].ranks  # type: ignore[attr-defined]
        shapes = [shape for shape in shapes if len(shape) in ranks]
    if norm.entry.pool != "batch" and not last:
        shapes = [shape for shape in shapes if len(shape) > 2]
    made: list[_Probe] = []
    for shape in shapes:
        shift = torch.empty(norm.shape).normal_(0, 1, generator=generator)
        over = norm.shape if last else (-1, *[1] * (len(shape) - 2))
        x = torch.empty(shape).normal_(0, 1, generator=generator) + shift.view(over)
        made.append(_Probe(x))
        if not last and len(shape) == 4:
            made.append(_Probe(x.contiguous(memory_format=torch.channels_last)))
        if last and len(shape) == len(norm.shape) + 2:
            made.append(_Probe(x.transpose(0, 1).contiguous().transpose(0, 1)))
    return [dataclasses.replace(p, training=training) for training in (False, True) for p in made]


def _ours(twin: nn.Module, norm: Norm) -> nn.Module:
    """normkit's layer with the twin's tensors, as a swap makes it."""
    new = follow(make(norm.kind, norm), behind(twin, norm) if norm.act == "?" else {})
    adopt(twin, new, None)
    return new


def _run(module: nn.Module, probe: _Probe) -> _Result:
    """One call of a copy, and its backward where all is float32."""
    copied = copy.deepcopy(module).to(probe.parameters)
    for each in copied.modules():
        each.training = probe.training
    exact = probe.x.dtype == probe.parameters == torch.float32
    x = probe.x.clone().requires_grad_(exact)
    torch.default_generator.manual_seed(0)  # of a dropout; `preserved` puts the state back
    with torch.set_grad_enabled(exact):
        y = copied.forward(x * 1.0 if exact else x)  # a leaf can't be changed in place
    if not isinstance(y, Tensor):
        raise TypeError(f"it returns a {type(y).__name__}")
    if y.shape != x.shape:
        raise ValueError(f"of {tuple(x.shape)} it makes {tuple(y.shape)}")
    others: list[Tensor] = []
    if exact and y.requires_grad:
        dy = torch.linspace(-1, 2, y.numel()).view(y.shape)
        learned = {n: p for n, p in copied.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(y, [x, *learned.values()], dy, materialize_grads=True)
        named = dict(sorted(zip(learned, gradients[1:], strict=True)))
        others = [gradients[0], *named.values()]
    others += [b for n, b in sorted(copied.named_buffers()) if b.is_floating_point()]
    return _Result(y.detach(), tuple(others))


def _distance(y: Tensor, z: Tensor) -> float:
    """The largest difference over the largest value; infinite where it isn't a number."""
    off = float((y.double() - z.double()).abs().max()) / (float(y.abs().max()) or 1.0)
    return float("inf") if math.isnan(off) else off


def _with_eps(twin: nn.Module, norm: Norm, first: _Probe) -> Norm | None:
    """The norm with the eps that explains inputs and running variances so small that it decides."""
    small = copy.deepcopy(twin)
    for eps in _eps_of(twin):
        tried = dataclasses.replace(norm, eps=eps)
        for scale in (3e-2, 3e-3, 1e-4, 1e-6):
            if "running_var" in small._buffers:
                small._buffers["running_var"] = twin.get_buffer("running_var") * scale**2
            probe = dataclasses.replace(first, x=first.x * scale)
            if _distance(_run(small, probe).y, _run(_ours(small, tried), probe).y) > _EQUAL:
                break
        else:
            return tried
    return None


def _in_all(twin: nn.Module, norm: Norm, first: _Probe, probes: list[_Probe]) -> Norm | str:
    """The norm, with the eps and in the order of casts that agree; or what differs, in words."""
    with_eps = _with_eps(twin, norm, first)
    if with_eps is None:
        return "with an eps that isn't found where it is added"
    norm = _with_strides(twin, with_eps, probes)
    exact = [*probes, first.of(torch.float64, torch.float64)]
    if differs := _differs(twin, norm, exact):
        return differs
    inside = tuple(children_behind(twin))
    orders = [norm]
    if norm.entry.pool == "row":
        plain = dataclasses.replace(norm, act="?" if inside else None, behind=inside)
        orders.append(dataclasses.replace(plain, cast_before_affine=True))
    if norm.act not in (None, "?"):
        orders.append(dataclasses.replace(norm, act="?", behind=inside))
    loose: Norm | None = None
    for order in orders:
        notes = []
        for half in (torch.bfloat16, torch.float16):
            halves = [p.of(half, half) for p in probes if not p.training]
            if not _differs(twin, order, halves, bitwise=True):
                continue
            if said := _differs(twin, order, halves):
                return said
            notes.append(str(half).removeprefix("torch."))
        if not notes:
            return dataclasses.replace(order, note=_note(twin, order, first))
        loose = loose or dataclasses.replace(
            order,
            note=f"equal within 4 units in the last place in {' and '.join(notes)}, where "
            "the old one rounds in between",
        )
    assert loose is not None
    return loose


def _with_strides(twin: nn.Module, norm: Norm, probes: list[_Probe]) -> Norm:
    """The norm with the memory format that its strides show, if there is one."""
    if norm.entry.pool != "row":
        return norm
    for memory_format in (None, torch.preserve_format, torch.channels_last):
        tried = dataclasses.replace(norm, memory_format=memory_format)
        new = _ours(twin, tried)
        if all(_run(new, p).y.stride() == y.stride() for p, y in _outputs(twin, probes)):
            return tried
    return norm


def _outputs(twin: nn.Module, probes: list[_Probe]) -> Iterator[tuple[_Probe, Tensor]]:
    for probe in probes:
        with contextlib.suppress(Exception):  # what it doesn't take
            yield probe, _run(twin, probe).y


def _note(twin: nn.Module, norm: Norm, first: _Probe) -> str:
    """What differs with parameters of another dtype than the input."""
    pairs = ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16))
    mixed = [first.of(*pair) for pair in pairs]
    differs = _differs(twin, norm, mixed)
    return f"with parameters of another dtype than the input, {differs}" if differs else ""


def _differs(
    twin: nn.Module, norm: Norm, probes: list[_Probe], *, bitwise: bool = False
) -> str | None:
    """In what normkit's layer differs on the probes that the twin takes; None for nothing."""
    new = _ours(twin, norm)
    for probe in probes:
        try:
            theirs = _run(twin, probe)
        except Exception:
            continue  # what it doesn't take, the new one may
        where = f"for {str(probe.x.dtype).removeprefix('torch.')} of shape {tuple(probe.x.shape)}"
        where += " in training" if probe.training else ""
        try:
            ours = _run(new, probe)
        except Exception as error:
            return f"normkit's raises {where}: {error}"
        if ours.y.dtype != theirs.y.dtype:
            return f"its output is {theirs.y.dtype} and normkit's {ours.y.dtype} {where}"
        if ours.y.stride() != theirs.y.stride():
            strides = f"{theirs.y.stride()} and normkit's {ours.y.stride()}"
            return f"its output has strides {strides} {where}"
        half = _ROUNDED.get(theirs.y.dtype)
        if bitwise:
            if half and float((ours.y != theirs.y).float().mean()) > _FLIPPED:
                return f"it rounds in another order {where}"
            continue
        allowed = half or (_ROUNDED[torch.bfloat16] if probe.parameters in _ROUNDED else _EQUAL)
        if (off := _distance(theirs.y, ours.y)) > allowed:
            return f"its output is off by {off:.2g} of the largest {where}"
        if len(theirs.others) != len(ours.others):
            return f"its gradients are others' {where}"
        for mine, its in zip(ours.others, theirs.others, strict=True):
            if not half and _distance(its, mine) > 10 * _EQUAL:
                return f"its gradients or running statistics differ {where}"
    return None
