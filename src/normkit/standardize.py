"""Standardization of inputs by the statistics of a data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor

from normkit.common.errors import InputError
from normkit.formula.checks import NESTED, check_shape
from normkit.formula.moments import Moments
from normkit.formula.spec import float64, has_float64
from normkit.layers import _Norm
from normkit.runtime.sync import gathered


class Standardize(_Norm):
    """Inputs with mean 0 and standard deviation 1 over the data it was fitted on.

    y = (x - mean) / std,  and `inverse`: x = y * std + mean

    `shape` says what has a mean of its own: `Standardize(3)` each channel of (N, 3, *) or each
    feature of (N, 3), `Standardize((3, 32, 32))` each pixel of (N, 3, 32, 32). It lies on the axes
    from 1 on, or with `channels_first=False` on the last ones; everything else is pooled.

    mean, std (float64) and count (int64) of that shape are buffers, saved with the model. They
    stay float64 when the model is cast, since a mean may need more digits than the network: x is
    shifted and scaled in float64, y has x's floating dtype (the default one for integers). On a
    device without float64 (mps) they stay on the CPU, and x is shifted in two steps instead.
    Training and evaluation are the same. A constant feature has std 1, so that it comes out as 0:
    it is shifted, not scaled, and `fit` warns of it.

    Args:
        shape: the shape of the statistics.
        channels_first: the shape lies on the axes from 1 on; False: on the last axes.
        ignore_nan: `fit` leaves NaN out; they stay NaN in y. Without it they are an error.
        device: of the buffers.

    Raises:
        RuntimeError: called before `fit` or before fitted statistics are loaded.
        ValueError: an input whose axes don't have this shape.
        TypeError: an input that isn't a real tensor.

    Source: batches are merged as in Chan, Golub & LeVeque 1979 (Stanford STAN-CS-79-773),
    equation 2.1; std is that of the population (divided by the count).
    """

    mean: Tensor
    std: Tensor
    count: Tensor

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        channels_first: bool = True,
        ignore_nan: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.shape = check_shape("Standardize: shape", shape, 1)
        if not self.shape:
            raise ValueError("Standardize: shape must name at least one axis, got ()")
        self.channels_first, self.ignore_nan = channels_first, ignore_nan
        device = torch.get_default_device() if device is None else torch.device(device)
        home = device if has_float64(device) else "cpu"
        self.register_buffer("mean", torch.zeros(self.shape, dtype=torch.float64, device=home))
        self.register_buffer("std", torch.ones(self.shape, dtype=torch.float64, device=home))
        self.register_buffer("count", torch.zeros(self.shape, dtype=torch.int64, device=device))
        self._fitted = False

    @torch.no_grad()
    def fit(
        self,
        data: Tensor | Iterable[Any],
        pick: Callable[[Any], Tensor] | None = None,
        *,
        process_group: Any = None,
    ) -> Standardize:
        """Take the statistics of the data, in one pass, in float64; what was fitted is replaced.

        Args:
            data: a tensor, or an iterable of batches, as a DataLoader is.
            pick: the input of a batch, as `lambda batch: batch["image"]`, where a batch isn't a
                tensor itself.
            process_group: whose ranks' data count together, and of whose ranks all must call it;
                `torch.distributed.group.WORLD` for all. A rank may have none. All get the same
                statistics, to the bit, or an error.

        Returns:
            self.

        Raises:
            ValueError: no data; a feature without a value; infinite values; NaN without
                `ignore_nan`; a batch of another shape.
            TypeError: a batch that isn't a tensor, or isn't real.
            RuntimeError: another rank failed; it says why. This rank isn't in the process_group.

        An exception, also one of the data's own, leaves the statistics as they were.
        """
        if process_group is None:
            total = self._seen(data, pick)
        else:
            total = self._seen_by_all(data, pick, process_group)
        if total is None or not total.count.any():
            raise ValueError(f"{self}: fitted on nothing; the data held no values")
        if not total.count.all():
            raise ValueError(f"{self}: no values but NaN in {_at(total.count == 0)}")
        constant = total.m2 == 0
        if constant.any():
            warnings.warn(
                f"{self}: constant over the data, so shifted but not scaled: {_at(constant)}",
                stacklevel=2,
            )
        std = (total.m2 / total.count).sqrt()
        self.mean.copy_(total.mean)
        self.std.copy_(torch.where(constant, 1.0, std))
        self.count.copy_(total.count)
        self._fitted = True
        return self

    def _seen(
        self, data: Tensor | Iterable[Any], pick: Callable[[Any], Tensor] | None
    ) -> Moments | None:
        total: Moments | None = None
        for batch in [data] if isinstance(data, Tensor) else data:
            x = batch if pick is None else pick(batch)
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"{self}: expected batches that are tensors, got {type(x).__name__}; give "
                    "fit(data, pick=...) a function that takes the input out of a batch, as "
                    "pick=lambda batch: batch[0]"
                )
            moments = self._call(_moments, x, self.shape, self.channels_first, self.ignore_nan)
            total = moments if total is None else total.merge(moments)
        return total

    def _seen_by_all(
        self,
        data: Tensor | Iterable[Any],
        pick: Callable[[Any], Tensor] | None,
        process_group: Any,
    ) -> Moments | None:
        """What all ranks have seen, merged in their order; what one raises, all raise."""
        try:
            own = self._seen(data, pick)
        except Exception as error:
            gathered(f"{type(error).__name__}: {error}", process_group)
            raise
        total: Moments | None = None
        for rank, seen in enumerate(gathered(own and own.cpu(), process_group)):
            if isinstance(seen, str):
                raise RuntimeError(f"{self}: rank {rank} failed: {seen}")
            if seen is not None:
                total = seen if total is None else total.merge(seen)
        return total

    def forward(self, input: Tensor) -> Tensor:
        """(input - mean) / std, of the input's shape."""
        self._check_fitted()
        return self._call(_standardize, input, self.mean, self.std, self.channels_first)

    def inverse(self, input: Tensor) -> Tensor:
        """input * std + mean: what gives `input` when it is standardized."""
        self._check_fitted()
        return self._call(_restore, input, self.mean, self.std, self.channels_first)

    def extra_repr(self) -> str:
        shape = self.shape[0] if len(self.shape) == 1 else self.shape
        return f"{shape}, channels_first={self.channels_first}, ignore_nan={self.ignore_nan}"

    def _check_fitted(self) -> None:
        if not self._fitted:
            raise RuntimeError(f"{self}: used before fit; call fit(data) or load a state dict")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Standardize:
        """Casts leave the statistics alone; they go along to devices that have float64."""

        def apply(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return fn(tensor)
            if not has_float64(fn(tensor.new_empty(0, dtype=torch.float32)).device):
                return tensor.cpu()
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(apply, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fitted = not self.count.is_meta and bool((self.count > 0).all())


def _moments(x: Tensor, shape: tuple[int, ...], channels_first: bool, ignore_nan: bool) -> Moments:
    first = _first_axis(x, shape, channels_first)
    axes = tuple(i for i in range(x.dim()) if not first <= i < first + len(shape))
    spread = [1 if i in axes else n for i, n in enumerate(x.shape)]
    if x.isinf().any():
        raise ValueError("infinite values in the data; a mean and a std need finite ones")
    x = float64(x)
    valid = ~x.isnan()
    count = valid.sum(axes)
    missing = count < x.numel() // count.numel()
    if missing.any() and not ignore_nan:
        raise ValueError(f"NaN in {_at(missing)} of the data; ignore_nan=True leaves them out")
    if x.numel() == 0:
        return Moments(count.double(), count.double(), count.double())
    # Shifted by a value of its own, a constant feature is 0 throughout: its m2 is 0 exactly.
    low = torch.where(valid, x, torch.inf).amin(axes)
    low = torch.where(count > 0, low, 0)
    x = torch.where(valid, x - low.reshape(spread), 0)
    mean = x.sum(axes) / count.clamp(min=1)
    x = torch.where(valid, x - mean.reshape(spread), 0)
    return Moments(count.double(), low + mean, x.square().sum(axes))


def _standardize(x: Tensor, mean: Tensor, std: Tensor, channels_first: bool) -> Tensor:
    mean, std = (_spread(s, x, channels_first) for s in (mean, std))
    if mean.device == x.device or has_float64(x.device):
        return ((x.double() - mean) / std).to(_floating(x))
    wide, head, rest = _halves(x, mean)
    return (((wide - head).float() - rest) / std.float().to(x.device)).to(_floating(x))


def _restore(x: Tensor, mean: Tensor, std: Tensor, channels_first: bool) -> Tensor:
    mean, std = (_spread(s, x, channels_first) for s in (mean, std))
    if mean.device == x.device or has_float64(x.device):
        return (x.double() * std + mean).to(_floating(x))
    wide, head, rest = _halves(x.to(_floating(x)), mean)
    return (wide * std.float().to(x.device) + rest + head).to(_floating(x))


def _halves(x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, the mean in x's arithmetic, and what that leaves of it, where x's device has no float64.

    x - head - rest keeps the digits that x - mean has in float64.
    """
    wide = x.float() if x.is_floating_point() else x.long()
    head = (mean if x.is_floating_point() else mean.round()).to(wide.dtype)
    rest = (mean - head.double()).float()
    return wide, head.to(x.device), rest.to(x.device)


for _name in ("_standardize", "_restore"):
    torch.fx.wrap(_name)


def _first_axis(x: Tensor, shape: tuple[int, ...], channels_first: bool) -> int:
    """Where the statistics' shape lies in that of x, which is checked."""
    if not isinstance(x, Tensor) or x.is_complex() or x.dtype == torch.bool:
        met = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected a tensor of real numbers, got {met}")
    if x.is_nested:
        raise TypeError(NESTED)
    first = 1 if channels_first else x.dim() - len(shape)
    if first < 1 or tuple(x.shape[first : first + len(shape)]) != shape:
        sizes = ", ".join(map(str, shape))
        form = f"(N, {sizes}, *)" if channels_first else f"(N, *, {sizes})"
        raise InputError(f"expected input {form}, got shape {tuple(x.shape)}")
    return first


def _spread(statistic: Tensor, x: Tensor, channels_first: bool) -> Tensor:
    """A statistic in the shape that broadcasts against x."""
    first = _first_axis(x, tuple(statistic.shape), channels_first)
    return statistic.reshape(*statistic.shape, *[1] * (x.dim() - first - statistic.dim()))


def _at(where: Tensor) -> str:
    """The first indices where it is True, in words."""
    indices = [tuple(i) if len(i) > 1 else i[0] for i in where.nonzero().tolist()]
    shown = ", ".join(map(str, indices[:5]))
    more = f" and {len(indices) - 5} more" if len(indices) > 5 else ""
    return f"feature {shown}{more}"


def _floating(x: Tensor) -> torch.dtype:
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()
