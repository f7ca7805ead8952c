"""Fold norms that evaluation runs by constants into the linear layer beside them."""

from __future__ import annotations

import copy as copying
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.formula.spec import float64
from normkit.tools.build import behind
from normkit.tools.flow import LINEAR, Flow, Op
from normkit.tools.model import (
    Forward,
    Only,
    ToolError,
    all_off,
    check_only,
    chosen,
    largest,
    on_copies,
    outputs,
    taken,
)
from normkit.tools.norms import Unknown, identify, read
from normkit.tools.restore import preserved, undone_on_failure
from normkit.tools.table import Report

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error over largest output that is let pass, by the layer's dtype."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Folded:
    """One norm: the layer it went into, and the pair's largest error over its largest output."""

    layer: str
    into: str
    error: float | None
    note: str


@dataclass(eq=False)
class _Pair:
    norm: Op
    linear: Op
    after: bool
    """Whether the norm comes after the linear layer."""

    @property
    def first(self) -> Any:
        """The module that runs first."""
        return (self.linear if self.after else self.norm).module

    @property
    def second(self) -> Any:
        """The module that runs second."""
        return (self.norm if self.after else self.linear).module

    @property
    def weight(self) -> Tensor:
        """The linear layer's."""
        linear: Any = self.linear.module
        return linear.weight

    @property
    def words(self) -> str:
        """The pair, for a message."""
        first, second = (self.linear, self.norm) if self.after else (self.norm, self.linear)
        return f"{first.name} -> {second.name}"


def fold(
    model: nn.Module,
    example: Any,
    forward: Forward | None = None,
    *,
    only: Only = None,
    tolerance: float | None = None,
    copy: bool = False,
) -> Report:
    """Fold batch norms into the layers beside them, in place, for evaluation.

    With a = weight / sqrt(running_var + eps) and s = bias - running_mean a,
    a norm after:  W' = a W, b' = a b + s;    a norm before:  W' = W a, b' = b + W s

    computed in float64, for Conv1d/2d/3d, transposed and grouped, and Linear. The norm's place
    takes the activation inside it, or the identity. A layer with a forward of its own, as one that
    pads its input itself, is taken where that is seen to be linear in weight and bias. A norm
    before a layer is folded only where
    that is exact: zero padding pads what the norm puts out, and a transposed convolution's border
    adds fewer taps, so there s must be 0.

    Pairs are found by the data that flows when the example runs: the tensor that one layer returns
    is the one the other gets, and nothing else uses it. That sees what tracing sees, and
    works where a model can't be traced. Each pair, and then the whole model, is compared with what
    it was on the example.

    Args:
        model: in evaluation.
        example: one batch that reaches all layers.
        forward: `forward(model, batch)`; by default as for `recalibrate`.
        only: a pattern for the norms' names ("layer1.*"), or a predicate of name and module.
        tolerance: largest error over largest output; by default that of `TOLERANCE` by dtype.
        copy: work on a deep copy, which is the report's `.model`.

    Returns:
        a report with one `Folded` a norm, those left with the reason; facts: how many, the largest
        change of the output, the largest output.

    Raises:
        ToolError: a model in training; an error over the tolerance, which names the pair; a model
            of scripted, quantized or lazy modules. The model is then as it was.

    Source: Jacob et al. 2018 (arXiv 1712.05877), section 3.2.
    """
    model = taken(model, copy)
    if model.training:
        raise ToolError("fold is for evaluation, and the model is in training; call .eval() first")
    check_only(model, only)
    run = on_copies(forward)
    before = outputs(model, example, run)
    flow = Flow(model)
    with preserved(model), torch.no_grad():
        all_off(model)
        flow.run(lambda: run(model, example))
    pairs, rows = _pairs(model, flow, only)
    del flow
    errors = _errors(model, pairs, lambda: run(model, example))
    for pair, error in zip(pairs, errors, strict=True):
        allowed = TOLERANCE[pair.weight.dtype] if tolerance is None else tolerance
        if not error <= allowed:
            raise ToolError(
                f"folding {pair.words} changes its output by {error:.2g} of its largest value, "
                f"more than {allowed:.2g}; tolerance= lets it pass, only= leaves it out"
            )
        rows[pair.norm.name] = Folded(pair.norm.name, pair.linear.name, error, "")
    with undone_on_failure(model):
        for pair in pairs:
            _put(model, pair)
        after = outputs(model, example, run)
        change, most = largest(before, after), largest(before)
        allowed = max((TOLERANCE[pair.weight.dtype] for pair in pairs), default=0.0)
        allowed = allowed if tolerance is None else tolerance
        if pairs and not change <= allowed * most:
            worst = pairs[errors.index(max(errors))]
            raise ToolError(
                f"folding changes the model's output by {change:.2g} where its largest value is "
                f"{most:.2g}, more than {allowed:.2g} of it; of the pairs {worst.words} has the "
                "largest error. tolerance= lets it pass"
            )
    facts: dict[str, Any] = {"folded": len(pairs), "left": len(rows) - len(pairs)}
    if not rows:
        facts["note"] = "no norms here; nothing to do"
    facts |= {"largest change of the output": change, "largest output": most}
    return Report(model, list(rows.values()), facts)


