"""Let norms take over the activations behind them, where runs show that nothing else reads them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normkit.layers import _Norm
from normkit.runtime.readers import do_nothing
from normkit.tools.flow import Flow, Op
from normkit.tools.fold import TOLERANCE
from normkit.tools.model import Forward, ToolError, inner, largest, set_training
from normkit.tools.norms import name_of_act, read
from normkit.tools.ranks import apart
from normkit.tools.restore import preserved, undone_on_failure

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

_Passed = tuple[nn.Module, weakref.ref[Tensor]]
"""A norm, and an output of it."""

_MODES = {None: "as the model is", True: "in training", False: "in evaluation"}


def fuse(
    model: nn.Module, norms: Iterable[nn.Module], example: Any, forward: Forward
) -> tuple[dict[_Norm, str], dict[_Norm, str]]:
    """Give norms the activation modules behind them; an identity takes the activation's place.

    They go together where every run of the example shows that the activation is the only one to
    read what the norm puts out, and reads nothing but the outputs of such norms. It is run as the
    model is, in training and in evaluation, without gradients and with them; then once more in each
    mode, to compare. Random numbers are the same in all runs.

    Returns:
        norm -> the activation that it took over; norm -> why it took none.

    Raises:
        ToolError: the example can't be run in one of the modes, puts out no tensor, or its output
            changes by more than `fold`'s tolerance. The model is then as it was.
    """
    free = [m for m in norms if isinstance(m, _Norm) and _takes_act(m) and read(m) is not None]
    if not free:
        return {}, {}
    model = inner(model)
    modes = [m for m in _MODES if m is None or any(each.training != m for each in model.modules())]
    watch = _Watch(free)
    before = {}
    for mode in modes:
        before[mode] = _run(model, mode, example, forward, watch)
        _run(model, mode, example, forward, watch, grad=True)
    acts = watch.decide()
    with undone_on_failure(model):
        for norm, act in acts.items():
            norm.act = act
        _pass_through(model, {act for norm in acts for act in watch.behind[norm]})
        for mode in modes if acts else ():
            _compare(before[mode], _run(model, mode, example, forward), mode, watch.tolerance)
    return acts, {norm: watch.left[norm] for norm in free if norm not in acts}


def _takes_act(norm: _Norm) -> bool:
    """Whether the layer has no activation; of a subclass `act` is the user's own attribute."""
    return norm._act is None and type(norm).__module__ == _Norm.__module__


class _Watch:
    """What the runs show of norms and of the activations behind them.

    Attributes:
        behind: norm -> the activation modules that were seen behind it.
        left: norm or activation -> why it stays as it is.
        tolerance: that of the norms' outputs.
    """

    def __init__(self, norms: Iterable[_Norm]) -> None:
        self.behind: dict[_Norm, set[nn.Module]] = {norm: set() for norm in norms}
        self.left: dict[nn.Module, str] = {}
        self.tolerance = 0.0
        self._names: dict[nn.Module, str] = {}

    def see(self, flow: Flow) -> list[_Passed]:
        """Take in one run; return the norms' outputs that nothing should hold any more."""
        self._names |= {op.module: op.name for op in flow.ops if op.module is not None}
        passed, fed = list[_Passed](), set[Op]()
        for op in flow.ops:
            norm = op.module
            if not isinstance(norm, _Norm) or norm not in self.behind:
                continue
            act = _only_reader(op, flow)
            if isinstance(act, str):
                self.left.setdefault(norm, act)
                continue
            assert op.output is not None
            assert act.module is not None
            fed.add(act)
            self.behind[norm].add(act.module)
            self.tolerance = max(self.tolerance, TOLERANCE[op.output.dtype])
            if act.output is not op.output:
                passed.append((norm, weakref.ref(op.output)))
        for op in flow.ops:
            if op.module is not None and name_of_act(op.module) and op not in fed:
                self.left.setdefault(op.module, f"{op.name} is also called on other values")
        return passed

    def held(self, passed: list[_Passed]) -> None:
        """Leave the norms whose outputs are still there."""
        for norm, output in passed:
            if output() is not None:
                self.left.setdefault(norm, "its output is kept after the activation has run")

    def decide(self) -> dict[_Norm, str]:
        """Norm -> the activation that it takes over; norms and activations go together or stay."""
        for norm, acts in self.behind.items():
            for module in (norm, *acts):
                if why := _patched(module):
                    name = "it" if module is norm else self._names[module]
                    self.left.setdefault(module, f"{name} {why}")
            if not acts:
                self.left.setdefault(norm, "the example doesn't reach it")
            if len({name_of_act(act) for act in acts}) > 1:
                self.left.setdefault(norm, "it is followed by different activations")
        pairs = [(norm, act) for norm, acts in self.behind.items() for act in acts]
        while open_ := [(n, a) for n, a in pairs if (n in self.left) != (a in self.left)]:
            for norm, act in open_:
                if act in self.left:
                    self.left[norm] = self.left[act]
                else:
                    name, other = self._names[act], self._names[norm]
                    self.left[act] = f"{name} also follows {other}, which is not fused"
        return {
            norm: next(name for name in map(name_of_act, acts) if name)
            for norm, acts in self.behind.items()
            if norm not in self.left
        }


