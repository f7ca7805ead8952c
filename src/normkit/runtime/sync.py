"""Statistics of a batch that lies on several ranks: `Merge`, all that knows about ranks.

A forward sends each rank's (count, mean, variance) of every channel to all others in one collective
and merges them by Chan's formula; a backward sums two values a channel over the ranks in another.
Both in float64. Ranks may differ in the number of samples and positions, and may have none.
"""

from __future__ import annotations

import functools
import itertools
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normkit.backend import aten
from normkit.runtime import recompute, statistics
from normkit.runtime.board import NOTHING, board
from normkit.runtime.statistics import Moments

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class RankError(ValueError):
    """Ranks that don't fit together; every rank raises it alike."""


class Settings(NamedTuple):
    """What must be the same on all ranks; each message begins with it, as numbers."""

    channels: int
    dtype: torch.dtype
    norm: str
    eps: float
    momentum: float | None
    input_gradient: bool

    def numbers(self) -> list[float]:
        dtype = _DTYPES.index(self.dtype) if self.dtype in _DTYPES else len(_DTYPES)
        momentum = -1.0 if self.momentum is None else self.momentum
        norm = int.from_bytes(self.norm.encode()[:6], "big")  # exact in float64
        return [self.channels, dtype, norm, self.eps, momentum, self.input_gradient]

    def texts(self) -> dict[str, str]:
        return {
            name.replace("_", " "): str(value).removeprefix("torch.")
            for name, value in self._asdict().items()
        }


_SETTINGS = len(Settings._fields)
_HEADER = _SETTINGS + 1
"""Of a message, before its moments: the settings, and whether nothing is masked."""


