"""The layers: torch's constructors and state, the formula's forward.

The torch-named classes subclass torch's, so `isinstance`, state dicts, repr, pickles and converters
hold. They are thin over `normkit.functional`, whose docstrings give the formulas.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Self

import torch
import torch.fx
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normkit import functional
from normkit.backend import aten
from normkit.formula import checks
from normkit.formula.spec import check_act, check_eps, check_momentum
from normkit.runtime import readers
from normkit.runtime.eager import calls
from normkit.runtime.sync import Merge, let_ddp_take


@torch.fx.wrap
def _given_if_any(own: Tensor | None, given: Tensor | None) -> Tensor | None:
    return own if given is None else given


def _given_or(own: Tensor | None, given: Tensor | None) -> Tensor | None:
    """What the call gives, else the layer's own.

    An argument of a graph that torch.fx traces may still be given or not when that graph runs, so
    only then is the choice part of the graph.
    """
    if given is None:
        return own
    return _given_if_any(own, given) if isinstance(given, torch.fx.Proxy) else given


class _Norm(nn.Module):
    """What all layers share: checked constants, an activation, errors that name the layer.

    `_act` is the activation that forward applies. `act` shows it; a subclass may use that name, or
    any other, for an activation of its own.
    """

    _act: str | None = None
    eps: Any

    def _check(self, act: str | None = None) -> None:
        """Check the constants, and take the activation."""
        name = type(self).__name__
        try:
            if not (isinstance(self, RMSNorm) and self.eps is None):
                check_eps(self.eps)
            check_momentum(getattr(self, "momentum", None))
            check_act(act)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from error
        self._act = act
        if not hasattr(type(self), "act"):  # a subclass's method
            self.act = act

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "act" and type(self).__module__ == __name__:
            check_act(value)  # a module would be registered, and never called
            self._act = value
        super().__setattr__(name, value)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, TypeError) as error:
            raise self._named(error) from error

    def _named(self, error: Exception) -> Exception:
        """The error, with the layer's name before it.

        Forwards catch errors themselves: by `_call`, arguments are packed twice, a microsecond.
        """
        return type(error)(f"{self}: {error}")

    def _warn_if_exported(self) -> None:
        """Said by layers that training and evaluation make differ, where they are in training."""
        if aten.exporting():
            warnings.warn(
                f"{self} is exported in training mode: its graph normalizes by each batch and "
                "moves running statistics; call .eval() on the model first",
                stacklevel=3,
            )

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"{self}: TorchScript is not supported; use torch.export.export or torch.compile, or "
            "torch.jit.trace"
        )

    def extra_repr(self) -> str:
        own = f", act={self._act!r}" if self._act is not None else ""
        return super().extra_repr() + own


def _unless(bias: bool) -> dict[str, bool]:
    """torch's argument, where it is needed: older ones of 2 have none on these layers."""
    return {} if bias else {"bias": False}


