"""The layers beside the formula: they share no mean and rstd of a pool, so they are plain modules.

Computed in at least float32; the output has the input's dtype and layout. They hold no running
statistics: training and evaluation are the same. Squares aren't rescaled as the formula's are, so
those of values beyond 1e19 overflow float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from normkit.backend.reference import wide
from normkit.common.errors import InputError
from normkit.formula.checks import check_floating, check_input, check_size
from normkit.formula.spec import check_eps
from normkit.layers import _Norm
from normkit.runtime.readers import leave_to_forward


class DyT(_Norm):
    """Dynamic tanh, a replacement of layer norm that computes no statistics.

    y = tanh(alpha * x) * weight + bias

    alpha: a scalar. weight, bias: (num_features,), along the last axis of (*, C), as in the
    paper's transformers, or along axis 1 of (N, C, *) with `channels_first`.

    Args:
        num_features: C.
        alpha: what the learned alpha starts from.
        channels_first: the input is (N, C, *) instead of (*, C).
        device, dtype: of the parameters.

    Raises:
        ValueError: another number of channels; alpha not finite.
        TypeError: an input that isn't floating point.

    Source: Zhu et al. 2025 (arXiv 2503.10622), equation 2 and algorithm 1.
    """

    def __init__(
        self,
        num_features: int,
        alpha: float = 0.5,
        channels_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not math.isfinite(alpha):
            raise ValueError(f"DyT: alpha must be finite, got {alpha}; the paper starts from 0.5")
        num_features = check_size("num_features", num_features)
        self.num_features, self.channels_first = num_features, channels_first
        self.alpha_init = alpha
        self.alpha = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """alpha as given, weight 1, bias 0."""
        nn.init.constant_(self.alpha, self.alpha_init)
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """y, of the input's shape."""
        return self._call(
            _dyt, input, self.alpha, self.weight, self.bias, channels_first=self.channels_first
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, alpha={self.alpha_init}, channels_first={self.channels_first}"


class FilterResponseNorm(_Norm):
    """Filter response normalization of (N, C, *), with its thresholded linear unit (TLU).

    nu2 = <x²> over the positions *,  y = max(x / sqrt(nu2 + |eps|) * weight + bias, tau)

    Each channel of each sample by itself, no mean subtracted. weight, bias, tau: (C,), from 1, 0
    and 0, so that it starts as a ReLU does. The TLU is part of it: no activation goes behind.

    Args:
        num_features: C.
        eps: 1e-6 as published, or with `learn_eps` what it starts from, published 1e-4.
        learn_eps: eps is a parameter, a scalar. Needed where a channel has a single position,
            since x / sqrt(x² + eps) is hardly more than the sign of x when eps is small.
        tlu: False leaves max(., tau) out; there is no tau then.
        device, dtype: of the parameters.

    Raises:
        ValueError: another number of channels; a single position without `learn_eps`; eps out of
            range.
        TypeError: an input that isn't floating point.

    Source: Singh & Krishnan 2019 (arXiv 1911.09737), section 3 and listing 1.
    """

    tau: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        learn_eps: bool = False,
        tlu: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_features = check_size("num_features", num_features)
        check_eps(eps)
        self.num_features, self.eps_init = num_features, eps
        self.eps = nn.Parameter(torch.empty((), device=device, dtype=dtype)) if learn_eps else eps
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        tau = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if tlu else None
        self.register_parameter("tau", tau)
        self.reset_parameters()
        leave_to_forward(self)

    def reset_parameters(self) -> None:
        """weight 1, bias and tau 0, a learned eps as given."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        if self.tau is not None:
            nn.init.zeros_(self.tau)
        if isinstance(self.eps, nn.Parameter):
            nn.init.constant_(self.eps, self.eps_init)

    def forward(self, input: Tensor) -> Tensor:
        """y, of the input's shape (N, C, *)."""
        return self._call(_filter_response_norm, input, self.weight, self.bias, self.tau, self.eps)

    def extra_repr(self) -> str:
        learned = isinstance(self.eps, nn.Parameter)
        tlu = self.tau is not None
        return f"{self.num_features}, eps={self.eps_init}, learn_eps={learned}, tlu={tlu}"


class GlobalResponseNorm(_Norm):
    """Global response normalization: channels compete by their norms over the positions.

    G_c = ||x_c|| over the positions,  y = x * G / (<G> + eps) * weight + bias + x

    <G> is the mean over the channels of a sample. weight, bias: (C,), from 0, so that it starts
    as the identity.

    Args:
        num_features: C.
        eps: keeps a sample of zeros finite; 1e-6 as published.
        channels_first: the input is (N, C, *), as elsewhere in this package; False takes (N, *, C),
            the layout of the authors' ConvNeXt V2, whose gamma and beta of shape (1, 1, 1, C) are
            weight and bias flattened.
        device, dtype: of the parameters.

    Raises:
        ValueError: another number of channels; no position axis; eps out of range.
        TypeError: an input that isn't floating point.

    Source: Woo et al. 2023 (arXiv 2301.00808), equations 1 to 3 and algorithm 1.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        channels_first: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_features = check_size("num_features", num_features)
        check_eps(eps)
        self.num_features, self.eps, self.channels_first = num_features, eps, channels_first
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()
        leave_to_forward(self)

    def reset_parameters(self) -> None:
        """weight and bias 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """y, of the input's shape."""
        return self._call(
            _global_response_norm,
            *(input, self.weight, self.bias, self.eps),
            channels_first=self.channels_first,
        )

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, channels_first={self.channels_first}"


def _dyt(
    input: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor, *, channels_first: bool
) -> Tensor:
    check_input(input, 2 if channels_first else 1, "(N, C, *)" if channels_first else "(*, C)")
    check_floating("alpha", alpha)
    spread = _Spread(input, weight, 1 if channels_first else -1)
    y = torch.tanh(wide(alpha) * wide(input)) * spread(weight) + spread(bias)
    return y.to(input.dtype)


def _filter_response_norm(
    input: Tensor, weight: Tensor, bias: Tensor, tau: Tensor | None, eps: float | Tensor
) -> Tensor:
    check_input(input, 2, "(N, C, *)")
    spread = _Spread(input, weight, 1)
    x = wide(input)
    if math.prod(x.shape[2:]) == 1 and not isinstance(eps, Tensor):
        raise InputError(
            f"expected more than 1 position per channel, got input of shape {tuple(input.shape)}, "
            "which a fixed eps reduces to its sign; use learn_eps=True"
        )
    positions = tuple(range(2, x.dim()))
    nu2 = (x * x).mean(positions, keepdim=True) if positions else x * x
    y = x * torch.rsqrt(nu2 + (eps.abs() if isinstance(eps, Tensor) else eps)) * spread(
        weight
    ) + spread(bias)
    return (y if tau is None else torch.maximum(y, spread(tau))).to(input.dtype)


def _global_response_norm(
    input: Tensor, weight: Tensor, bias: Tensor, eps: float, *, channels_first: bool
) -> Tensor:
    check_input(input, 3, "(N, C, *)" if channels_first else "(N, *, C)")
    axis = 1 if channels_first else input.dim() - 1
    spread = _Spread(input, weight, axis)
    x = wide(input)
    positions = tuple(i for i in range(1, x.dim()) if i != axis)
    norms = torch.linalg.vector_norm(x, dim=positions, keepdim=True)
    response = norms / (norms.mean(axis, keepdim=True) + eps)
    return (x * response * spread(weight) + spread(bias) + x).to(input.dtype)


for _name in ("_dyt", "_filter_response_norm", "_global_response_norm"):
    torch.fx.wrap(_name)


class _Spread:
    """A parameter, one value a channel, in the shape that broadcasts against x."""

    def __init__(self, x: Tensor, parameter: Tensor, axis: int) -> None:
        if x.shape[axis] != parameter.shape[0]:
            raise InputError(
                f"expected {parameter.shape[0]} channels on axis {axis}, got input of shape "
                f"{tuple(x.shape)}; the layer and its input must agree"
            )
        self.shape = [1] * x.dim()
        self.shape[axis] = -1

    def __call__(self, parameter: Tensor) -> Tensor:
        check_floating("every parameter", parameter)
        return wide(parameter).reshape(self.shape)
