"""Reparametrized weights, on `torch.nn.utils.parametrize`: they normalize a weight, not a feature.

`weight_norm`, `spectral_norm` and `weight_standardization` work on Linear, every convolution
(grouped and transposed too) and any layer whose weight has its outputs on the first axis. The
layer stays what it was for `isinstance`, and deepcopy, pickle and state dicts hold; `remove` bakes
the weight in. State dicts of torch's own versions load: those of `torch.nn.utils.parametrizations`
and the older ones of hooks (`weight_g`, `weight_v`; `weight_orig`, `weight_u`, `weight_v`).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from normkit import functional
from normkit.backend.reference import wide
from normkit.formula.spec import check_eps
from normkit.runtime import recompute, state

Layer = TypeVar("Layer", bound=nn.Module)

_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def weight_norm(layer: Layer, name: str = "weight") -> Layer:
    """Weight normalization: the length and the direction of each output's weights apart.

    w = g * v / ||v||, for each output channel

    g, one real value an output, is the parameter `layer.parametrizations.weight.original0`; v, of
    the weight's shape, is `original1`. They start where w is the layer's weight. Both are new
    parameters: make the optimizer afterwards. The same in training and evaluation. For the paper's
    initialization by the first batch see `initialize_weight_norm`.

    Args:
        layer: with a parameter `name` of two axes or more; it is changed in place.
        name: of the weight.

    Returns:
        The layer.

    Raises:
        ValueError: no such parameter; one that is parametrized already; an output whose weights
            are all zero, which have no direction.

    torch's normalizes a transposed convolution by its input channels unless told otherwise. A
    state dict of that, or of `dim=None`, loads as the same weight: v is then the weight itself.

    Source: Salimans & Kingma 2016 (arXiv 1602.07868), equation 2.
    """
    weight = _weight(layer, name)
    rows = _by_output(weight, groups := _transposed_groups(layer)).flatten(1)
    if not weight.is_meta and not (rows != 0).any(1).all():
        raise ValueError(
            f"{layer}: weight_norm needs a nonzero weight in each output channel, and {name} has "
            f"{int((rows == 0).all(1).sum())} of zeros; initialize it first"
        )
    return _register(layer, name, _WeightNorm(groups))


@torch.no_grad()
def initialize_weight_norm(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Data-dependent initialization: each weight-normalized layer's outputs standardized.

    t = v · x / ||v||,  g = 1 / std[t],  b = -mean[t] / std[t], per output channel

    `model(*args, **kwargs)` is called once, with the first batch, in the mode that it is in. On
    the way each Linear or convolution under `weight_norm` sets g, and its bias where it has one,
    from its own input, so that its outputs have mean 0 (with a bias) and variance 1 on this batch;
    a layer that is called several times does so at its first call. Nothing else moves: buffers
    and the random state are as before, and after an exception the parameters are too.

    Raises:
        ValueError: no layer under `weight_norm`; one that the call didn't reach, or that is
            neither Linear nor a convolution; an output that is constant on this batch.

    Source: Salimans & Kingma 2016 (arXiv 1602.07868), equations 5 and 6.
    """
    layers = {n: m for n, m in model.named_modules() if _is_weight_normalized(m)}
    if not layers:
        raise ValueError(f"no layer of {type(model).__name__} is under weight_norm; apply it first")
    waiting = dict(layers)

    def initialize(name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if waiting.pop(name, None) is not None:
            _initialize(name, layer, args, kwargs)

    saved = {t: t.clone() for t in (*model.parameters(), *model.buffers())}
    handles = [
        layer.register_forward_pre_hook(functools.partial(initialize, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    devices = {t.device for t in saved if t.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            model(*args, **kwargs)
        if waiting:
            raise ValueError(
                f"the call reached no {', '.join(waiting)}, so that they can't be initialized; "
                "call the model as in training"
            )
    except BaseException:
        for tensor, before in saved.items():
            tensor.copy_(before)
        raise
    finally:
        for handle in handles:
            handle.remove()
    for buffer in model.buffers():
        buffer.copy_(saved[buffer])


def spectral_norm(layer: Layer, name: str = "weight") -> Layer:
    """Spectral normalization: the weight divided by an estimate of its largest singular value.

    v <- W^H u / ||W^H u||,  u <- W v / ||W v||,  w = W / Re(u^H W v)

    W, real or complex, is seen as a matrix (outputs, everything else); for a grouped convolution,
    whose groups are stacked so, the estimate bounds that of each group from above. In training one
    such power iteration is made whenever the weight is read, so once in a forward; in evaluation
    u and v stay. A recomputation by activation checkpointing reads those of its forward and moves
    none. They are buffers; W is the parameter `layer.parametrizations.weight.original`, the same
    object that the weight was. u and v start with 15 iterations from a random direction.

    Args:
        layer: with a parameter `name` of two axes or more; it is changed in place.
        name: of the weight.

    Returns:
        The layer.

    Raises:
        ValueError: no such parameter; one that is parametrized already; a weight of zeros.

    Source: Miyato et al. 2018 (arXiv 1802.05957), equation 8 and algorithm 1.
    """
    weight = _weight(layer, name)
    if not weight.is_meta and not weight.any():
        raise ValueError(
            f"{layer}: spectral_norm of a zero {name}, whose largest singular value is 0; "
            "initialize it first"
        )
    return _register(layer, name, _SpectralNorm(weight, isinstance(layer, _Transposed)))


def weight_standardization(layer: Layer, name: str = "weight", eps: float = 1e-10) -> Layer:
    """Weight standardization: the weights of each output channel with mean 0 and variance 1.

    w = (W - mean) / sqrt(variance + eps), over the weights of an output channel

    The biased variance, without affine: a normalization of the outputs goes behind. W is the
    parameter `layer.parametrizations.weight.original`, the same object that the weight was. The
    same in training and evaluation.

    Args:
        layer: with a parameter `name` of two axes or more; it is changed in place.
        name: of the weight.
        eps: against constant weights. The paper adds 1e-5 to the standard deviation, which has no
            derivative there; its square under the root is the same for all other weights.

    Returns:
        The layer.

    Raises:
        ValueError: no such parameter; one that is parametrized already; a single weight to an
            output channel; eps out of range.
        TypeError: a complex weight.

    Source: Qiao et al. 2019 (arXiv 1903.10520), section 2.
    """
    weight = _weight(layer, name)
    if weight.is_complex():
        raise TypeError(
            f"{layer}: weight_standardization needs a real {name}, got {weight.dtype}; weight_norm "
            "and spectral_norm take complex ones"
        )
    groups = _transposed_groups(layer)
    if _by_output(weight, groups)[0].numel() == 1:
        raise ValueError(
            f"{layer}: weight_standardization needs more than 1 weight to an output channel, got "
            f"{name} of shape {tuple(weight.shape)}, which would be 0 throughout"
        )
    return _register(layer, name, _WeightStandardization(groups, eps))


def remove(layer: Layer, name: str = "weight") -> Layer:
    """Make the parametrized weight, as evaluation has it, the layer's parameter again.

    Under `weight_norm` it is a new parameter; else the same object that it was.

    Returns:
        The layer.

    Raises:
        ValueError: `name` isn't parametrized by this module.
    """
    if name not in (ours := _reparametrizations(layer)):
        raise ValueError(f"{layer}: {name} is under no parametrization of normkit; nothing removed")
    ours[name].eval()
    parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    return layer


class _Reparametrization(nn.Module):
    """What a weight is computed by, and how torch's state dicts of the same kind are read."""

    def right_inverse(self, weight: Tensor) -> Any:
        """The parameters that give this weight, up to what the parametrization takes out."""
        return weight

    def adopt(self, saved: dict[str, Any], prefix: str, name: str) -> None:
        """Rewrite what torch's versions saved of the weight `name` to what this module saves."""


class _WeightNorm(_Reparametrization):
    def __init__(self, groups: int | None) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        rows = wide(_by_output(v, self.groups))
        return _by_output((wide(g) * rows / _lengths(rows)).to(v.dtype), self.groups)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        lengths = _lengths(_by_output(weight, self.groups))
        return lengths.to(weight.real.dtype), weight

    def adopt(self, saved: dict[str, Any], prefix: str, name: str) -> None:
        g_name, v_name = (f"{prefix}parametrizations.{name}.original{i}" for i in (0, 1))
        _rename(saved, {f"{prefix}{name}_g": g_name, f"{prefix}{name}_v": v_name})
        g, v = saved.get(g_name), saved.get(v_name)
        if g is None or v is None or g.shape == _lengths(_by_output(v, self.groups)).shape:
            return
        other = [i for i in range(v.dim()) if g.dim() == 0 or g.shape[i] == 1]
        weight = v * (g / torch.linalg.vector_norm(v, dim=other, keepdim=True))
        saved[g_name], saved[v_name] = self.right_inverse(weight)


class _SpectralNorm(_Reparametrization):
    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        matrix = self._matrix(wide(weight.detach()))
        u = torch.randn_like(matrix[:, 0])
        for _ in range(15):
            u, v = _power_iteration(matrix, u)
        self.register_buffer("_u", u.to(weight.dtype))
        self.register_buffer("_v", v.to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        with _without_autocast(weight.device):
            matrix = self._matrix(wide(weight))
            vectors = functools.partial(self._vectors, matrix)
            u, v = recompute.remember(vectors, moves=self.training)
            sigma = (u.conj() @ (matrix @ v)).real
            return weight / sigma.to(weight.real.dtype)

    def adopt(self, saved: dict[str, Any], prefix: str, name: str) -> None:
        new = f"{prefix}parametrizations.{name}."
        names = {"_orig": "original", "_u": "0._u", "_v": "0._v"}
        _rename(saved, {f"{prefix}{name}{old}": new + end for old, end in names.items()})

    def _vectors(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of u and v, moved on in training; the buffers may move before the backward."""
        u, v = (state.read(t).to(matrix.dtype, copy=True) for t in (self._u, self._v))
        if self.training:
            u, v = _power_iteration(matrix, u)
            if not recompute.recomputing():
                state.write(self._u, u)
                state.write(self._v, v)
        return u, v

    def _matrix(self, weight: Tensor) -> Tensor:
        return (weight.movedim(1, 0) if self.transposed else weight).flatten(1)


class _WeightStandardization(_Reparametrization):
    def __init__(self, groups: int | None, eps: float) -> None:
        super().__init__()
        check_eps(eps)
        self.groups, self.eps = groups, eps

    def forward(self, weight: Tensor) -> Tensor:
        rows = _by_output(weight, self.groups)
        standard = functional.layer_norm(rows, rows.shape[1:], eps=self.eps)
        assert isinstance(standard, Tensor)
        return _by_output(standard, self.groups)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast would take products, and so an estimate, down to its dtype."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def _transposed_groups(layer: nn.Module) -> int | None:
    """The groups of a transposed convolution; None for weights with the outputs on axis 0."""
    return layer.groups if isinstance(layer, _Transposed) else None


def _by_output(weight: Tensor, groups: int | None) -> Tensor:
    """The weight as (outputs, inputs of each, *) and back: for transposed ones it is one swap."""
    if groups is None:
        return weight
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _lengths(rows: Tensor) -> Tensor:
    axes = tuple(range(1, rows.dim()))
    return torch.linalg.vector_norm(wide(rows), dim=axes, keepdim=True)


@torch.no_grad()
def _power_iteration(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    v = F.normalize(matrix.mH @ u, dim=0)
    return F.normalize(matrix @ v, dim=0), v


def _weight(layer: nn.Module, name: str) -> Tensor:
    """The parameter that is to be parametrized, or ValueError."""
    if parametrize.is_parametrized(layer, name):
        kinds = [type(p).__name__.strip("_") for p in layer.parametrizations[name]]  # type: ignore[index]
        raise ValueError(
            f"{layer}: {name} is parametrized already, by {', '.join(kinds)}; remove that first"
        )
    weight = layer._parameters.get(name)
    if weight is None:
        hooked = hasattr(layer, f"{name}_g") or hasattr(layer, f"{name}_orig")
        remedy = (
            "; a hook of torch.nn.utils is on it: remove_weight_norm or remove_spectral_norm first"
            if hooked
            else f"; its parameters are {', '.join(layer._parameters) or 'none'}"
        )
        raise ValueError(f"{layer}: no parameter {name!r}{remedy}")
    if weight.dim() < 2:
        raise ValueError(
            f"{layer}: expected {name} with an axis of outputs and one of inputs at least, got "
            f"shape {tuple(weight.shape)}"
        )
    return weight


def _register(layer: Layer, name: str, parametrization: nn.Module) -> Layer:
    parametrize.register_parametrization(layer, name, parametrization)
    # torch makes a class for the layer that can't be pickled and that deep copies share, so that
    # removing from one breaks the other; it is found under no name, so it is made again.
    made: Any = type(layer)
    if "__deepcopy__" in vars(made):
        del made.__deepcopy__
    made.__reduce_ex__ = _reduce
    made._load_from_state_dict = _load
    return layer


def _reparametrizations(layer: nn.Module) -> dict[str, _Reparametrization]:
    """Name of the weight -> what this module put on it."""
    if not parametrize.is_parametrized(layer):
        return {}
    firsts = {name: entries[0] for name, entries in layer.parametrizations.items()}  # type: ignore[union-attr, operator]
    return {name: p for name, p in firsts.items() if isinstance(p, _Reparametrization)}


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    base = _base(self)
    state = dict(base.__getstate__(self))
    if isinstance(self, nn.RNNBase):
        # A list of the weights as last read, which torch brings up to date in the next forward;
        # computed ones have a history, which can't be copied.
        state["_flat_weights"] = [
            w if w is None or w.is_leaf else w.detach() for w in self._flat_weights
        ]
    return _remake, (base, tuple(self.parametrizations)), state  # type: ignore[arg-type]


def _remake(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An empty layer of this class whose weights are parametrized; its state comes after."""
    layer = base.__new__(base)
    nn.Module.__init__(layer)
    for name in names:
        layer.register_buffer(name, torch.empty(1, 1))
        _register(layer, name, nn.Identity())
    return layer


def _load(self: nn.Module, saved: dict[str, Any], prefix: str, *args: Any) -> None:
    for name, entry in _reparametrizations(self).items():
        entry.adopt(saved, prefix, name)
    _base(self)._load_from_state_dict(self, saved, prefix, *args)


def _base(layer: nn.Module) -> Any:
    """The class that the layer had before torch made one for it."""
    return parametrize.type_before_parametrizations(layer)


def _rename(saved: dict[str, Any], names: dict[str, str]) -> None:
    if all(old in saved for old in names):
        for old, new in names.items():
            saved[new] = saved.pop(old)


def _is_weight_normalized(layer: nn.Module) -> bool:
    return isinstance(_reparametrizations(layer).get("weight"), _WeightNorm)


def _initialize(name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
    if isinstance(layer, nn.Linear):
        axis = -1
    elif isinstance(layer, nn.modules.conv._ConvNd):
        axis = -1 - len(layer.kernel_size)
    else:
        raise ValueError(
            f"{name}: {layer} is neither Linear nor a convolution; it can't tell its outputs"
        )
    g: nn.Parameter = layer.parametrizations.weight.original0  # type: ignore[union-attr, assignment]
    g.fill_(1)
    if layer.bias is not None:
        layer.bias.fill_(0)
    t = wide(layer.forward(*args, **kwargs)).movedim(axis, 0).flatten(1)
    std, mean = torch.std_mean(t, 1, correction=0)
    constant = ~(std > 0)
    if constant.any():
        raise ValueError(
            f"{name}: {layer}: {int(constant.sum())} of {len(std)} outputs are constant on this "
            "batch, whose std can't be made 1; use a larger batch, or weights that aren't dead"
        )
    g.copy_((1 / std).reshape(g.shape))
    if layer.bias is not None:
        layer.bias.copy_(-mean / std)