class _BatchLayer(_Norm, _BatchNorm):
    """Where statistics come from: the batch in training, running averages in evaluation or frozen.

    `frozen`, `micro_batches` and `merge` are set by the methods below, never by torch's `train` or
    `eval`.
    """

    ranks: tuple[int, ...] | None = None
    frozen: bool = False
    micro_batches: int = 1
    merge: Merge | None = None
    by_batch: bool = True
    """Whether training normalizes by the statistics of the whole batch, and by nothing else."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        features = checks.check_size("num_features", num_features)
        settings = (eps, momentum, affine, track_running_stats)
        super().__init__(features, *settings, device=device, dtype=dtype, **_unless(bias))
        self._check()

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """y of input (N, C, *); `residual` is added before `act`. See `functional.batch_norm`.

        `weight` and `bias`, (N, C) or broadcasting to input, take the place of the layer's own.
        """
        if not is_compiling():
            y = calls.batch_layer(self, input, mask, residual, weight, bias)
            if y is not NotImplemented:
                return y
        readers.refuse_quantization(self, input)
        function, own = self._formula()
        running_mean, running_var = self.running_mean, self.running_var
        tracked = running_mean is not None and running_var is not None
        if self.frozen and not tracked:
            self._need_running("freeze")
        by_running = tracked and (self.frozen or not self.training)
        moving = self.training and self.track_running_stats and not by_running
        if moving:
            self._warn_if_exported()
        if moving and self.micro_batches > 1:
            own |= {"pending": self._pending(), "micro_batches": self.micro_batches}
        merges, sent = self._merges(by_running), 0
        if self.merge is not None:
            sent = self.merge.begins(merges)
            if merges:
                own["merge"] = self.merge
        read = by_running or moving
        weight, bias = _given_or(self.weight, weight), _given_or(self.bias, bias)
        try:
            return function(
                input,
                running_mean if read else None,
                running_var if read else None,
                weight,
                bias,
                not by_running,
                self.momentum,
                self.eps,
                num_batches_tracked=self.num_batches_tracked if moving else None,
                mask=mask,
                residual=residual,
                act=self._act,
                ranks=self.ranks,
                **own,
            )
        except Exception as error:
            if merges and self.merge is not None:
                self._tell(error, sent, input, weight, bias)
            if isinstance(error, ValueError | TypeError):
                raise self._named(error) from error
            raise

    def _tell(self, error: Exception, sent: int, *given: Tensor | None) -> None:
        """Tell the ranks that wait for this one."""
        assert self.merge is not None
        self._call(self.merge.fail, error, sent, *self.buffers(), *self.parameters(), *given)

    def _formula(self) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        """The functional form of this layer, and the arguments that it alone has."""
        return functional.batch_norm, {}

    def _merges(self, by_running: bool) -> bool:
        """Whether a call waits for other ranks."""
        return self.training and not by_running

    def synchronize(self, process_group: Any = None) -> Self:
        """In training, take the statistics of the batches of all ranks of a process group together.

        Outputs, running statistics and input gradients are those of one process on the whole batch;
        parameter gradients, summed over the ranks, too. Ranks may differ in samples and positions,
        and have none. Of ghost batches, which stay within a rank, only the running statistics are
        those of all ranks. Every rank must call the layer equally often; see docs/sync.md.

        Args:
            process_group: of torch.distributed, this rank in it; None for all ranks. Where none is
                initialized the layer stays local, and says so once.

        Raises (the forward and the backward):
            RankError (a ValueError): on all ranks, where they differ in channels, dtype, settings.
            RuntimeError: a rank that doesn't come before the group's timeout.
        """
        self.merge = Merge(process_group, self)
        return self

    def desynchronize(self) -> Self:
        """Undo `synchronize()`."""
        self.merge = None
        return self

    def freeze(self) -> Self:
        """Normalize by the running statistics, in training too, and leave them as they are.

        Until `unfreeze()`: `train()` doesn't thaw it, a state dict carries it in its `_metadata`,
        and `reset_running_stats()` (which torch's `update_bn` calls) leaves a frozen layer alone.
        weight and bias still learn, unless their `requires_grad` is off.

        Raises:
            ValueError: the layer has no running statistics.
        """
        self._need_running("freeze")
        self.frozen = True
        return self

    def unfreeze(self) -> Self:
        """Undo `freeze()`."""
        self.frozen = False
        return self

    def accumulate(self, micro_batches: int) -> Self:
        """Move the running statistics once in `micro_batches` forwards, by their union.

        For gradient accumulation: they move at the last micro-batch, as after one batch of the same
        layer inputs. Each micro-batch is still normalized by its own statistics. What has been
        accumulated isn't in the state dict, and starts anew with each call; 1 is off.

        Raises:
            ValueError: micro_batches isn't an integer >= 1; the layer has no running statistics.
        """
        what = "the number of forwards between two optimizer steps"
        micro_batches = self._call(checks.check_size, "micro_batches", micro_batches, 1, what)
        mean = self._need_running("accumulate")
        self.micro_batches = micro_batches
        for name in _PENDING:
            if name in self._buffers:
                delattr(self, name)
        if micro_batches > 1:
            n = torch.zeros_like(mean, dtype=torch.long)  # exact in a half-precision model too
            values = (n, torch.zeros_like(mean), torch.zeros_like(mean), n.new_zeros(()))
            for name, value in zip(_PENDING, values, strict=True):
                self.register_buffer(name, value, persistent=False)
        return self

    def _pending(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in _PENDING)

    def _need_running(self, what: str) -> Tensor:
        """The running mean, or ValueError."""
        if self.running_mean is None or self.running_var is None:
            raise ValueError(
                f"{self}: {what} needs running statistics; make the layer with "
                "track_running_stats=True"
            )
        return self.running_mean

    def reset_running_stats(self) -> None:
        """As torch's, and forget what was accumulated; a frozen layer keeps its statistics."""
        if not self.frozen:
            super().reset_running_stats()
            if self.micro_batches > 1:
                for buffer in self._pending():
                    buffer.zero_()

    def reset_parameters(self) -> None:
        """As torch's: all parameters and statistics anew, those of a frozen layer too."""
        frozen, self.frozen = self.frozen, False
        super().reset_parameters()
        self.frozen = frozen

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.frozen and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["frozen"] = True

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("frozen", False):
            self.frozen = True
        if self.micro_batches > 1 and self.pending_n.device != self._need_running("load").device:
            self.accumulate(self.micro_batches)  # loaded with assign=True

    def extra_repr(self) -> str:
        own = ", frozen=True" if self.frozen else ""
        if self.micro_batches > 1:
            own += f", micro_batches={self.micro_batches}"
        if self.merge is not None and not isinstance(self, SyncBatchNorm):
            own += ", synchronized=True"
        return super().extra_repr() + own


_PENDING = ("pending_n", "pending_mean", "pending_var", "pending_batches")


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
        act: None, "relu", "leaky_relu", "silu" or "gelu".
        The rest: those of `torch.nn.BatchNorm1d`.

    State, train and eval behaviour: as `BatchNorm1d`. Errors: `normkit.functional.batch_norm`.
    torch's converters to SyncBatchNorm and its fusion of convolutions know no `act`: there it is a
    RuntimeError.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        act: str | None = None,
    ) -> None:
        settings = (eps, momentum, affine, track_running_stats)
        super().__init__(num_features, *settings, device, dtype, bias=bias)
        self._check(act)


