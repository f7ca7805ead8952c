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

from ..spec import Inputs, Spec, compute_dtype
from .cpu import DTYPES, _dense, _dense_affine, _like
from .triton_plan import WARPS_PER_SM, _power, covers, geometry, launch, shared

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


def normalize(spec: Spec, inputs: Inputs) -> tuple[Tensor, ...]:
    """As `reference.normalize`; the mean is float64, so that it keeps what float32 would drop."""
    call = _Call(spec, inputs, "forward")
    x, g, at = call.x, call.geometry, call.launch
    y = torch.empty_like(x)
    total = None if inputs.add is None else torch.empty_like(x)
    mean = x.new_empty(g.statistics, dtype=torch.float64)
    rstd, var = (x.new_empty(g.statistics, dtype=call.dtype) for _ in range(2))
    tensors = (
        *(x, call.like(inputs.add), call.like(inputs.residual), call.mask, call.weight, call.bias),
        *(_dense_affine(inputs.mean), _dense_affine(inputs.var), y, total, mean, rstd, var),
    )

    def run(phase: str, parts: Tensor | None = None) -> None:
        call.run("forward", at.units, (*tensors, parts), PHASE=phase)

    with _on(x.device):
        if spec.given:
            run("apply")
        elif at.split:
            parts = x.new_empty((3, at.chunks, call.indices), dtype=torch.float64)
            run("moments", parts)
            if at.merged:
                run("apply", parts)
            else:
                _merge(call, parts, mean, rstd, var)
                run("apply")
        else:
            run("both")
    return (y, mean, rstd, var) if total is None else (y, mean, rstd, var, total)


def normalize_backward(
    spec: Spec, inputs: Inputs, dy: Tensor, dtotal: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.normalize_backward`."""
    call = _Call(spec, inputs, "backward")
    x, g, at = call.x, call.geometry, call.launch
    residual, output = call.like(inputs.residual), call.like(inputs.output)
    dx = torch.empty_like(x)
    dz = None if residual is None and output is None else torch.empty_like(x)
    wants = call.weight is not None or call.bias is not None
    of_pools = g.affine == "pool"
    programs, rows = at.units, at.chunks * g.outer
    if shared(g):
        programs = rows = min(at.units, _multiprocessors(x.device) * WARPS_PER_SM // at.warps)
    affine = None
    if wants and not of_pools:
        new = x.new_empty if covers(g, at) else x.new_zeros
        affine = new((2, rows, g.entries), dtype=call.dtype)
    tensors = (
        *(call.like(dy), x, residual, output, call.mask, call.weight, call.bias),
        *(inputs.mean, inputs.rstd, call.like(dtotal)),
    )

    def run(
        phase: str,
        sums: Tensor | None,
        parts: Tensor | None = None,
        merged: Tensor | None = None,
    ) -> None:
        call.run(
            "backward",
            programs,
            (*tensors, parts, merged, dx, dz, sums, None if phase == "gradient" else affine),
            (at.units, g.pools, programs, rows),
            PHASE=phase,
            GIVEN=spec.given,
            COVERS=covers(g, at),
            SHARED=shared(g),
        )

    with _on(x.device):
        sums = x.new_empty((2, g.pools), dtype=call.dtype) if of_pools and wants else None
        if not at.split:
            run("both", sums)
        elif spec.given and not wants:
            run("gradient", None)
        else:
            planes = 2 if call.mask is None else 3
            parts = x.new_empty((planes, at.chunks, call.indices), dtype=call.dtype)
            run("sums", parts)
            if at.merged:
                run("gradient", sums, parts)
            else:
                merged = sums = _fold(call, parts, g.pools, g.group)
                run("gradient", None, merged=merged)
        dbias = dweight = None
        if wants:
            if of_pools:
                assert sums is not None
                affine = sums[:2].view(2, -1, g.entries)
            assert affine is not None
            dbias, dweight = (
                affine[:, 0] if affine.shape[1] == 1 else _fold(call, affine, g.entries)
            )
    if dz is None:
        dz = dy if inputs.mask is None else torch.where(inputs.mask, dy, 0)
    return dx, _as_parameter(inputs.weight, dweight), _as_parameter(inputs.bias, dbias), dz


class _Call:
    """What all phases of a call share."""

    def __init__(self, spec: Spec, inputs: Inputs, way: Literal["forward", "backward"]) -> None:
        x = self.x = _dense(spec, inputs.x)
        self.spec, self.dtype = spec, compute_dtype(x.dtype)
        last = not x.is_contiguous()
        g = self.geometry = geometry(spec.pool, tuple(x.shape), last, spec.given, x.itemsize)
        self.launch = launch(g, way, spec.given)
        of_columns = g.outer * g.cols
        self.indices = {"rows": g.rows, "columns": of_columns, "none": self.launch.units}[g.kept]
        self.weight, self.bias = _dense_affine(inputs.weight), _dense_affine(inputs.bias)
        self.mask = None
        if inputs.mask is not None:
            mask = torch.empty_like(x, dtype=torch.bool).copy_(inputs.mask)
            self.mask = mask.view(torch.uint8)

    def like(self, tensor: Tensor | None) -> Tensor | None:
        """The tensor in x's layout."""
        return None if tensor is None else _like(tensor, self.x)

    def run(
        self,
        kernel: str,
        programs: int,
        tensors: tuple[Tensor | None, ...],
        sizes: tuple[int, ...] = (),
        **constants: Any,
    ) -> None:
        """So many programs, each for all chunks of its units."""
        g, at, spec = self.geometry, self.launch, self.spec
        if kernel == "forward":
            constants["eps"] = spec.eps
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


def _merge(call: _Call, parts: Tensor, mean: Tensor, rstd: Tensor, var: Tensor) -> None:
    """Mean, rstd and variance of the pools from (count, mean, M2) of their parts."""
    spec, g = call.spec, call.geometry
    _, chunks, indices = parts.shape
    a, b = _table(chunks, g.pools)
    _kernels().merge[(-(-g.pools // b),)](
        *(parts, mean, rstd, var, chunks, indices, g.pools, g.group),
        *(spec.eps, spec.center, a, b, _type(call.dtype)),
        num_warps=4,
        **FUSION,
    )


def _fold(call: _Call, parts: Tensor, entries: int, group: int = 1) -> Tensor:
    """The sums of (planes, rows, entries * group) over the rows and over `group` neighbours."""
    planes, rows, indices = parts.shape
    out = parts.new_empty((planes, entries))
    a, b = _table(rows, entries)
    _kernels().fold[(-(-entries // b), planes)](
        *(parts, out, rows, indices, entries, group, a, b, _type(call.dtype)),
        num_warps=4,
        **FUSION,
    )
    return out


def _table(rows: int, entries: int) -> tuple[int, int]:
    """The tile of a second stage: few columns where there are few, so that many programs share."""
    a = min(128, _power(rows))
    return a, max(16, min(_power(entries), 2048 // a, 64))


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
