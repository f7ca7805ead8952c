"""Fuse a norm with the sum and the activation behind it, by torch.fx."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from normkit.tools.build import adopt, make
from normkit.tools.model import Forward, all_off, preserved
from normkit.tools.norms import is_norm, name_of_act, read

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.leaky_relu: "leaky_relu",
    F.silu: "silu",
    F.gelu: "gelu",
}
_METHODS = {"relu": "relu", "relu_": "relu"}
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_FUSING = ("batch", "sync", "instance", "group")


def fuse_epilogues(
    model: nn.Module, example: Any, forward: Forward
) -> tuple[nn.Module, dict[str, str], dict[str, str]]:
    """(the fused model, layer -> what was fused, part -> why it could not be traced).

    Sums are fused where the example shows that both terms have one shape. A part that can't be
    traced stays itself, and its children are tried.
    """
    fused: dict[str, str] = {}
    untraced: dict[str, str] = {}

    def part(module: nn.Module, path: str, example: Any) -> nn.Module:
        if is_norm(module) or not any(map(is_norm, module.modules())):
            return module
        try:
            graph = _Tracer().trace(module)
            traced = fx.GraphModule(module, graph, type(module).__name__)
            lost = set(module.state_dict()) - set(traced.state_dict())
            if lost:
                raise RuntimeError(f"the graph leaves out {', '.join(sorted(lost))}")
        except Exception as error:
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                reason = str(error).strip().splitlines() or [type(error).__name__]
                untraced[path or "the model"] = reason[0]
            for name, child in module.named_children():
                module._modules[name] = part(child, f"{path}.{name}" if path else name, None)
            return module
        _shapes(traced, example, forward)
        _fuse(traced, path, fused)
        traced.training = module.training
        return traced

    return part(model, "", example), fused, untraced


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return is_norm(module) or super().is_leaf_module(module, name)


def _shapes(traced: fx.GraphModule, example: Any, forward: Forward) -> None:
    """Write the shape of every node into its `meta`, where there is an example."""
    if example is None:
        return
    seen: list[Any] = []
    with preserved(traced), torch.no_grad():
        all_off(traced)
        traced.register_forward_pre_hook(lambda _, args: seen.append(args))
        forward(traced, example)
    with preserved(traced), torch.no_grad():
        all_off(traced)
        ShapeProp(traced).propagate(*seen[0])


def _fuse(traced: fx.GraphModule, path: str, fused: dict[str, str]) -> None:
    modules = dict(traced.named_modules())
    graph = traced.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and type(modules[node.target]) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in list(graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        known = None if norm is None else read(norm)
        if norm is None or known is None:
            continue
        if known.kind not in _FUSING or known.act or calls[node.target] > 1 or node.kwargs:
            continue
        last, residual = node, None
        behind = _only_user(last)
        if behind is not None and (other := _summand(behind, last)) is not None:
            last, residual = behind, other
            behind = _only_user(last)
        act = _act(behind, modules)
        if behind is not None and act is not None:
            last = behind
        if last is node:
            continue
        name = f"{path}.{node.target}" if path else str(node.target)
        fused[name] = (
            " and ".join(filter(None, ("the sum" if residual is not None else None, act)))
            + " fused"
        )
        new = make(known.kind, dataclasses.replace(known, act=act))
        adopt(norm, new, None)
        traced.set_submodule(str(node.target), new)
        with graph.inserting_before(last):
            more: dict[str, Any] = {} if residual is None else {"residual": residual}
            call = graph.call_module(str(node.target), node.args, more)
        call.meta = dict(last.meta)
        last.replace_all_uses_with(call)
    graph.eliminate_dead_code()
    traced.recompile()


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _summand(sum_: fx.Node, term: fx.Node) -> fx.Node | None:
    """What is added to `term`, if it is known to have the same shape and dtype."""
    if sum_.target not in _SUMS or len(sum_.args) != 2 or sum_.kwargs:
        return None
    (other,) = [a for a in sum_.args if a is not term] or [None]
    if not isinstance(other, fx.Node):
        return None
    mine, its = (node.meta.get("tensor_meta") for node in (term, other))
    if mine is None or its is None or (mine.shape, mine.dtype) != (its.shape, its.dtype):
        return None
    return other


def _act(node: fx.Node | None, modules: dict[str, nn.Module]) -> str | None:
    if node is None:
        return None
    if node.op == "call_module":
        return name_of_act(modules[str(node.target)])
    plain = len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
    if node.op == "call_function" and plain:
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" and plain else None
