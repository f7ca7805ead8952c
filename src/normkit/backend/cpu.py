"""The C++ core: one pass over memory where a pool fits in cache, for dense tensors on the CPU."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normkit.backend.layout import DTYPES, contiguous, dense, dense_mask, like
from normkit.backend.layout import dense_inputs as dense_inputs
from normkit.backend.protocol import Gradients, Normalized, Sums
from normkit.formula.pool import Pool, Summed
from normkit.formula.spec import ACTS, Inputs, Spec, compute_dtype, is_wrapper

DEVICE = "cpu"
_SUMMED: dict[Summed, int] = {"ns": 0, "s": 1, "ks": 2, "k": 3}
_ACTS = {act: code for code, act in enumerate((None, *ACTS))}


@functools.cache
def available() -> str | None:
    """Why this backend can't be used on this machine, or None."""
    if os.environ.get("NORMKIT_NO_EXTENSION") == "1":
        return "switched off by NORMKIT_NO_EXTENSION=1"
    built = sorted(Path(__file__).parent.parent.glob("_cpu*.so"))
    if not built:
        return "the C++ core was not built; install a C++ compiler and reinstall normkit"
    try:
        torch.ops.load_library(str(built[0]))
    except OSError as error:
        return f"the C++ core can't be loaded: {error}"
    _check_codes(built[0])
    _register_shapes()
    _register_zeros()
    try:
        instructions()
    except RuntimeError as error:
        return "NORMKIT_CPU=" + str(error).splitlines()[0].partition("NORMKIT_CPU=")[2]
    return None


def _check_codes(core: Path) -> None:
    """Pools and activations must have the numbers here that they have in the core."""
    pairs = [*_SUMMED.items(), *_ACTS.items()]
    ours = " ".join(f"{name}={code}" for name, code in pairs)
    operators = torch.ops.normkit
    theirs = operators.codes() if hasattr(operators, "codes") else "an unknown list"
    if theirs != ours:
        raise RuntimeError(
            "the C++ core must number pools and activations as normkit.backend.cpu does, "
            f"{ours}, got {theirs} from {core}; build the core of this version: reinstall normkit"
        )


def instructions() -> str:
    """The instruction set in use: avx512_bf16, avx512, avx2 or portable; NORMKIT_CPU forces one."""
    return torch.ops.normkit.instructions()


def why_not(spec: Spec, inputs: Inputs) -> str | None:
    """Why this backend can't take this call, or None."""
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    if spec.conditional:
        return "weight or bias is given per sample"
    if is_wrapper(x):
        return f"x is a {type(x).__name__}, which has rules for torch's operators alone"
    if not x.is_cpu:
        return f"x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    if x.layout != torch.strided:
        return f"x is {x.layout}"
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype not in DTYPES:
            return f"{name} is {parameter.dtype}"
    return None


def normalize(spec: Spec, inputs: Inputs) -> Normalized:
    """The mean is float64, so that it keeps what float32 would drop."""
    if inputs.add is None:
        return Normalized(*torch.ops.normkit.normalize.default(*_forward_arguments(spec, inputs)))
    x, weight, bias, _, mask, _, _, *constants = _forward_arguments(spec, inputs)
    return Normalized(
        *torch.ops.normkit.add_normalize.default(
            x, like(inputs.add, x), weight, bias, mask, *constants
        )
    )


def output(spec: Spec, inputs: Inputs) -> Tensor:
    return torch.ops.normkit.output.default(*_forward_arguments(spec, inputs))


def _forward_arguments(spec: Spec, inputs: Inputs) -> tuple[Any, ...]:
    x, weight, bias, residual, mask, _, mean, var, *_ = inputs
    x = dense(spec, x)
    return (
        *(x, contiguous(weight), contiguous(bias), like(residual, x), dense_mask(mask, x)),
        *(contiguous(mean), contiguous(var), *_constants(spec)),
    )


def move(
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    unbias: float,
) -> bool:
    """Move running averages towards a batch's moments in place; False where it can't."""
    if not (running_mean.is_cpu and available() is None) or is_wrapper(running_mean):
        return False
    if not all(t.dtype in DTYPES and t.is_contiguous() for t in (running_mean, running_var)):
        return False
    if batches is not None and (batches.dtype != torch.int64 or batches.dim() > 0):
        return False
    torch.ops.normkit.move.default(running_mean, running_var, batches, mean, var, momentum, unbias)
    moved = (running_mean, running_var, batches)
    torch.autograd.graph.increment_version([t for t in moved if t is not None])
    return True


def moments(spec: Spec, inputs: Inputs) -> Tensor:
    x = dense(spec, inputs.x)
    return torch.ops.normkit.moments.default(x, dense_mask(inputs.mask, x), *_constants(spec))


def normalize_backward(
    spec: Spec, inputs: Inputs, dy: Tensor, dtotal: Tensor | None = None
) -> Gradients:
    return _backward(spec, inputs, dy, None, dtotal)