class SyncBatchNorm(BatchNorm, nn.SyncBatchNorm):
    """Drop-in for `torch.nn.SyncBatchNorm`: any (N, C, *) by the batches of all ranks together.

    y = act((x - mean) / sqrt(variance + eps) * weight + bias + residual)

    On any backend of torch.distributed, gloo and the CPU included, of any device. Merged are
    (count, mean, variance) in float64, with one collective in the forward and one in the backward;
    ranks may differ in samples and positions, have none, and be masked. In evaluation, without
    running statistics too, nothing is sent.

    Args:
        process_group: the ranks; None for all.
        act: None, "relu", "leaky_relu", "silu" or "gelu".
        The rest: those of `torch.nn.SyncBatchNorm`.

    State: as `BatchNorm`'s. Errors: `synchronize`. DistributedDataParallel averages the gradients
    over ranks; docs/sync.md says what that means for uneven batches.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        act: str | None = None,
    ) -> None:
        settings = (eps, momentum, affine, track_running_stats)
        super().__init__(num_features, *settings, device, dtype, bias=bias, act=act)
        self.process_group = process_group

    @property
    def process_group(self) -> Any:
        """The ranks; None for all."""
        assert self.merge is not None
        return self.merge.process_group

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        self.synchronize(process_group)

    def desynchronize(self) -> NoReturn:
        """Refused."""
        raise RuntimeError(f"{self} is always synchronized; use BatchNorm, which has both")

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """The module with its batch norms made this layer; tensors, modes and hooks are kept.

        Frozen ones stay as they are; ghost batch norm and batch renorm stay too, synchronized.

        Raises:
            ValueError: a batch norm with a forward of its own. `normkit.swap(module, "sync")` knows
                those of timm, and says which it leaves.
        """
        new: dict[nn.Module | None, nn.Module] = {
            old: _synchronized(name, old, process_group)
            for name, old in module.named_modules()
            if isinstance(old, _BatchNorm)
        }
        for parent in list(module.modules()):
            for key, child in parent._modules.items():
                if child in new:
                    parent._modules[key] = new[child]
        return new.get(module, module)


def _synchronized(name: str, old: _BatchNorm, process_group: Any) -> nn.Module:
    """What takes the place of a batch norm whose ranks merge their batches."""
    if isinstance(old, FrozenBatchNorm):
        return old
    if isinstance(old, GhostBatchNorm | BatchRenorm):
        return old.synchronize(process_group)
    known = (_BatchNorm.forward, nn.SyncBatchNorm.forward, _BatchLayer.forward)
    if type(old).forward not in known:
        raise ValueError(
            f"{name or 'the module'} is a {type(old).__name__} with a forward of its own, which "
            "this conversion would lose; normkit.swap(module, 'sync') knows more kinds"
        )
    if process_group is None and isinstance(old, nn.SyncBatchNorm):
        process_group = old.process_group
    new = SyncBatchNorm(old.num_features, process_group=process_group, device="meta")
    own = ("merge", "process_group")
    vars(new).update({key: copy.copy(v) for key, v in vars(old).items() if key not in own})
    torchs = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
    new.ranks = next((t.ranks for base, t in torchs.items() if isinstance(old, base)), None)
    return new


let_ddp_take(SyncBatchNorm)


class FrozenBatchNorm(BatchNorm):
    """Batch normalization by fixed statistics, scale and shift, of any (N, C, *).

    y = act((x - running_mean) / sqrt(running_var + eps) * weight + bias + residual)

    The same in training and evaluation, as `BatchNorm.freeze()`; weight and bias are buffers
    besides, so that no optimizer and no `requires_grad_()` gets at them. The state dict has the
    keys of `BatchNorm`'s, and loads from it. To train any of it, use `BatchNorm` and `freeze()`.

    Args:
        num_features, eps, device, dtype: those of `torch.nn.BatchNorm1d`.
        act: None, "relu", "leaky_relu", "silu" or "gelu".

    Source: He et al. 2016 (arXiv 1512.03385), appendix A.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        act: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, act=act, device=device, dtype=dtype)
        for name in ("weight", "bias"):
            parameter = self._parameters.pop(name)
            assert parameter is not None
            self.register_buffer(name, parameter.detach())
        self.freeze()

    def unfreeze(self) -> NoReturn:
        """Refused."""
        raise RuntimeError(f"{self} can't be thawed; use BatchNorm, which has freeze() as well")


