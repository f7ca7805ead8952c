"""Who hands what to whom, observed while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from normkit.tools.norms import is_norm

LINEAR = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)

_ASKS_ONLY = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "__len__"),
    *("is_floating_point", "is_complex", "element_size", "get_device", "type", "__get__"),
}
"""Calls that don't touch a tensor's values, unless they return a tensor."""


@dataclass(eq=False)
class Op:
    """One call of a module without children, a norm, or a function of torch's.

    Attributes:
        name: the module's name, or the function's.
        module: None for a function.
        inputs: the tensors that went in, also by keyword.
        plain: whether that was one tensor and nothing else.
        output: the tensor that came out; None if it wasn't one tensor.
        grad: whether gradients were on.
    """

    name: str
    module: nn.Module | None
    inputs: list[Tensor] = field(default_factory=list)
    plain: bool = False
    output: Tensor | None = None
    grad: bool = field(default_factory=torch.is_grad_enabled)


class Flow(TorchFunctionMode):
    """Records the calls inside `with`; tensors are held, so that their ids stay theirs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.ops: list[Op] = []
        self._inside: list[Op] = []
        self._consumers: dict[int, list[Op]] = {}
        self._producer: dict[int, Op] = {}

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a call of the model; its results count as used by the one who called."""
        handles = []
        for name, module in self.model.named_modules():
            if type(module) is nn.Identity:
                continue
            if is_norm(module) or isinstance(module, LINEAR) or not any(module.children()):
                handles += [
                    module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                    module.register_forward_hook(self._after, with_kwargs=True, always_call=True),
                ]
        try:
            with self:
                result = call()
        finally:
            for handle in handles:
                handle.remove()
        caller = Op("the output", None)
        for tensor in tree_leaves(result):
            self._use(tensor, caller)
        return result

    def producer(self, tensor: Tensor) -> Op | None:
        """The call that made a tensor."""
        return self._producer.get(id(tensor))

    def consumers(self, tensor: Tensor) -> list[Op]:
        """The calls that a tensor went into."""
        return self._consumers.get(id(tensor), [])

    def _before(self, name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            op = Op(name, module, plain=len(args) + len(kwargs) == 1)
            for tensor in tree_leaves((args, kwargs)):
                self._use(tensor, op)
            self.ops.append(op)
            self._inside.append(op)

        return before

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        op = self._inside.pop()
        self._make(output, op)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside:
            made = any(isinstance(t, Tensor) for t in tree_leaves(result))
            name = getattr(func, "__name__", str(func))
            if made or name not in _ASKS_ONLY:
                op = Op(name, None)
                for tensor in tree_leaves((args, kwargs)):
                    self._use(tensor, op)
                self._make(result, op)
                self.ops.append(op)
        return result

    def _use(self, tensor: Any, op: Op) -> None:
        if isinstance(tensor, Tensor):
            op.inputs.append(tensor)
            self._consumers.setdefault(id(tensor), []).append(op)

    def _make(self, result: Any, op: Op) -> None:
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not any(tensor is t for t in op.inputs):
                self._producer[id(tensor)] = op
        op.output = result if isinstance(result, Tensor) else None