def sums(spec: Spec, inputs: Inputs, dy: Tensor) -> Sums:
    """Of batch norm alone."""
    weight, bias = inputs.weight, inputs.bias
    of_dz = torch.ops.normkit.sums.default(
        *_backward_tensors(dense(spec, inputs.x), inputs, dy), *_constants(spec)
    )
    return Sums(
        of_dz if weight is None else of_dz * weight,
        None if weight is None else of_dz[1].to(weight.dtype),
        None if bias is None else of_dz[0].to(bias.dtype),
    )


def gradient(spec: Spec, inputs: Inputs, dy: Tensor, means: Tensor) -> Gradients:
    return _backward(spec, inputs, dy, means, None)


def _backward(
    spec: Spec, inputs: Inputs, dy: Tensor, means: Tensor | None, dtotal: Tensor | None
) -> Gradients:
    x, mask = dense(spec, inputs.x), inputs.mask
    dx, dweight, dbias, dz = torch.ops.normkit.normalize_backward.default(
        *_backward_tensors(x, inputs, dy),
        *((None, None) if means is None else means.unbind()),
        like(dtotal, x),
        *_constants(spec),
        spec.given,
        inputs.residual is not None or inputs.output is not None,
    )
    if dz is None:
        dz = dy if mask is None else torch.where(mask, dy, 0)
    return Gradients(dx, dweight, dbias, dz)


def _backward_tensors(x: Tensor, inputs: Inputs, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (
        like(dy, x),
        x,
        contiguous(inputs.weight),
        contiguous(inputs.bias),
        like(inputs.residual, x),
        like(inputs.output, x),
        dense_mask(inputs.mask, x),
        inputs.mean,
        inputs.rstd,
    )


def _constants(spec: Spec) -> tuple[int, int, int, float, bool, int]:
    pool = spec.pool
    act = _ACTS[spec.act]
    groups = pool.ghosts if pool.summed == "ns" else pool.groups
    return _SUMMED[pool.summed], groups or 0, pool.trailing, spec.eps, spec.center, act


def spec_of(
    summed: int, groups: int, trailing: int, eps: float, center: bool, act: int, given: bool
) -> Spec:
    """The call that has these constants."""
    pool = Pool(list(_SUMMED)[summed], groups or None, trailing)
    return Spec(pool, eps, center, list(_ACTS)[act], given)


def _register_shapes() -> None:
    """What a compiler needs to know of each operator: the shapes and dtypes of its results."""

    def statistics(x: Tensor, summed: int, groups: int, trailing: int) -> tuple[int, ...]:
        if trailing:
            return tuple(x.shape[: x.dim() - trailing])
        n, c = x.shape[:2]
        of_batch = (groups, c) if groups else (c,)
        return (of_batch, (n, c), (n, groups), (n, *x.shape[2:]))[summed]

    def forward(x: Tensor, summed: int, groups: int, trailing: int) -> tuple[Tensor, ...]:
        shape, dtype = statistics(x, summed, groups, trailing), compute_dtype(x.dtype)
        return (
            torch.empty_like(x),
            x.new_empty(shape, dtype=torch.float64),
            x.new_empty(shape, dtype=dtype),
            x.new_empty(shape, dtype=dtype),
        )

    @torch.library.register_fake("normkit::normalize")
    def _(x, weight, bias, residual, mask, mean, var, *constants):  # type: ignore[no-untyped-def]
        return forward(x, *constants[:3])

    @torch.library.register_fake("normkit::output")
    def _(x, *others):  # type: ignore[no-untyped-def]
        return torch.empty_like(x)

    @torch.library.register_fake("normkit::move")
    def _(*tensors_and_factors):  # type: ignore[no-untyped-def]
        return None

    @torch.library.register_fake("normkit::add_normalize")
    def _(x, add, weight, bias, mask, *constants):  # type: ignore[no-untyped-def]
        return (*forward(x, *constants[:3]), torch.empty_like(x))

    @torch.library.register_fake("normkit::normalize_backward")
    def _(dy, x, weight, bias, residual, output, mask, mean, rstd, mean_g, *others):  # type: ignore[no-untyped-def]
        like, wants = torch.empty_like, mean_g is None
        return (
            like(x),
            like(weight) if wants and weight is not None else None,
            like(bias) if wants and bias is not None else None,
            like(x) if others[-1] else None,
        )

    @torch.library.register_fake("normkit::moments")
    def _(x, mask, *constants):  # type: ignore[no-untyped-def]
        return x.new_empty((3, *statistics(x, *constants[:3])), dtype=torch.float64)

    @torch.library.register_fake("normkit::sums")
    def _(dy, x, *others):  # type: ignore[no-untyped-def]
        return x.new_empty((2, x.shape[1]), dtype=torch.float64)


_zeros = torch.library.Library("normkit", "IMPL")


def _register_zeros() -> None:
    """Tensors that torch knows to be zero, and allocates no memory for, become ordinary ones."""
    for name in ("normalize", "output", "add_normalize", "normalize_backward", "moments", "sums"):
        _zeros.impl(name, functools.partial(_with_memory, name), "ZeroTensor")


def _with_memory(name: str, *args: Any) -> Any:
    own = [t.clone() if isinstance(t, Tensor) and t._is_zerotensor() else t for t in args]
    return getattr(torch.ops.normkit, name).default(*own)