class GhostBatchNorm(BatchNorm):
    """Batch normalization of any (N, C, *) by the statistics of parts of the batch.

    y = act((x - mean) / sqrt(variance + eps) * weight + bias + residual), statistics per ghost

    In training the N samples are split in their order into ceil(N / ghost_size) ghost batches,
    whose sizes differ by at most one; the running statistics move by those of the whole batch, as
    `BatchNorm`'s. Evaluation uses the running ones.

    Args:
        num_features: C.
        ghost_size: the largest number of samples that share statistics.
        The rest: those of `BatchNorm`.

    State: as `BatchNorm`'s. Formula, errors and source: `normkit.functional.batch_norm`.
    """

    by_batch = False

    def __init__(
        self,
        num_features: int,
        ghost_size: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        act: str | None = None,
    ) -> None:
        settings = (eps, momentum, affine, track_running_stats)
        super().__init__(num_features, *settings, device, dtype, bias=bias, act=act)
        self.ghost_size = ghost_size
        self.ghost_size = self._call(checks.check_ghost_size, ghost_size)

    def _formula(self) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        return functional.batch_norm, {"ghost_size": self.ghost_size}

    def _merges(self, by_running: bool) -> bool:
        tracks = self.track_running_stats and self.running_mean is not None
        return tracks and super()._merges(by_running)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", ghost_size={self.ghost_size}"


