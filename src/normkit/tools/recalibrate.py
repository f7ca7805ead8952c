"""Exact population statistics for the layers that keep running ones."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normkit.formula.moments import Moments
from normkit.layers import BatchRenorm
from normkit.runtime.sync import gathered
from normkit.tools.model import (
    Forward,
    Only,
    ToolError,
    again,
    all_off,
    check_loader,
    check_only,
    chosen,
    first_input,
    inner,
    taken,
)
from normkit.tools.norms import is_frozen, is_norm
from normkit.tools.ranks import apart, in_step, together
from normkit.tools.restore import preserved, undone_on_failure
from normkit.tools.spread import Spread
from normkit.tools.table import Report

_FEWEST_BATCHES = 8
"""A standard error from fewer batches is itself too uncertain to stop by."""


@dataclass
class Recalibrated:
    """One layer. Shifts are in standard deviations, ratios are variance after / before.

    `standard_error` is that of the mean, from the spread of the batches' means: the root mean
    square over the channels, in standard deviations.
    """

    layer: str
    values: int
    mean_shift: float | None
    variance_ratio: str
    standard_error: float | None
    note: str


def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    forward: Forward | None = None,
    *,
    sequential: bool = False,
    tolerance: float | None = None,
    batches: int | None = None,
    only: Only = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    copy: bool = False,
    progress: bool = False,
    process_group: Any = None,
) -> Report:
    """Replace running averages by the statistics of all the loader's data.

    running_mean = <x>, running_var = sum (x - <x>)² / (n - 1), over every value that reaches the
    layer, in float64, batches weighted by their counts. Unless `sequential`, a batch has more than
    one value per channel.

    In one pass each layer sees what training shows it: the layers before it normalize by the batch.
    Everything else is in evaluation (dropout off), `model.train()` is never called, and all flags
    are put back. Buffers are written in place when all is known: an exception, also one of the
    loader, leaves the model as it was. `num_batches_tracked` becomes the number of batches, but for
    batch renorm, which times its limits by it and whose variance is biased (divided by n).

    Untouched, and named in the report: frozen layers (by class, by `freeze()`, or in evaluation
    inside a model in training), and layers that no batch reached. A model inside
    DistributedDataParallel runs without it.

    With a `process_group` its ranks' data count together, and all get the same buffers, facts and
    rows, or an error; they may differ in their number of batches. Synchronized layers, whatever
    their own group, then normalize by the batches of all these ranks while each has one, and by a
    rank's own after that; without a process_group by this process's, and nobody is waited for.

    Args:
        model: any module.
        loader: batches; a tensor, or a tuple that starts with one, unless `forward` is given.
        forward: `forward(model, batch)` runs one batch; it also moves it to the model's device.
        sequential: one pass for each layer, under the new statistics of the layers before it, as
            evaluation will run them. Costs as many passes as there are layers.
        tolerance: stop when the mean's standard error, in standard deviations, is at most this in
            every layer (root mean square over the channels; from at least 8 batches). By default
            the whole loader is read.
        batches: read at most so many, of an endless loader for example; None for all.
        only: a pattern for names ("layer1.*"), or a predicate of name and module.
        evaluate: `evaluate(model)` is called in evaluation, before and after.
        copy: work on a deep copy, which is the report's `.model`.
        progress: count batches on stderr.
        process_group: whose ranks' data count together, and of whose ranks all must call it;
            `torch.distributed.group.WORLD` for all. None: this process's data alone.

    Returns:
        a report with one `Recalibrated` a layer; facts: batches, whether the tolerance was reached
        before the loader's end, `evaluate` before and after.

    Raises:
        ToolError: an empty loader, statistics that aren't finite, fewer than two values a channel,
            batches of an unknown form, a model of scripted, quantized or lazy modules; an error of
            another rank.

    Source: Wu & Johnson 2021 (arXiv 2105.07576), section 3.
    """
    run = forward or first_input
    with together(process_group):
        given = taken(model, copy)
        model = inner(given)
        check_only(model, only)
        check_loader(loader)
        if batches is not None and batches < 1:
            raise ToolError(
                f"batches must be at least 1, got {batches}; None reads the whole loader"
            )
        if tolerance is not None and not tolerance > 0:
            raise ToolError(
                f"tolerance must be positive, got {tolerance!r}; None reads the whole loader"
            )
        layers, rows = _layers(model, only)
        if sequential:
            again(loader, "sequential=True")
    count, reached = 0, True
    seen: dict[str, Spread] = {}
    new: dict[str, Moments] = {}
    before = after = None
    with preserved(model, loader), torch.no_grad():
        with together(process_group), apart(model):
            all_off(model)
            before = evaluate(model) if evaluate else None
        if layers:
            order = [list(layers)]
            if sequential:
                order = [[name] for name in _order(model, layers, loader, run, process_group)]
            for names in order:
                now = {name: layers[name] for name in names}
                watched = {name: Spread() for name in names}
                with together(process_group):
                    read = _pass(
                        *(model, now, watched, loader, run),
                        *(sequential, tolerance, batches, progress, process_group),
                    )
                count = count or sum(gathered(read, process_group))
                merged = _over_ranks(watched, process_group)
                reached = reached and _converged(merged, tolerance)
                seen |= merged
                for name, spread in merged.items():
                    assert spread.all is not None
                    new[name] = spread.all
                    _install(name, layers[name], spread.all)
        with together(process_group), apart(model):
            after = evaluate(model) if evaluate else None
    buffers = [b for name in new for b in layers[name]._buffers.values() if b is not None]
    with undone_on_failure(model, tensors=buffers), torch.no_grad():
        rows += [_row(name, layer, seen.get(name), count) for name, layer in layers.items()]
        for name, moments in new.items():
            _write(layers[name], moments, count)
        facts: dict[str, Any] = {"layers": len(new), "batches": count}
        if tolerance is not None:
            facts["tolerance reached"] = reached
        if not layers:
            facts["note"] = "no layer keeps running statistics; nothing to do"
        if evaluate:
            facts |= {"evaluated before": before, "evaluated after": after}
        return Report(given, rows, facts)


def _layers(model: nn.Module, only: Only) -> tuple[dict[str, _BatchNorm], list[Recalibrated]]:
    layers: dict[str, _BatchNorm] = {}
    left: list[Recalibrated] = []
    for name, module in model.named_modules():
        if not is_norm(module) or not chosen(only, name, module):
            continue
        if getattr(module, "running_mean", None) is None:
            if isinstance(module, _BatchNorm):
                left.append(_left(name, "keeps no running statistics"))
        elif is_frozen(model, module):
            left.append(_left(name, "frozen"))
        elif isinstance(module, _BatchNorm):
            layers[name] = module
        else:
            left.append(_left(name, "its running statistics are averages over samples"))
    return layers, left


def _left(name: str, why: str) -> Recalibrated:
    return Recalibrated(name, 0, None, "-", None, f"left: {why}")


def _pass(
    model: nn.Module,
    layers: dict[str, _BatchNorm],
    watched: dict[str, Spread],
    loader: Iterable[Any],
    run: Forward,
    sequential: bool,
    tolerance: float | None,
    batches: int | None,
    progress: bool,
    process_group: Any,
) -> int:
    """Show the loader's batches to the layers; return how many were read."""
    for layer in layers.values():
        # The running averages move meanwhile; `preserved` puts them back.
        layer.training = not sequential
    read = 0
    with (
        _hooks(layers, lambda name, x, mask: watched[name].see(x, mask)),
        in_step(model, process_group) as ranks,
    ):
        for read, batch in enumerate(ranks.read(_counted(loader, batches, progress)), 1):
            try:
                run(model, batch)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise ToolError(
                    f"batch {read} has one value per channel, by which no layer can normalize "
                    f"({error}); use larger batches (DataLoader(drop_last=True) drops a last one), "
                    "or sequential=True, whose layers normalize by running averages"
                ) from error
            if tolerance is not None and read >= _FEWEST_BATCHES and _converged(watched, tolerance):
                break
    for layer in layers.values():
        layer.training = False
    return read


