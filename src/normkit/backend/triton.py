"""Triton kernels: one read where a pool fits in registers, for dense tensors on an NVIDIA GPU.

Where pools lie is in `triton_plan`, what is done to them in `triton_kernels`. Tests run the same
kernels under Triton's interpreter: with TRITON_INTERPRET=1 and DEVICE set to "cpu".
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from normkit.backend.layout import DTYPES, contiguous, dense, dense_mask, like
from normkit.backend.layout import dense_inputs as dense_inputs
from normkit.backend.protocol import Gradients, Normalized, Sums
from normkit.backend.triton_plan import WARPS_PER_SM, covers, geometry, launch, power_of_two, shared
from normkit.formula.spec import Inputs, Spec, compute_dtype, is_wrapper

DEVICE = "cuda"
FUSION = {"enable_fp_fusion": True}
"""Fused multiply-adds, said outright: Triton is about to change what it does unasked."""
OLDEST = (8, 0)
"""The compute capability from which the kernels are compiled and checked."""


def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter; Triton itself asks once, when imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def available() -> str | None:
    """Why this backend can't be used on this machine, or None."""
    if DEVICE == "cuda":
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        if not torch.cuda.is_available():
            return "no NVIDIA GPU is available"
        if interpreting():
            return "TRITON_INTERPRET=1 is set, which interprets kernels instead of compiling them"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return None


def why_not(spec: Spec, inputs: Inputs) -> str | None:
    """Why this backend can't take this call, or None."""
    x = inputs.x
    if spec.conditional:
        return "weight or bias is given per sample"
    if is_wrapper(x):
        return f"x is a {type(x).__name__}, which has rules for torch's operators alone"
    if x.device.type != DEVICE:
        return f"x is on {x.device}"
    if (met := _capability(x.device)) < OLDEST:
        return f"{x.device} has compute capability {met[0]}.{met[1]}, below {OLDEST[0]}.{OLDEST[1]}"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    if x.layout != torch.strided:
        return f"x is {x.layout}"
    if x.numel() == 0:
        return "x is empty"
    for name, tensor in zip(inputs._fields, inputs, strict=True):
        if tensor is not None and tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
    for name, parameter in (("weight", inputs.weight), ("bias", inputs.bias)):
        if parameter is not None and parameter.dtype not in DTYPES:
            return f"{name} is {parameter.dtype}"
    return None


def normalize(spec: Spec, inputs: Inputs) -> Normalized:
    """The mean is float64, so that it keeps what float32 would drop."""
    call = _Forward(spec, inputs)
    x, at = call.x, call.launch
    with _on(x.device):
        if spec.given:
            call.run("apply")
        elif not at.split:
            call.run("both")
        else:
            parts = call.moments()
            if at.merged:
                call.run("apply", parts)
            else:
                call.merge(parts, None, call.mean, call.rstd, call.var)
                call.run("apply")
    return Normalized(call.y, call.mean, call.rstd, call.var, call.total)


def normalize_backward(
    spec: Spec, inputs: Inputs, dy: Tensor, dtotal: Tensor | None = None
) -> Gradients:
    call = _Backward(spec, inputs, dy, dtotal)
    with _on(call.x.device):
        sums = call.new_sums() if call.of_pools and call.wants else None
        if not call.launch.split:
            call.run("both", sums)
        elif spec.given and not call.wants:
            call.run("gradient")
        else:
            parts = call.sums()
            if call.launch.merged:
                call.run("gradient", sums, parts)
            else:
                sums = call.fold_pools(parts)
                call.run("gradient", merged=sums)
        dweight, dbias = call.parameters(sums)
    return Gradients(call.dx, dweight, dbias, call.dresidual())


def output(spec: Spec, inputs: Inputs) -> Tensor:
    return normalize(spec, inputs).y


def moments(spec: Spec, inputs: Inputs) -> Tensor:
    call = _Forward(spec, inputs)
    every = call.x.new_empty((3, *call.geometry.statistics), dtype=torch.float64)
    with _on(call.x.device):
        call.merge(call.moments(), every[0], every[1], None, every[2])
    return every


def sums(spec: Spec, inputs: Inputs, dy: Tensor) -> Sums:
    call = _Backward(spec, inputs, dy)
    with _on(call.x.device):
        folded = call.fold_pools(call.sums())
        dweight, dbias = call.parameters(folded)
    total = folded[:2].double().view(2, *call.geometry.statistics)
    if call.of_pools and inputs.weight is not None:
        total = total * inputs.weight
    return Sums(total, dweight, dbias)