def _pairs(model: nn.Module, flow: Flow, only: Only) -> tuple[list[_Pair], dict[str, Folded]]:
    """What can be folded, and a row for every norm, with the reason where it can't."""
    calls = Counter(op.module for op in flow.ops if op.module is not None)
    places = Counter(
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    pairs: list[_Pair] = []
    rows = {
        name: Folded(name, "-", None, "left: the example doesn't reach it")
        for name, module in model.named_modules()
        if identify(module) and chosen(only, name, module)
    }
    for op in flow.ops:
        if op.name not in rows or op.module is None:
            continue
        found = _pair(op, flow, calls, places)
        if isinstance(found, _Pair):
            pairs.append(found)
        else:
            rows[op.name].note = f"left: {found}"
    return pairs, rows


def _pair(op: Op, flow: Flow, calls: Counter[nn.Module], places: Counter[int]) -> _Pair | str:
    """The pair that a norm is folded in, or why there is none."""
    norm = op.module
    assert norm is not None
    if why := _unfoldable(op, calls):
        return why
    x, reasons = op.inputs[0], []
    prior = flow.producer(x)
    if prior is not None and isinstance(prior.module, LINEAR):
        why = _unsuited(prior, calls, places) or _nonlinear(prior, after=True)
        if flow.consumers(x) != [op]:
            others = ", ".join(o.name for o in flow.consumers(x) if o is not op)
            why = f"the output of {prior.name} is also used by {others}"
        if x.dim() != _rank(prior.module):
            why = f"its channels are not those of {prior.name} (axis 1 of {x.dim()} axes)"
        if why is None:
            return _Pair(op, prior, after=True)
        reasons.append(why)
    readers = flow.consumers(op.output) if op.output is not None else []
    if len(readers) == 1 and isinstance(readers[0].module, LINEAR):
        (reader,) = readers
        why = _unsuited(reader, calls, places) or _inexact(norm, readers[0].module)
        why = why or _nonlinear(reader, after=False)
        if not isinstance(_epilogue(norm), nn.Identity):
            why = f"the activation inside lies between it and {reader.name}"
        if x.dim() != _rank(readers[0].module):
            why = f"its channels are not those of {reader.name} (axis 1 of {x.dim()} axes)"
        if why is None:
            return _Pair(op, reader, after=False)
        reasons.append(why)
    source = "the model's input" if prior is None else f"{prior.name!r}"
    names = dict.fromkeys(r.name for r in readers if not r.name.startswith(f"{op.name}."))
    into = ", ".join(map(repr, names)) or "nothing"
    return "; ".join(reasons) or (
        "no convolution or linear layer directly before or after it: its input comes from "
        f"{source}, its output goes to {into}"
    )


def _unfoldable(op: Op, calls: Counter[nn.Module]) -> str | None:
    assert op.module is not None
    norm = identify(op.module)
    assert norm is not None
    if isinstance(norm, Unknown):
        return f"unknown norm: {norm.why}"
    if not norm.tracks:
        return "its statistics come from the input"
    if calls[op.module] > 1:
        return f"called {calls[op.module]} times"
    if not op.plain:
        return "called with a mask or a residual"
    if op.module.training:
        return "it is in training mode"
    if _has_hooks(op.module):
        return "it has hooks, which would be lost"
    return None


def _unsuited(op: Op, calls: Counter[nn.Module], places: Counter[int]) -> str | None:
    module: Any = op.module
    if not op.plain:
        return f"{op.name} is called with more than its input"
    if parametrize.is_parametrized(module):
        return (
            f"{op.name} is parametrized; torch.nn.utils.parametrize.remove_parametrizations "
            "makes its weight plain"
        )
    if _has_hooks(module):
        return f"{op.name} has hooks, which may depend on its output"
    if calls[module] > 1:
        return f"{op.name} is called {calls[module]} times"
    if any(places[id(p)] > 1 for p in module.parameters()):
        return f"the weight of {op.name} is shared"
    return None


def _inexact(norm: nn.Module, linear: nn.Module) -> str | None:
    if isinstance(linear, nn.Linear) or bool((_constants(norm)[1] == 0).all()):
        return None
    if isinstance(linear, _TRANSPOSED):
        return "before a transposed convolution a shift isn't the same everywhere"
    conv: Any = linear
    if _own_forward(conv):
        return f"{type(conv).__name__} may pad what it gets, and the norm has a shift"
    pads = conv.padding != "valid" if isinstance(conv.padding, str) else any(conv.padding)
    if pads and conv.padding_mode == "zeros" and math.prod(conv.kernel_size) > 1:
        return "zero padding comes between: it pads the norm's output, which has a shift"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _rank(linear: nn.Module) -> int:
    return 2 if isinstance(linear, nn.Linear) else 2 + len(linear.kernel_size)  # type: ignore[arg-type]


def _own_forward(linear: nn.Module) -> bool:
    return "forward" in vars(linear) or all(type(linear).forward is not k.forward for k in LINEAR)


@torch.no_grad()
def _nonlinear(op: Op, *, after: bool) -> str | None:
    """Why a norm can't go into a layer with a forward of its own; None where it can.

    A convolution that pads its input itself is linear in its weight as torch's is; one that
    standardizes its weight isn't. It is tried: f(x; W', b') is a f(x; W, b) + s for a norm after,
    f(a x; W, b) for one before, with a and s at random.
    """
    linear: Any = op.module
    if not _own_forward(linear):
        return None
    weight = linear.weight
    generator = torch.Generator().manual_seed(0)
    plain, changed = copying.deepcopy(linear), copying.deepcopy(linear)
    axis = 1 if after or isinstance(linear, nn.Linear) or op.inputs[0].dim() > 2 else -1
    channels = op.output.shape[1] if after and op.output is not None else op.inputs[0].shape[1]
    a, s = (torch.randn(channels, generator=generator, dtype=torch.float64) for _ in range(2))
    a, s = a.to(weight.device), (s if after else 0 * s).to(weight.device)
    x = torch.randn(op.inputs[0].shape, generator=generator).to(op.inputs[0])
    over = [1 if i != axis else -1 for i in range(x.dim())]
    _give(changed, *_folded(linear, a, s, after))
    if after:
        y, z = changed.forward(x), plain.forward(x) * a.view(over) + s.view(over)
    else:
        y, z = changed.forward(x), plain.forward((x * a.view(over)).to(x))
    if y.shape == z.shape and largest([y], [z]) <= TOLERANCE[weight.dtype] * largest([z]):
        return None
    return f"{op.name} ({type(linear).__name__}) has a forward that isn't linear in its weight"


def _epilogue(norm: nn.Module | None) -> nn.Module:
    """What stays in the norm's place: the modules inside behind it, or the identity."""
    assert norm is not None
    known = read(norm)
    assert known is not None
    assert known.eps is not None
    children = list(behind(norm, known).values())
    if len(children) == 1:
        return children[0]
    return nn.Sequential(*children) if children else nn.Identity()


def _constants(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """a and s of y = a x + s, in float64."""
    m: Any = norm
    known = read(norm)
    assert known is not None
    assert known.eps is not None
    a = (float64(m.running_var) + known.eps).rsqrt()
    if m.weight is not None:
        a = a * float64(m.weight)
    s = -float64(m.running_mean) * a
    return a, s if m.bias is None else s + float64(m.bias)


def _folded_pair(pair: _Pair) -> tuple[Tensor, Tensor]:
    """The linear layer's new weight and bias."""
    assert pair.norm.module is not None
    return _folded(pair.linear.module, *_constants(pair.norm.module), pair.after)


@torch.no_grad()
def _folded(linear: Any, a: Tensor, s: Tensor, after: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias with y -> a y + s after the layer, or x -> a x + s before it, inside."""
    w = float64(linear.weight)
    groups = getattr(linear, "groups", 1)
    # (g, in or out of a group, out or in of a group, *kernel); transposed ones hold in first.
    w = w.unflatten(0, (groups, -1))
    outer, inner = (2, 1) if isinstance(linear, _TRANSPOSED) else (1, 2)
    channels = outer if after else inner
    along = [1] * w.dim()
    along[0], along[channels] = groups, -1
    out = w.shape[0] * w.shape[outer]
    b = a.new_zeros(out) if linear.bias is None else float64(linear.bias)
    if after:
        b = a * b + s
    else:
        shifted = (w * s.reshape(along)).flatten(3).sum(-1) if w.dim() > 3 else w * s.reshape(along)
        b = b + shifted.sum(inner).flatten()
    w = (w * a.reshape(along)).flatten(0, 1)
    return w.to(linear.weight), b.to(linear.weight)


def _put(model: nn.Module, pair: _Pair) -> None:
    linear, norm = pair.linear.module, pair.norm.module
    assert linear is not None
    assert norm is not None
    rest = _epilogue(norm)
    rest.training = norm.training
    _give(linear, *_folded_pair(pair))
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is norm:
                parent._modules[key] = rest


def _give(linear: nn.Module, weight: Tensor, bias: Tensor) -> None:
    grad = bool(linear.weight.requires_grad)
    linear._parameters["weight"] = nn.Parameter(weight, grad)
    linear._parameters["bias"] = nn.Parameter(bias, grad)


def _errors(model: nn.Module, pairs: list[_Pair], call: Callable[[], Any]) -> list[float]:
    """Each pair's largest error over its largest output, on what the example shows it.

    Compared inside the run: what comes later may overwrite an output in place.
    """
    got: dict[_Pair, Tensor] = {}
    errors: dict[_Pair, float] = {}

    def hooks(pair: _Pair) -> tuple[Any, Any]:
        alone, rest = copying.deepcopy(pair.linear.module), _epilogue(pair.norm.module)
        assert alone is not None
        _give(alone, *_folded_pair(pair))
        kept = nn.Sequential(alone, *([copying.deepcopy(rest)] if pair.after else []))

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            got[pair] = kept(args[0])

        def after(_: nn.Module, __: Any, output: Tensor) -> None:
            most = largest([output])
            errors[pair] = largest([output], [got.pop(pair)]) / (most or 1.0)

        return before, after

    made = [hooks(pair) for pair in pairs]
    with preserved(model), torch.no_grad():
        all_off(model)
        for pair, (before, after) in zip(pairs, made, strict=True):
            pair.first.register_forward_pre_hook(before)
            pair.second.register_forward_hook(after)
        call()
    return [errors[pair] for pair in pairs]