class BatchRenorm(BatchNorm):
    """Batch renormalization of any (N, C, *): batch norm corrected towards the running averages.

    y = act(((x - mean) / σ * r + d) * weight + bias + residual), σ = sqrt(variance + eps)

    In training r and d, constants to the gradient, bring x̂ to what the running averages would give,
    within limits that open as `num_batches_tracked`, which the state dict holds, grows. All
    variances are biased, the running one too. Evaluation is that of `BatchNorm`.

    Args:
        num_features: C.
        r_max, d_max: r stays in [1 / r_max, r_max], d in [-d_max, d_max].
        r_steps, d_steps: (first, last) training step between which the limits open linearly, from
            r = 1 and d = 0; (0, 0): open from the start.
        momentum: the paper's 0.01 by default; torch's convention, the weight of the new batch.
        eps, affine, act, device, dtype: those of `BatchNorm`.

    State: as `BatchNorm`'s. Formula, errors and source: `normkit.functional.batch_renorm`.
    """

    by_batch = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        r_steps: tuple[int, int] = (5_000, 40_000),
        d_steps: tuple[int, int] = (5_000, 25_000),
        act: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, act=act, device=device, dtype=dtype)
        self.r_max, self.d_max = r_max, d_max
        self.r_steps, self.d_steps = r_steps, d_steps
        self._call(checks.check_limits, **self._limits())

    def _limits(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("r_max", "d_max", "r_steps", "d_steps")}

    def _formula(self) -> tuple[Callable[..., Tensor], dict[str, Any]]:
        return functional.batch_renorm, self._limits()

    def extra_repr(self) -> str:
        limits = (f"{name}={value}" for name, value in self._limits().items())
        return ", ".join([super().extra_repr(), *limits])


class _InstanceLayer(_Norm, _InstanceNorm):
    unbatched_rank: int | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        act: str | None = None,
    ) -> None:
        features = checks.check_size("num_features", num_features)
        settings = (eps, momentum, affine, track_running_stats)
        super().__init__(features, *settings, device, dtype, **_unless(bias))
        self._check(act)

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """y of input (N, C, *) or (C, *); `residual` is added before `act`.

        `weight` and `bias`, (N, C) or broadcasting to input, take the place of the layer's own.
        """
        if not is_compiling():
            y = calls.instance_layer(self, input, mask, residual, weight, bias)
            if y is not NotImplemented:
                return y
        readers.refuse_quantization(self, input)
        if self.training and self.track_running_stats:
            self._warn_if_exported()
        unbatched = self.unbatched_rank
        try:
            return functional.instance_norm(
                input,
                self.running_mean,
                self.running_var,
                _given_or(self.weight, weight),
                _given_or(self.bias, bias),
                self.training or not self.track_running_stats,
                self.momentum if self.momentum is not None else 0.0,
                self.eps,
                mask=mask,
                residual=residual,
                act=self._act,
                ranks=None if unbatched is None else (unbatched, unbatched + 1),
                num_features=self.num_features,
            )
        except (ValueError, TypeError) as error:
            raise self._named(error) from error