def gradient(spec: Spec, inputs: Inputs, dy: Tensor, means: Tensor) -> Gradients:
    call = _Backward(spec, inputs, dy)
    with _on(call.x.device):
        call.run("project", merged=means.to(call.dtype).contiguous())
    return Gradients(call.dx, residual=call.dresidual())


class _Call:
    """What all phases of a call share."""

    def __init__(self, spec: Spec, inputs: Inputs, way: Literal["forward", "backward"]) -> None:
        x = self.x = dense(spec, inputs.x)
        self.spec, self.dtype = spec, compute_dtype(x.dtype)
        last = not x.is_contiguous()
        g = self.geometry = geometry(spec.pool, tuple(x.shape), last, spec.given, x.itemsize)
        self.launch = launch(g, way, spec.given)
        of_columns = g.outer * g.cols
        self.indices = {"rows": g.rows, "columns": of_columns, "none": self.launch.units}[g.kept]
        self.weight, self.bias = contiguous(inputs.weight), contiguous(inputs.bias)
        mask = dense_mask(inputs.mask, x)
        self.mask = None if mask is None else mask.view(torch.uint8)

    def like(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor in x's layout."""
        return None if tensor is None else like(tensor, self.x)

    def start(
        self,
        kernel: str,
        programs: int,
        tensors: tuple[Tensor | None, ...],
        sizes: tuple[int, ...] = (),
        **constants: Any,
    ) -> None:
        """So many programs, each for all chunks of its units."""
        g, at, spec = self.geometry, self.launch, self.spec
        getattr(_kernels(), kernel)[(programs * at.chunks,)](
            *tensors,
            *(at.period, g.outer_stride // g.step, g.unit_stride // g.step),
            *(g.rows, g.cols // g.step, g.row_stride // g.step),
            *(g.group, g.entries, at.tiles, at.chunk, at.chunks, self.indices),
            *sizes,
            CENTER=spec.center,
            ACT=spec.act,
            KEPT=g.kept,
            AFFINE=g.affine,
            WHOLE=at.whole,
            STEP=g.step,
            STAGES=at.stages,
            MERGED=at.merged or 1,
            A=at.a,
            B=at.b,
            T=_type(self.dtype),
            num_warps=at.warps,
            **FUSION,
            **constants,
        )


class _Forward(_Call):
    """The outputs of a forward, and the launches that write them."""

    def __init__(self, spec: Spec, inputs: Inputs) -> None:
        super().__init__(spec, inputs, "forward")
        x, pools = self.x, self.geometry.statistics
        self.y = torch.empty_like(x)
        self.total = None if inputs.add is None else torch.empty_like(x)
        self.mean = x.new_empty(pools, dtype=torch.float64)
        self.rstd, self.var = (x.new_empty(pools, dtype=self.dtype) for _ in range(2))
        self.tensors = (
            *(x, self.like(inputs.add), self.like(inputs.residual)),
            *(self.mask, self.weight, self.bias),
            *(contiguous(inputs.mean), contiguous(inputs.var)),
            *(self.y, self.total, self.mean, self.rstd, self.var),
        )

    def run(self, phase: str, parts: Tensor | None = None) -> None:
        self.start(
            "forward",
            self.launch.units,
            (*self.tensors, parts),
            eps=self.spec.eps,
            PHASE=phase,
        )

    def moments(self) -> Tensor:
        """(count, mean, M2) of the chunks."""
        shape = (3, self.launch.chunks, self.indices)
        parts = self.x.new_empty(shape, dtype=torch.float64)
        self.run("moments", parts)
        return parts

    def merge(self, parts: Tensor, *to: Tensor | None) -> None:
        """The count, mean, rstd and variance of the pools, as far as they are wanted."""
        spec, g = self.spec, self.geometry
        a, b = _table(parts.shape[1], g.pools)
        _kernels().merge[(-(-g.pools // b),)](
            *(parts, *to, *parts.shape[1:], g.pools, g.group),
            *(spec.eps, spec.center, a, b, _type(self.dtype)),
            num_warps=4,
            **FUSION,
        )


class _Backward(_Call):
    """The gradients of a backward, and the launches that write them."""

    def __init__(
        self, spec: Spec, inputs: Inputs, dy: Tensor, dtotal: Tensor | None = None
    ) -> None:
        super().__init__(spec, inputs, "backward")
        x, g, at = self.x, self.geometry, self.launch
        residual, output = self.like(inputs.residual), self.like(inputs.output)
        self.inputs, self.dy = inputs, dy
        self.dx = torch.empty_like(x)
        self.dz = None if residual is None and output is None else torch.empty_like(x)
        self.wants = self.weight is not None or self.bias is not None
        self.of_pools = g.affine == "pool"
        self.programs, self.rows = at.units, at.chunks * g.outer
        if shared(g):
            most = _multiprocessors(x.device) * WARPS_PER_SM // at.warps
            self.programs = self.rows = min(at.units, most)
        self.affine = None
        if self.wants and not self.of_pools:
            new = x.new_empty if covers(g, at) else x.new_zeros
            self.affine = new((2, self.rows, g.entries), dtype=self.dtype)
        self.tensors = (
            *(self.like(dy), x, residual, output, self.mask, self.weight, self.bias),
            *(inputs.mean, inputs.rstd, self.like(dtotal)),
        )

    def run(
        self,
        phase: str,
        sums: Tensor | None = None,
        parts: Tensor | None = None,
        merged: Tensor | None = None,
    ) -> None:
        g, at = self.geometry, self.launch
        affine = self.affine if phase in ("both", "sums") else None
        self.start(
            "backward",
            self.programs,
            (*self.tensors, parts, merged, self.dx, self.dz, sums, affine),
            (at.units, g.pools, self.programs, self.rows),
            PHASE=phase,
            GIVEN=self.spec.given and phase != "project",
            COVERS=covers(g, at),
            SHARED=shared(g),
        )

    def new_sums(self) -> Tensor:
        return self.x.new_empty((2, self.geometry.pools), dtype=self.dtype)

    def sums(self) -> Tensor:
        """Σg, Σg x̂ and, with a mask, the count of the chunks."""
        planes = 2 if self.mask is None else 3
        shape = (planes, self.launch.chunks, self.indices)
        parts = self.x.new_empty(shape, dtype=self.dtype)
        self.run("sums", parts)
        return parts

    def fold_pools(self, parts: Tensor) -> Tensor:
        """The sums of the pools from those of the chunks."""
        return self.fold(parts, self.geometry.pools, self.geometry.group)

    def fold(self, parts: Tensor, entries: int, group: int = 1) -> Tensor:
        """The sums of (planes, rows, entries * group) over rows and over `group` neighbours."""
        planes, rows, indices = parts.shape
        out = parts.new_empty((planes, entries))
        a, b = _table(rows, entries)
        _kernels().fold[(-(-entries // b), planes)](
            *(parts, out, rows, indices, entries, group, a, b, _type(self.dtype)),
            num_warps=4,
            **FUSION,
        )
        return out

    def parameters(self, sums: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of weight and bias, from the pools' sums or from what was gathered."""
        if not self.wants:
            return None, None
        affine = self.affine
        if self.of_pools:
            assert sums is not None
            affine = sums[:2].view(2, -1, self.geometry.entries)
        assert affine is not None
        one = affine.shape[1] == 1
        dbias, dweight = affine[:, 0] if one else self.fold(affine, self.geometry.entries)
        inputs = self.inputs
        return _as_parameter(inputs.weight, dweight), _as_parameter(inputs.bias, dbias)

    def dresidual(self) -> Tensor:
        if self.dz is not None:
            return self.dz
        mask = self.inputs.mask
        return self.dy if mask is None else torch.where(mask, self.dy, 0)


def _table(rows: int, entries: int) -> tuple[int, int]:
    """The tile of a second stage: few columns where there are few, so that many programs share."""
    a = min(128, power_of_two(rows))
    return a, max(16, min(power_of_two(entries), 2048 // a, 64))


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module(".triton_kernels", __package__)


@functools.cache
def _type(dtype: torch.dtype) -> Any:
    return getattr(importlib.import_module("triton.language"), str(dtype).removeprefix("torch."))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else OLDEST


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _as_parameter(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if parameter is None or gradient is None:
        return None
    return gradient.reshape(parameter.shape).to(parameter.dtype)