class _Shared:
    """A process group that copies of a layer share; it can't be pickled."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> _Shared:
        return self

    def __reduce__(self) -> Any:
        if self.group is None:
            return _Shared, (None,)
        raise TypeError("a layer with a process_group can't be pickled; save its state dict")


class Merge:
    """The ranks of a process group, as if their batches were one.

    Each synchronized layer has one of its own, which remembers what the ranks have agreed on, in
    copies and pickles too.

    Args:
        process_group: the ranks, of torch.distributed; None for all of them.
        layer: whose name errors give.

    Where no process group is initialized there is nobody to merge with: said once, and the batch
    counts alone, as it does in a group of one rank.

    Every message starts with the settings of the layer. Ranks that differ all raise the same
    `RankError`, which lists what each has; so they do if one has an error of its own. A message has
    as many channels as the ranks last agreed on. Before a layer's first message they agree through
    the group's store, where each rank notes what it is about to send; a rank that has other
    channels later says so in a message of the size agreed on, and only if all have others do all
    send again. So no rank ever waits in a message that another sends in another size.

    A rank that waits for more than a second looks up the others' notes: one that failed in place of
    this message, by whatever exception of the layer, ends the wait in a `RankError`. One that
    doesn't call the layer ends it in the group's timeout; the error then says whose layer was last
    called in evaluation. Compiled code sends other sums than eager code, so all ranks must change
    between these together; it notes and agrees as all do, but while it waits it looks up nothing.
    Not found: layers of other channels that pair up wrongly, both used before. Their messages
    differ in size, which gloo ends the process for.
    """

    def __init__(self, process_group: Any = None, layer: Any = "synchronized statistics") -> None:
        self._shared, self.layer = _Shared(process_group), layer
        self._handle = _register(self)
        self._agreed, self._compiled = 0, False
        self._last: tuple[Any, Tensor] = (None, torch.empty(0))

    @property
    def process_group(self) -> Any:
        """As it was given."""
        return self._shared.group

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": (None, torch.empty(0))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle = _register(self)

    def __fx_create_arg__(self, tracer: Any) -> Any:
        path = tracer.path_of_module(self.layer)
        return tracer.create_node("get_attr", f"{path}.merge" if path else "merge", (), {})

    def ranks(self) -> int:
        """How many there are; 1 without a process group, and in an exported graph."""
        if aten.exporting():
            return 1
        if not (dist.is_available() and dist.is_initialized()):
            if not torch.compiler.is_compiling():
                _say_alone()
            return 1
        _check_member(self.process_group, f"{self.layer}: ")
        return dist.get_world_size(self.process_group)

    def moments(self, own: Tensor, settings: Settings, *, whole: bool) -> Moments:
        """The moments of all ranks' batches together, the same bits on each rank.

        Args:
            own: (3, C): count, mean and biased variance of this rank's channels, float64.
            settings: what must be the same on all ranks.
            whole: nothing is masked, so that all channels have the same count.
        """
        everyone, all_whole = self._exchange(own, settings, whole)
        n, mean, var = statistics.pooled(Moments(*everyone.unbind(1))).spread()
        return Moments(int(n[0]) if all_whole else n, mean, var)

    def total(self, own: Tensor) -> Tensor:
        """The sum over the ranks, in place where it can be."""
        if torch.compiler.is_compiling():
            own = _announced(own, self._handle, 0)
        self._collective(dist.all_reduce, own, what="gradients")
        return own

    def begins(self, training: bool) -> int:
        """A call of the layer begins: how many messages this rank took part in, for `fail`.

        Out of training it sends none, and leaves a note for the ranks that wait.
        """
        group = self.process_group
        together = dist.is_available() and dist.is_initialized()
        if torch.compiler.is_compiling() or not together or dist.get_world_size(group) < 2:
            return 0
        if not training:
            board(group).aside("called one in evaluation, or frozen", failed=False)
        return board(group).number

    def fail(self, error: Exception, sent: int, *tensors: Any) -> None:
        """Tell the ranks that wait for this one's moments why it can't send any.

        Returns where all ranks failed; else all raise the same `RankError`. A call that had sent
        its moments leaves a note for the ranks that wait for its next. The first of the tensors,
        the layer's own before the call's, says on which device messages go.
        """
        sends = not (torch.compiler.is_compiling() or recompute.recomputing())
        if isinstance(error, RankError) or not sends or self.ranks() == 1:
            return
        own = f"{type(error).__name__}: {error}"
        if board(self.process_group).number > sent:
            board(self.process_group).aside(own, failed=True)
        elif not self._agreed:
            self._meet(NOTHING, own)
        else:
            device = next((t.device for t in tensors if isinstance(t, Tensor)), None)
            nothing = torch.zeros(_HEADER + 3 * self._agreed, dtype=torch.float64, device=device)
            heads = self._gather(nothing)[:, :_HEADER]
            if heads.any():
                raise self._disagreement(own, self._looked_at(heads)) from error

    def announce(self, channels: int) -> None:
        """What compiled code does at runtime before a message: of so many channels, or a sum."""
        if channels:
            try:
                self._agree(channels, None, compiled=True)
            except RankError as error:
                raise RankError(f"{self.layer}: {error}") from None
        own = board(self.process_group)
        own.post(_statistics(channels, True) if channels else "compiled gradients")
        own.number += 1

    def _agree(self, channels: int, said: Any, *, compiled: bool) -> None:
        """See that all ranks send as much, and are compiled or not, where this isn't known yet."""
        if (
            not self._agreed
            or (compiled and channels != self._agreed)
            or compiled != self._compiled
        ):
            self._meet(_statistics(channels, compiled), said)
            self._agreed, self._compiled = channels, compiled

    def _meet(self, sends: str, said: Any) -> None:
        """Wait until all ranks have come to this message, and raise unless they send the same."""
        own = board(self.process_group)
        with self._named("first call"):
            notes = own.meet(sends, said)
        if any(note.sends != sends for note in notes):
            error = _misfit([note.said for note in notes])
            own.aside(f"refused to send, since {error}", failed=True)
            own.number += 1
            raise error
        own.number += sends == NOTHING

    def _exchange(self, own: Tensor, settings: Settings, whole: bool) -> tuple[Tensor, bool]:
        """(W, 3, C): every rank's moments; and whether they are known to be whole on all."""
        channels = own.shape[1]
        header = self._header(settings, whole, own.device)
        if torch.compiler.is_compiling():
            message = _announced(torch.cat([header, own.flatten()]), self._handle, channels)
            everyone = self._gather(message)
            _check_alike(everyone)
            return everyone[:, _HEADER:].unflatten(1, own.shape), False
        self._agree(channels, settings.texts(), compiled=False)
        while True:
            fits = channels == self._agreed
            body = own.flatten() if fits else own.new_zeros(3 * self._agreed)
            everyone = self._gather(torch.cat([header, body]))
            all_whole = False
            if own.is_cpu or not fits:
                heads = everyone[:, :_HEADER].tolist()
                if any(other[:_SETTINGS] != heads[0][:_SETTINGS] for other in heads):
                    told = self._looked_at(everyone[:, :_HEADER])
                    raise self._disagreement(settings.texts(), told)
                all_whole = all(other[_SETTINGS] for other in heads)
            else:
                _check_alike(everyone)  # without waiting for the device
            if fits:
                return everyone[:, _HEADER:].unflatten(1, own.shape), all_whole
            self._agreed = channels

    def _header(self, *content: Any) -> Tensor:
        """Settings, whole, and the device that it lies on; the last one is kept."""
        if torch.compiler.is_compiling() or self._last[0] != content:
            settings, whole, device = content
            numbers = [*settings.numbers(), whole]
            header = torch.tensor(numbers, dtype=torch.float64, device=device)
            if torch.compiler.is_compiling():
                return header
            self._last = (content, header)
        return self._last[1]

    def _gather(self, message: Tensor) -> Tensor:
        """Every rank's message, (W, *)."""
        ranks = dist.get_world_size(self.process_group)
        everyone = message.new_empty(ranks * message.numel())
        self._collective(_all_gather, everyone, message, what="statistics")
        return everyone.unflatten(0, (-1, message.numel()))

    def _collective(self, collective: Any, *tensors: Tensor, what: str) -> None:
        group = self.process_group
        if torch.compiler.is_compiling():
            collective(*tensors, group=group)
            return
        own = board(group)
        own.post(_statistics(self._agreed, False) if what == "statistics" else what)
        try:
            with self._named(what):
                if tensors[0].is_cpu:
                    own.wait(collective(*tensors, group=group, async_op=True))
                else:  # the device waits, not this process
                    collective(*tensors, group=group)
        finally:
            own.number += 1

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Give errors of waiting the layer, the ranks, and what the others do instead."""
        try:
            yield
        except LookupError as error:
            # A forward's layer names itself.
            who = f"{self.layer}: " if what == "gradients" else ""
            raise RankError(f"{who}all ranks must fit together, got {error}") from None
        except RuntimeError as error:
            here, ranks = dist.get_rank(self.process_group), self.ranks()
            raise RuntimeError(
                f"{self.layer}: rank {here} of {ranks} waited for the other ranks' {what}, and "
                "they didn't come: every rank must call this layer equally often, in training, "
                "with an empty batch where it has none, and run its backward"
                f"{board(self.process_group).doing()}; {error}"
            ) from error

    def _looked_at(self, heads: Tensor) -> bool:
        """Whether all ranks look: on the CPU, and elsewhere where nobody got what it expected."""
        return heads.is_cpu or not (self._agreed and (heads[:, 0] == self._agreed).any())

    def _disagreement(self, own: Any, told: bool) -> RankError:
        """The error that lists what every rank has, from what this one has.

        Where some ranks don't look at what they receive, and so won't tell, it is this one's alone.
        """
        if not told:
            here = dist.get_rank(self.process_group)
            return RankError(f"all ranks must fit together, rank {here} doesn't: {own}")
        return _misfit(gathered(own, self.process_group or dist.group.WORLD))


def _statistics(channels: int, compiled: bool) -> str:
    return f"{'compiled ' * compiled}statistics of {channels} channels"


_merges: weakref.WeakValueDictionary[int, Merge] = weakref.WeakValueDictionary()
"""By the numbers that stand for them in compiled graphs."""
_numbers = itertools.count()


def _register(merge: Merge) -> int:
    number = next(_numbers)
    _merges[number] = merge
    return number


@torch.library.custom_op("normkit::announced", mutates_args=())
def _announced(message: Tensor, merge: int, channels: int) -> Tensor:
    """The message, once the board says that it will be sent."""
    _merges[merge].announce(channels)
    return message.clone()


@_announced.register_fake
def _(message: Tensor, merge: int, channels: int) -> Tensor:
    return torch.empty_like(message)


def _misfit(said: list[Any]) -> RankError:
    """The error that lists what every rank has: settings that differ, or what it says."""
    known = [one for one in said if isinstance(one, dict)]
    differing = [k for k in known[0] if len({one[k] for one in known}) > 1] if known else []
    shown = differing or ["channels", "dtype"]
    texts = [
        ", ".join(f"{k} {one[k]}" for k in shown) if isinstance(one, dict) else one for one in said
    ]
    ranks = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
    return RankError(f"all ranks must fit together, got {ranks}")


def gathered(value: Any, process_group: Any = None) -> list[Any]:
    """Every rank's value, in the order of the ranks; this one's alone where no group is given."""
    if process_group is None:
        return [value]
    _check_member(process_group)
    everyone: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(everyone, value, group=process_group)
    return everyone


def _check_member(process_group: Any, who: str = "") -> None:
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise RuntimeError(
            f"{who}rank {dist.get_rank()} isn't in its process_group; give each rank the group "
            "that it is in"
        )


def _check_alike(everyone: Tensor) -> None:
    alike = (everyone[:, :_SETTINGS] == everyone[:1, :_SETTINGS]).all()
    torch._assert_async(
        alike, "synchronized statistics: ranks differ in channels, dtype or the layer's settings"
    )


@functools.cache
def _say_alone() -> None:
    warnings.warn(
        "no process group is initialized, so synchronized layers normalize by this process's batch "
        "alone; call torch.distributed.init_process_group first",
        RuntimeWarning,
        stacklevel=2,
    )


def let_ddp_take(layer: type[nn.Module]) -> None:
    """Have DistributedDataParallel accept this subclass of torch's SyncBatchNorm on the CPU too.

    It refuses torch's own there, which can't run on the CPU, and all subclasses with it. The check
    is a private method of torch's, replaced on import; a torch without it is warned of.
    """
    name = "_passing_sync_batchnorm_handle"
    refuse = getattr(nn.parallel.DistributedDataParallel, name, None)
    if refuse is None:
        warnings.warn(
            f"torch {torch.__version__} has no {name} to mend, so DistributedDataParallel may "
            "refuse synchronized layers on the CPU",
            RuntimeWarning,
            stacklevel=2,
        )
        return

    @functools.wraps(refuse)
    def refuse_others(self: nn.parallel.DistributedDataParallel, module: nn.Module) -> None:
        sync = [m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)]
        refuse(self, nn.ModuleList(m for m in sync if not isinstance(m, layer)))

    setattr(nn.parallel.DistributedDataParallel, refuse.__name__, refuse_others)
