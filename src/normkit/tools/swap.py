"""Any norm of a model for any other, in place."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normkit.factory import NORMS, create
from normkit.layers import _Norm
from normkit.tools.build import (
    KINDS,
    TARGETS,
    Make,
    adopt,
    behind,
    make,
    tensor_like,
    why_not_torch,
)
from normkit.tools.followed import Followed, follow, of_torch
from normkit.tools.fuse import fuse as fuse_activations
from normkit.tools.model import (
    Forward,
    Only,
    ToolError,
    check_only,
    chosen,
    largest,
    on_copies,
    outputs,
    taken,
)
from normkit.tools.norms import Norm, Unknown, identify
from normkit.tools.restore import undone_on_failure
from normkit.tools.table import Report


@dataclass
class Swapped:
    """One layer: what it was and is. `affine` is what of weight and bias went along."""

    layer: str
    was: str
    now: str
    affine: str
    note: str

    @property
    def left(self) -> str | None:
        """Why the layer stayed as it was; None where it was replaced."""
        return self.note.removeprefix(_LEFT) if self.note.startswith(_LEFT) else None


_LEFT = "left: "


def swap(
    model: nn.Module,
    to: str | Make | None = None,
    *,
    only: Only = None,
    groups: int = 32,
    fuse: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    example: Any = None,
    forward: Forward | None = None,
    copy: bool = False,
    process_group: Any = None,
) -> Report:
    """Replace a model's norms in place.

    The old layer's own tensors go into the new one wherever name and shape agree: weight and bias,
    which scale and shift a normalized value in all of them, and running statistics. So optimizers,
    tied weights, devices, dtypes and requires_grad hold. Train or eval, hooks, parametrizations and
    names are kept, and a layer registered at several places stays one layer.

    Args:
        model: any module. Where it is itself a norm, the report's `.model` is the new one.
        to: None makes normkit's layer of every norm that is known, by its class (torch, timm,
            torchvision, detectron2) or by what it computes (`normkit.tools.recognize`): the same
            function. "torch" makes torch's layers of them again. Else "batch", "ghost:32",
            "renorm", "frozen", "sync", "instance", "group" or "group:8" (`groups=8`), "layer" (over
            the channels), "rms", "none" (the identity); another name that `normkit.create` knows;
            or a function of the number of channels that returns a module.
        only: a pattern for names ("layer1.*"), or a predicate of name and module.
        groups: at most so many groups: the largest number that divides the channels and leaves two
            or more channels to a group. A group norm keeps its own.
        fuse: let the new norms, and those that were normkit's already, take over the activation
            modules behind them (ReLU, LeakyReLU, SiLU, GELU), which become the identity. That is
            done where runs of the example show that nothing else reads the norm's output; a branch
            that the example doesn't take is not seen. All else stays as it is, with the reason in
            the report: a functional activation or a sum needs another forward.
        optimizer: parameters that are gone leave its groups and state; new ones join the group of
            the layer's old ones.
        example: one batch to run before and after, in evaluation, and for `fuse` also in training;
            nothing of that stays.
        forward: `forward(model, batch)` for the example; by default as for `recalibrate`.
        copy: work on a deep copy, which is the report's `.model`.
        process_group: of "sync": whose ranks merge their batches; None for all ranks, or for those
            of the old layer where that was synchronized.

    Norms over the last axes become "layer", "rms" or "none" only: the channels of all others lie on
    axis 1. An activation inside that no norm fuses follows the new norm, as a child of its old
    name. A layer that is left as it was is in the report with the reason, one that looks like a
    norm and isn't known among them.

    Returns:
        a report with one `Swapped` a layer; facts: how many were swapped and left, how many of
        those are unknown norms, what happened
        to the optimizer, with an example the largest change of the output and the largest output.

    Raises:
        ToolError: unknown `to`; a process_group for another `to` than "sync"; an optimizer together
            with `copy`; a model of scripted, quantized or lazy modules; `fuse` without an example,
            or with an output that fusing changes by more than `fold`'s tolerance. After any
            exception the model is as it was.
    """
    if copy and optimizer is not None:
        raise ToolError("the optimizer holds the model's parameters, not a copy's; leave one out")
    if groups < 1:
        raise ToolError(f"groups must be at least 1, got {groups}")
    kind, function, number = _kind(to, groups)
    if process_group is not None and kind != "sync":
        raise ToolError(f"a process_group belongs to to='sync', and to={to!r}")
    if fuse and example is None:
        raise ToolError(
            "fuse=True looks at who reads each norm's output while an example runs; give example=, "
            "one batch"
        )
    model = taken(model, copy)
    check_only(model, only)
    run = on_copies(forward)
    before = outputs(model, example, run)
    parameters = list(model.parameters())
    with undone_on_failure(model, optimizer):
        rows, result, pairs = _swap_all(model, kind, function, only, number, process_group)
        facts = _counts(rows)
        if fuse:
            acts, left = fuse_activations(result, [now for _, now in pairs], example, run)
            notes: dict[nn.Module, str] = {norm: f"{act} fused" for norm, act in acts.items()}
            notes |= {norm: f"not fused: {why}" for norm, why in left.items()}
            for row, (_, now) in zip(rows, pairs, strict=True):
                row.note = "; ".join(filter(None, (row.note, notes.get(now))))
            facts["fused"] = len(acts)
        after = outputs(result, example, run)
        facts |= _mend(optimizer, parameters, list(result.parameters()), pairs)
        if example is not None:
            facts |= {
                "largest change of the output": largest(before, after),
                "largest output": largest(before),
            }
        return Report(result, rows, facts)


def _counts(rows: list[Swapped]) -> dict[str, Any]:
    reasons = [row.left for row in rows if row.left is not None]
    left, unknown = len(reasons), sum(why.startswith("unknown norm") for why in reasons)
    facts: dict[str, Any] = {"swapped": len(rows) - left, "left": left}
    if unknown:
        facts["unknown norms"] = unknown
    return facts if rows else facts | {"note": "no norms here; nothing to do"}


def _kind(to: str | Make | None, groups: int) -> tuple[str | None, Make | None, int]:
    """(the kind, or "function" and that function; the number that belongs to it)."""
    if to is None:
        return None, None, groups
    if not isinstance(to, str):
        return "function", to, groups
    kind, _, number = to.partition(":")
    if kind in NORMS and kind not in KINDS:
        return "function", functools.partial(create, to), groups
    if kind not in KINDS:
        raise ToolError(
            f"unknown to={to!r}; known: None, {', '.join(TARGETS)}, or a function "
            "of the number of channels"
        )
    numbered = {"ghost": True, "group": bool(number)}.get(kind, False)
    if numbered != number.isdecimal() or (numbered and int(number) < 1):
        raise ToolError(
            f"to={to!r}: a number belongs to 'ghost:32' (samples) and may follow 'group:8', and to "
            "no other name"
        )
    return kind, None, int(number) if number else groups


def _swap_all(
    model: nn.Module,
    kind: str | None,
    to: Make | None,
    only: Only,
    number: int,
    process_group: Any,
) -> tuple[list[Swapped], nn.Module, list[tuple[nn.Module, nn.Module]]]:
    """Put new layers in; return the rows, the model, and the pairs of old and new layers."""
    rows: list[Swapped] = []
    pairs: dict[nn.Module, nn.Module] = {}
    for parent, key, name, module in list(_places(model)):
        if not chosen(only, name, module):
            continue
        if module not in pairs:
            pairs[module], row = _replacement(model, name, module, kind, to, number, process_group)
            rows.append(row)
        if parent is None:
            model = pairs[module]
        else:
            parent._modules[key] = pairs[module]
    return rows, model, list(pairs.items())


def _places(model: nn.Module) -> Iterator[tuple[nn.Module | None, str, str, nn.Module]]:
    """Every place of a norm: (parent, key there, full name, norm), shared ones several times."""
    if identify(model):
        yield None, "", "", model
        return
    for path, parent in model.named_modules():
        for key, child in parent._modules.items():
            if child is not None and identify(child):
                yield parent, key, f"{path}.{key}" if path else key, child


def _replacement(
    model: nn.Module,
    name: str,
    module: nn.Module,
    kind: str | None,
    to: Make | None,
    number: int,
    process_group: Any,
) -> tuple[nn.Module, Swapped]:
    """The new layer, or the old one where the row says why it stays."""
    was = type(module).__name__
    norm, why = _taken(module, kind)
    if norm is None:
        return module, Swapped(name or "the model", was, "-", "-", f"{_LEFT}{why}")
    new = make(kind or norm.kind, norm, number, process_group) if to is None else to(norm.shape[0])
    now = type(new).__name__
    if isinstance(new, nn.GroupNorm):
        now += f"({new.num_groups} groups)"
    if kind in ("none", "torch") or norm.act == "?":
        children = behind(module, norm)
        follow(new, children)
        now = ", ".join([now, *(type(child).__name__ for child in children.values())])
    affine, note = adopt(module, new, tensor_like(module, model), keep_affine=to is None)
    if kind is None:
        note = "; ".join(filter(None, (note, norm.note)))
    return new, Swapped(name or "the model", was, now, ", ".join(affine) or "-", note)


def _taken(module: nn.Module, kind: str | None) -> tuple[Norm | None, str]:
    """(what norm it is, ""), or (None, why it is left)."""
    norm = identify(module)
    assert norm is not None
    if isinstance(norm, Unknown):
        return None, f"unknown norm: {norm.why}"
    if kind is None and isinstance(module, _Norm):
        return None, "normkit's already"
    if kind == "torch":
        layer = type(module).__bases__[1] if isinstance(module, Followed) else type(module)
        if of_torch(layer) is layer:
            return None, "torch's already"
        why = why_not_torch(module, norm)
        return (None, why) if why else (norm, "")
    if kind is not None and norm.entry.pool is None and kind != "none":
        return None, f"its weight and bias belong to another formula ({norm.kind})"
    if kind == "frozen" and not norm.tracks:
        return None, "it has no running statistics to freeze"
    if not norm.channels_first and kind not in (None, "layer", "rms", "none"):
        return None, "it normalizes the last axes; the new layer's channels lie on axis 1"
    if norm.zero_centered_weight and kind not in (None, "rms", "none"):
        return None, f"it scales by 1 + weight, and {kind} by weight"
    if norm.act and kind == "function":
        inside = ", ".join(type(module._modules[n]).__name__ for n in norm.behind) or norm.act
        return None, f"the new layer would lose the activation inside ({inside})"
    return norm, ""


def _mend(
    optimizer: torch.optim.Optimizer | None,
    before: list[nn.Parameter],
    after: list[nn.Parameter],
    pairs: list[tuple[nn.Module, nn.Module]],
) -> dict[str, Any]:
    """Take parameters that are gone out of the optimizer, put new ones into the old ones' group."""
    old, new = set(before), set(after)
    gone, come = old - new, new - old
    if not gone and not come:
        return {}
    if optimizer is None:
        return {
            "optimizer": f"{len(gone)} parameters gone, {len(come)} new: give optimizer=, or make "
            "it after the swap"
        }
    home = {
        parameter: group
        for group in optimizer.param_groups
        for was, now in pairs
        for parameter in now.parameters()
        if any(p in set(group["params"]) for p in was.parameters())
    }
    homeless = [p for p in come if p not in home]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in gone]
    for parameter in after:
        if parameter in come and parameter in home:
            home[parameter]["params"].append(parameter)
    for parameter in gone:
        optimizer.state.pop(parameter, None)
    said = f"{len(gone)} parameters removed with their state, {len(come) - len(homeless)} added"
    if homeless:
        said += f"; {len(homeless)} belong to no group, add them by add_param_group"
    return {"optimizer": said}