def _converged(watched: dict[str, Spread], tolerance: float | None) -> bool:
    errors = [_standard_error(w) for w in watched.values() if w.batches]
    return tolerance is None or all(error <= tolerance for error in errors)


def _standard_error(watched: Spread) -> float:
    """Of the mean; a single batch says nothing of it."""
    return watched.errors()[0] / math.sqrt(watched.batches) if watched.batches > 1 else math.inf


def _order(
    model: nn.Module,
    layers: dict[str, _BatchNorm],
    loader: Iterable[Any],
    run: Forward,
    process_group: Any,
) -> list[str]:
    """The layers in the order in which the first batch reaches them."""
    reached: dict[str, None] = {}
    with together(process_group), _hooks(layers, lambda name, x, mask: reached.setdefault(name)):
        for batch in loader:
            run(model, batch)
            break
    return next(filter(None, gathered(list(reached), process_group)), [])


@contextmanager
def _hooks(
    layers: dict[str, _BatchNorm], see: Callable[[str, Tensor, Tensor | None], Any]
) -> Iterator[None]:
    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("input", "mask"), args, strict=False)) | kwargs
            see(name, given["input"], given.get("mask"))

        return before

    handles = [
        layer.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _over_ranks(own: dict[str, Spread], process_group: Any) -> dict[str, Spread]:
    """What all ranks saw, the same on each; layers that none reached are out."""
    merged: dict[str, Spread] = {}
    for seen in gathered({name: spread.cpu() for name, spread in own.items()}, process_group):
        for name, spread in seen.items():
            if spread.all is not None:
                merged[name] = merged[name].merge(spread) if name in merged else spread
    if not merged:
        raise ToolError(
            "no batch reached a layer with running statistics: the loader is empty, or the model "
            "calls none of them; give at least one batch"
        )
    return merged


def _install(name: str, layer: _BatchNorm, moments: Moments) -> None:
    """Let the layer use the new statistics; its own buffers stay aside and unchanged."""
    if moments.count.min() < 2:
        raise ToolError(
            f"{name}: {int(moments.count.min())} value in a channel, and a variance needs two; "
            "give more data"
        )
    for key, value in (
        ("running_mean", moments.mean),
        ("running_var", _variance(layer, moments)),
    ):
        if not value.isfinite().all():
            raise ToolError(
                f"{name}: {key} isn't finite; an input or a layer before it holds NaN or infinity"
            )
        layer._buffers[key] = value.to(layer._buffers[key])


def _variance(layer: _BatchNorm, moments: Moments) -> Tensor:
    """Unbiased, but for batch renorm, whose running variance is the biased one."""
    biased = isinstance(layer, BatchRenorm)
    return moments.m2 / moments.count if biased else moments.variance


def _write(layer: _BatchNorm, moments: Moments, batches: int) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.copy_(moments.mean)
    layer.running_var.copy_(_variance(layer, moments))
    if layer.num_batches_tracked is not None and not isinstance(layer, BatchRenorm):
        layer.num_batches_tracked.fill_(batches)


def _row(name: str, layer: _BatchNorm, watched: Spread | None, batches: int) -> Recalibrated:
    if watched is None or watched.all is None:
        return _left(name, "no batch reached it")
    new = watched.all
    assert layer.running_mean is not None
    assert layer.running_var is not None
    mean, var = layer.running_mean.to(new.mean), layer.running_var.to(new.mean)
    moved = ((new.mean - mean).abs() / (new.variance + layer.eps).sqrt()).max()
    ratio = (new.variance + layer.eps) / (var + layer.eps)
    calls = watched.batches / max(batches, 1)
    return Recalibrated(
        name,
        int(new.count.max()),
        float(moved),
        f"{float(ratio.min()):.3g} to {float(ratio.max()):.3g}",
        _standard_error(watched) if watched.batches > 1 else None,
        f"called {calls:.3g} times a batch: one statistic for all" if calls > 1 else "",
    )


def _counted(loader: Iterable[Any], most: int | None, progress: bool) -> Iterator[Any]:
    try:
        length = len(loader) if isinstance(loader, Sized) else None
        counts = [count for count in (length, most) if count is not None]
        total = f"/{min(counts)}" if counts else ""
        for number, batch in enumerate(islice(loader, most), 1):
            yield batch
            if progress:
                print(f"\r{number}{total} batches", end="", file=sys.stderr, flush=True)
    finally:
        if progress:
            print(file=sys.stderr)