class InstanceNorm1d(_InstanceLayer, nn.InstanceNorm1d):
    """Drop-in for `torch.nn.InstanceNorm1d`: each channel of each sample of (N, C, L) or (C, L).

    y = act((x - mean) / sqrt(variance + eps) * weight + bias + residual), statistics over L

    weight, bias: (C,) with `affine=True` (torch's default is False). Training and evaluation use
    the input's statistics; with `track_running_stats=True` evaluation uses running ones.

    Args:
        act: None, "relu", "leaky_relu", "silu" or "gelu".
        The rest: those of `torch.nn.InstanceNorm1d`.

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
        act: None, "relu", "leaky_relu", "silu" or "gelu".
        The rest: those of `torch.nn.GroupNorm`.

    Formula, errors and source: `normkit.functional.group_norm`.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        act: str | None = None,
    ) -> None:
        channels = checks.check_size("num_channels", num_channels)
        groups = checks.check_groups(num_groups, channels)
        super().__init__(groups, channels, eps, affine, device, dtype, **_unless(bias))
        self._check(act)

    def forward(
        self,
        input: Tensor,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """y of input (N, C, *); `residual` is added before `act`.

        `weight` and `bias`, (N, C) or broadcasting to input, take the place of the layer's own.
        """
        if not is_compiling():
            y = calls.group_layer(self, input, mask, residual, weight, bias)
            if y is not NotImplemented:
                return y
        readers.refuse_quantization(self, input)
        try:
            return functional.group_norm(
                input,
                self.num_groups,
                _given_or(self.weight, weight),
                _given_or(self.bias, bias),
                self.eps,
                mask=mask,
                residual=residual,
                act=self._act,
            )
        except (ValueError, TypeError) as error:
            raise self._named(error) from error


class _RowLayer(_Norm):
    """LayerNorm and RMSNorm: over the last axes, or over the channels of (N, C, *)."""

    channels_first: bool = False
    cast_before_affine: bool = False
    memory_format: torch.memory_format | None = None
    normalized_shape: tuple[int, ...]

    def extra_repr(self) -> str:
        names = ("channels_first", "cast_before_affine")
        own = [f"{name}=True" for name in names if getattr(self, name)]
        own += [f"memory_format={self.memory_format}"] if self.memory_format is not None else []
        return ", ".join([super().extra_repr(), *own])


class LayerNorm(_RowLayer, nn.LayerNorm):
    """Drop-in for `torch.nn.LayerNorm`: the last axes, or the channels of (N, C, *).

    y = act((x - mean) / sqrt(variance + eps) * weight + bias)

    weight, bias: normalized_shape. The same in training and evaluation.

    Args:
        channels_first: normalize axis 1 of (N, C, *) instead of the last axes (ConvNeXt's).
        cast_before_affine, memory_format: rounding and strides of hand-written layers; see
            `functional.layer_norm`.
        act: None, "relu", "leaky_relu", "silu" or "gelu".
        The rest: those of `torch.nn.LayerNorm`.

    Formula, errors and source: `normkit.functional.layer_norm`.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        channels_first: bool = False,
        cast_before_affine: bool = False,
        memory_format: torch.memory_format | None = None,
        act: str | None = None,
    ) -> None:
        shape = checks.check_normalized_shape(normalized_shape, channels_first)
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)
        self.channels_first = channels_first
        self.cast_before_affine = cast_before_affine
        self.memory_format = memory_format
        self._check(act)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("_act", "channels_first") and value and not readers.is_left_to_forward(self):
            readers.leave_to_forward(self)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        mask: Tensor | None = None,
        add: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or with `add` (norm(input + add), input + add).

        `weight` and `bias`, per sample or broadcasting to input, take the place of the layer's own.
        """
        if not is_compiling():
            y = calls.layer_norm_layer(self, input, mask, add, weight, bias)
            if y is not NotImplemented:
                return y
        readers.refuse_quantization(self, input)
        try:
            return functional.layer_norm(
                input,
                self.normalized_shape,
                _given_or(self.weight, weight),
                _given_or(self.bias, bias),
                self.eps,
                channels_first=self.channels_first,
                cast_before_affine=self.cast_before_affine,
                memory_format=self.memory_format,
                mask=mask,
                add=add,
                act=self._act,
            )
        except (ValueError, TypeError) as error:
            raise self._named(error) from error


class RMSNorm(_RowLayer, nn.RMSNorm):
    """Drop-in for `torch.nn.RMSNorm`: the last axes, or the channels of (N, C, *).

    y = act(x / sqrt(<x²> + eps) * weight)

    weight: normalized_shape. The same in training and evaluation.

    Args:
        eps: None is the machine epsilon of the compute dtype.
        channels_first, cast_before_affine, memory_format, act: as `LayerNorm`'s.
        zero_centered_weight: scale by 1 + weight, weight 0 at first (Gemma's).
        The rest: those of `torch.nn.RMSNorm`.

    Formula, errors and source: `normkit.functional.rms_norm`.
    """

    zero_centered_weight: bool = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        channels_first: bool = False,
        cast_before_affine: bool = False,
        memory_format: torch.memory_format | None = None,
        act: str | None = None,
        zero_centered_weight: bool = False,
    ) -> None:
        shape = checks.check_normalized_shape(normalized_shape, channels_first)
        super().__init__(shape, eps, elementwise_affine, device, dtype)
        self.channels_first = channels_first
        self.cast_before_affine = cast_before_affine
        self.memory_format = memory_format
        self._check(act)
        self.zero_centered_weight = zero_centered_weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight to 1, or to 0 where it is zero-centred."""
        super().reset_parameters()
        if self.zero_centered_weight and self.weight is not None:
            nn.init.zeros_(self.weight)

    def extra_repr(self) -> str:
        own = ", zero_centered_weight=True" if self.zero_centered_weight else ""
        return super().extra_repr() + own

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        mask: Tensor | None = None,
        add: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or with `add` (norm(input + add), input + add).

        `weight`, per sample or broadcasting to input, takes the place of the layer's own; `bias`
        is added.
        """
        if not is_compiling():
            y = calls.rms_norm_layer(self, input, mask, add, weight, bias)
            if y is not NotImplemented:
                return y
        try:
            return functional.rms_norm(
                input,
                self.normalized_shape,
                _given_or(self.weight, weight),
                self.eps,
                bias=bias,
                zero_centered_weight=self.zero_centered_weight,
                channels_first=self.channels_first,
                cast_before_affine=self.cast_before_affine,
                memory_format=self.memory_format,
                mask=mask,
                add=add,
                act=self._act,
            )
        except (ValueError, TypeError) as error:
            raise self._named(error) from error


def _lost_to_fusion(layer: nn.Module) -> str | None:
    act = layer._act if isinstance(layer, _BatchLayer) else None
    return None if act is None else f"act={act!r}"


def _lost_to_torchs_sync(layer: nn.Module) -> str | None:
    if not isinstance(layer, _BatchLayer):
        return None
    if isinstance(layer, FrozenBatchNorm | GhostBatchNorm | BatchRenorm):
        return f"what {type(layer).__name__} is"
    if layer.frozen:
        return "freeze()"
    if layer.merge is not None and not isinstance(layer, SyncBatchNorm):
        return "synchronize()"
    if layer.micro_batches > 1:
        return f"accumulate({layer.micro_batches})"
    return _lost_to_fusion(layer)


for _fuse in ("fuse_conv_bn_eval", "fuse_linear_bn_eval"):
    readers.refuse_to_lose(nn.utils.fusion, _fuse, _lost_to_fusion, "normkit.fold keeps it")
readers.refuse_to_lose(
    nn.SyncBatchNorm,
    "convert_sync_batchnorm",
    _lost_to_torchs_sync,
    "normkit.SyncBatchNorm.convert_sync_batchnorm keeps it",
)
readers.refuse_fusing(
    (
        *(BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d),
        *(SyncBatchNorm, FrozenBatchNorm, GhostBatchNorm, BatchRenorm),
    )
)