def _only_reader(op: Op, flow: Flow) -> Op | str:
    """The activation that alone reads what a call of a norm puts out, or why there is none."""
    if op.output is None or not op.plain:
        return "it is called with more than its input"
    readers = list[Op]()
    for reader in flow.consumers(op.output):
        readers.append(reader)
        if reader.output is op.output:  # in place: later ones read something else
            break
    if not readers:
        return "nothing is seen to read its output"
    act = readers[0]
    if len(readers) > 1 or act.module is None or name_of_act(act.module) is None or not act.plain:
        return f"its output goes to {' and '.join(dict.fromkeys(r.name for r in readers))}"
    if act.grad != op.grad:
        return f"gradients are on in only one of it and {act.name}"
    return act


def _patched(module: nn.Module) -> str | None:
    """What of a module would be lost or see something else."""
    hooks = [hook for key in _HOOKS for hook in (vars(module).get(key) or {}).values()]
    if any(hook is not do_nothing for hook in hooks):
        return "has hooks"
    if "forward" in vars(module):
        return "has a forward of its own"
    if name_of_act(module) and (module._parameters or module._buffers or module._modules):
        return "holds tensors or modules"
    return None


def _run(
    model: nn.Module,
    mode: bool | None,
    example: Any,
    forward: Forward,
    watch: _Watch | None = None,
    grad: bool = False,
) -> list[Tensor]:
    """What the model puts out in a mode; nothing of the run stays."""
    flow, passed = Flow(model), list[_Passed]()
    with preserved(model), apart(model), torch.set_grad_enabled(grad):
        if mode is not None:
            set_training(model, mode)
        try:
            result = flow.run(lambda: forward(model, example))
        except ToolError:
            raise
        except Exception as error:
            raise ToolError(
                f"fuse=True runs the example {_MODES[mode]}, and that raised "
                f"{type(error).__name__} ({error}); give an example, or a forward=, that runs in "
                "training and in evaluation"
            ) from error
        if watch is not None:
            passed = watch.see(flow)
        del flow  # it holds all tensors
        if watch is not None and not grad:  # which holds tensors for the backward
            watch.held(passed)
        return [t.detach().clone() for t in tree_leaves(result) if isinstance(t, Tensor)]


def _pass_through(model: nn.Module, acts: set[nn.Module]) -> None:
    """An identity in each activation's places."""
    new = {act: nn.Identity().train(act.training) for act in acts}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in new:
                parent._modules[key] = new[child]


def _compare(
    before: list[Tensor], after: list[Tensor], mode: bool | None, tolerance: float
) -> None:
    if not before:
        raise ToolError(
            "the model puts out no tensor, so that fusing can't be checked; give a forward= that "
            "returns its tensors"
        )
    same = [(t.shape, t.dtype) for t in before] == [(t.shape, t.dtype) for t in after]
    change, most = largest(before, after) if same else math.inf, largest(before)
    if not change <= tolerance * most:
        raise ToolError(
            f"run {_MODES[mode]}, the model with fused activations puts out something else: it "
            f"differs by {change:.2g} where the largest value is {most:.2g}, more than "
            f"{tolerance:.2g} of it; leave fuse out, or the layers in question by only="
        )
