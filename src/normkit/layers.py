"""The layers: torch's constructors and state, the formula's forward.

The torch-named classes subclass torch's, so `isinstance`, state dicts, repr, pickles and converters
hold. They are thin over `normkit.functional`, whose docstrings give the formulas.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from . import functional
from .spec import check_act, check_eps, check_momentum


class _Norm(nn.Module):
    """What all layers share: checked constants, an activation, errors that name the layer."""

    act: str | None = None
    eps: Any

    def _check(self) -> None:
        name = type(self).__name__
        try:
            if not (isinstance(self, RMSNorm) and self.eps is None):
                check_eps(self.eps)
            check_momentum(getattr(self, "momentum", None))
            check_act(self.act)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from error

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{self}: {error}") from error

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"{self}: TorchScript is not supported; use torch.export.export or torch.compile, or "
            "torch.jit.trace"
        )

    def extra_repr(self) -> str:
        own = f", act={self.act!r}" if self.act is not None else ""
        return super().extra_repr() + own


class _BatchLayer(_Norm, _BatchNorm):
    ranks: tuple[int, ...] | None = None

    @functools.wraps(_BatchNorm.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check()

    def forward(
        self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """y of input (N, C, *); `residual` is added before `act`. See `functional.batch_norm`."""
        tracked = self.running_mean is not None and self.running_var is not None
        tracking = self.training and self.track_running_stats
        read = tracking or (tracked and not self.training)
        return self._call(
            functional.batch_norm,
            input,
            self.running_mean if read else None,
            self.running_var if read else None,
            self.weight,
            self.bias,
            self.training or not tracked,
            self.momentum,
            self.eps,
            num_batches_tracked=self.num_batches_tracked if read else None,
            mask=mask,
            residual=residual,
            act=self.act,
            ranks=self.ranks,
        )


class BatchNorm1d(_BatchLayer, nn.BatchNorm1d):
    """Drop-in for `torch.nn.BatchNorm1d`: each channel of (N, C) or (N, C, L) by its batch.

    y = (x - mean) / sqrt(variance + eps) * weight + bias

    weight, bias, running_mean, running_var: (C,). Training uses the batch's statistics (biased
    variance) and moves the running ones (unbiased variance); evaluation uses the running ones.
    Constructor and state are torch's; `forward` takes a `mask` and a `residual` besides.
    Formula, errors and source: `normkit.functional.batch_norm`.
    """

    ranks = (2, 3)


class BatchNorm2d(_BatchLayer, nn.BatchNorm2d):
    """Drop-in for `torch.nn.BatchNorm2d`, for (N, C, H, W); as `BatchNorm1d`."""

    ranks = (4,)


class BatchNorm3d(_BatchLayer, nn.BatchNorm3d):
    """Drop-in for `torch.nn.BatchNorm3d`, for (N, C, D, H, W); as `BatchNorm1d`."""

    ranks = (5,)


class BatchNorm(_BatchLayer):
    """Batch normalization of any (N, C, *), with a fused activation.

    y = act((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    Args:
        *args, **kwargs: those of `torch.nn.BatchNorm1d`, num_features first.
        act: None, "relu", "leaky_relu", "silu" or "gelu".

    State, train and eval behaviour: as `BatchNorm1d`. Errors: `normkit.functional.batch_norm`.
    torch's converters (SyncBatchNorm, conv-bn fusion) take it for plain batch norm and drop `act`.
    """

    def __init__(self, *args: Any, act: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.act = act
        self._check()


class _InstanceLayer(_Norm, _InstanceNorm):
    unbatched_rank: int | None = None

    def __init__(self, *args: Any, act: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.act = act
        self._check()

    def forward(
        self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """y of input (N, C, *) or (C, *); `residual` is added before `act`."""
        unbatched = self.unbatched_rank
        return self._call(
            functional.instance_norm,
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
            mask=mask,
            residual=residual,
            act=self.act,
            ranks=None if unbatched is None else (unbatched, unbatched + 1),
            num_features=self.num_features,
        )


class InstanceNorm1d(_InstanceLayer, nn.InstanceNorm1d):
    """Drop-in for `torch.nn.InstanceNorm1d`: each channel of each sample of (N, C, L) or (C, L).

    y = act((x - mean) / sqrt(variance + eps) * weight + bias + residual), statistics over L

    weight, bias: (C,) with `affine=True` (torch's default is False). Training and evaluation use
    the input's statistics; with `track_running_stats=True` evaluation uses running ones.

    Args:
        *args, **kwargs: those of `torch.nn.InstanceNorm1d`, num_features first.
        act: None, "relu", "leaky_relu", "silu" or "gelu".

    Unlike torch's, it keeps channels_last, and a wrong channel count is an error also without
    affine. Formula, errors and source: `normkit.functional.instance_norm`.
    """

    unbatched_rank = 2


class InstanceNorm2d(_InstanceLayer, nn.InstanceNorm2d):
    """Drop-in for `torch.nn.InstanceNorm2d`, for (N, C, H, W) or (C, H, W); as `InstanceNorm1d`."""

    unbatched_rank = 3


class InstanceNorm3d(_InstanceLayer, nn.InstanceNorm3d):
    """Drop-in for `torch.nn.InstanceNorm3d`, for 5-d or 4-d input; as `InstanceNorm1d`."""

    unbatched_rank = 4


class InstanceNorm(_InstanceLayer):
    """Instance normalization of any (N, C, *) with at least one position axis; as `InstanceNorm1d`.

    There is no unbatched form, which couldn't be told from a batched one.
    """


class GroupNorm(_Norm, nn.GroupNorm):
    """Drop-in for `torch.nn.GroupNorm`: groups of channels of each sample of (N, C, *).

    y = act((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    weight, bias: (C,). The same in training and evaluation.

    Args:
        num_groups, num_channels: the first divides the second.
        *args, **kwargs: the rest of `torch.nn.GroupNorm`'s.
        act: None, "relu", "leaky_relu", "silu" or "gelu".

    Formula, errors and source: `normkit.functional.group_norm`.
    """

    def __init__(
        self, num_groups: int, num_channels: int, *args: Any, act: str | None = None, **kwargs: Any
    ) -> None:
        functional.check_groups(num_groups, num_channels)
        super().__init__(num_groups, num_channels, *args, **kwargs)
        self.act = act
        self._check()

    def forward(
        self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """y of input (N, C, *); `residual` is added before `act`."""
        return self._call(
            functional.group_norm,
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            mask=mask,
            residual=residual,
            act=self.act,
        )


class _RowLayer(_Norm):
    """LayerNorm and RMSNorm: over the last axes, or over the channels of (N, C, *)."""

    channels_first: bool = False
    normalized_shape: tuple[int, ...]

    def __init__(
        self,
        normalized_shape: Any,
        *args: Any,
        channels_first: bool = False,
        act: str | None = None,
        **kwargs: Any,
    ) -> None:
        functional.check_normalized_shape(normalized_shape, channels_first)
        super().__init__(normalized_shape, *args, **kwargs)
        self.channels_first = channels_first
        self.act = act
        self._check()

    def _rows(
        self,
        function: Callable[..., Any],
        affine: tuple[Tensor | None, ...],
        input: Tensor,
        mask: Tensor | None,
        add: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self._call(
            function,
            input,
            self.normalized_shape,
            *affine,
            self.eps,
            channels_first=self.channels_first,
            mask=mask,
            add=add,
            act=self.act,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (", channels_first=True" if self.channels_first else "")


class LayerNorm(_RowLayer, nn.LayerNorm):
    """Drop-in for `torch.nn.LayerNorm`: the last axes, or the channels of (N, C, *).

    y = act((x - mean) / sqrt(variance + eps) * weight + bias)

    weight, bias: normalized_shape. The same in training and evaluation.

    Args:
        normalized_shape, *args, **kwargs: those of `torch.nn.LayerNorm`.
        channels_first: normalize axis 1 of (N, C, *) instead of the last axes (ConvNeXt's).
        act: None, "relu", "leaky_relu", "silu" or "gelu".

    Formula, errors and source: `normkit.functional.layer_norm`.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, mask: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or with `add` (norm(input + add), input + add)."""
        return self._rows(functional.layer_norm, (self.weight, self.bias), input, mask, add)


class RMSNorm(_RowLayer, nn.RMSNorm):
    """Drop-in for `torch.nn.RMSNorm`: the last axes, or the channels of (N, C, *).

    y = act(x / sqrt(<x²> + eps) * weight)

    weight: normalized_shape. The same in training and evaluation. Arguments as those of
    `LayerNorm`; `eps=None` is the machine epsilon of the compute dtype. Formula, errors and
    source: `normkit.functional.rms_norm`.
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, mask: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or with `add` (norm(input + add), input + add)."""
        return self._rows(functional.rms_norm, (self.weight,), input, mask, add)
