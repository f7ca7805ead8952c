"""Statistics over ranks, on real process groups: as one process on the whole batch.

All cases that agree with each other run in one set of processes, since starting it takes seconds.
"""

import copy
import datetime
import pickle
import random
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import normkit
import oracle
from ranks import on_ranks

RANKS = 3
SYNC = normkit.SyncBatchNorm


def renorm(channels, **more):
    return normkit.BatchRenorm(channels, r_steps=(0, 1), d_steps=(0, 1), **more).synchronize()


@dataclass(frozen=True)
class Case:
    """A layer and the shapes of its input on the ranks; x is scale * noise + offset."""

    make: object
    shapes: tuple
    dtype: torch.dtype = torch.float32
    layout: torch.memory_format = torch.contiguous_format
    masked: bool = False
    residual: bool = False
    per_sample: bool = False
    steps: int = 1
    scale: float = 3.0
    offset: float = 2.0


def samples(*sizes, of=(5, 3, 4)):
    return tuple((n, *of) for n in sizes)


CASES = {
    "uneven": Case(partial(SYNC, 5), samples(2, 1, 4)),
    "an empty rank": Case(partial(SYNC, 5, act="silu"), samples(3, 0, 4)),
    "two empty ranks": Case(partial(SYNC, 5), samples(0, 0, 4)),
    "all empty": Case(partial(SYNC, 5), samples(0, 0, 0)),
    "other positions": Case(partial(SYNC, 5), ((2, 5, 3, 4), (1, 5, 7, 7), (3, 5, 1, 2))),
    "one sample each": Case(partial(SYNC, 5), samples(1, 1, 1, of=(5,))),
    "2d": Case(partial(SYNC, 40), samples(9, 4, 30, of=(40,))),
    "3d": Case(partial(SYNC, 5, eps=1e-3), samples(2, 2, 3, of=(5, 7))),
    "5d": Case(partial(SYNC, 2), samples(2, 1, 3, of=(2, 2, 3, 4))),
    "channels_last": Case(
        partial(SYNC, 20, act="relu"), samples(2, 1, 4, of=(20, 5, 6)), layout=torch.channels_last
    ),
    "large": Case(partial(SYNC, 3, act="leaky_relu"), samples(9, 4, 2, of=(3, 61, 59))),
    "no affine": Case(partial(SYNC, 5, affine=False), samples(2, 1, 4)),
    "no bias": Case(partial(SYNC, 5, bias=False), samples(2, 1, 4)),
    "no running statistics": Case(partial(SYNC, 5, track_running_stats=False), samples(2, 1, 4)),
    "average of all": Case(partial(SYNC, 5, momentum=None), samples(2, 1, 4), steps=3),
    "bfloat16": Case(partial(SYNC, 5), samples(2, 1, 4), torch.bfloat16),
    "float16": Case(partial(SYNC, 5, act="gelu"), samples(2, 1, 4), torch.float16),
    "float64": Case(partial(SYNC, 5, act="gelu"), samples(2, 1, 4), torch.float64),
    "masked": Case(partial(SYNC, 5), samples(2, 1, 4), masked=True),
    "masked, relu": Case(
        partial(SYNC, 5, act="relu"), samples(2, 0, 4), masked=True, residual=True
    ),
    "residual, relu": Case(partial(SYNC, 5, act="relu"), samples(2, 1, 4), residual=True),
    "residual, gelu": Case(partial(SYNC, 5, act="gelu"), samples(2, 1, 4), residual=True),
    "affine per sample": Case(partial(SYNC, 5, act="silu"), samples(2, 1, 4), per_sample=True),
    "mean of 1e5": Case(partial(SYNC, 5), samples(20, 10, 40), scale=1.0, offset=1e5),
    "huge": Case(partial(SYNC, 5), samples(2, 1, 4), scale=1e30, offset=1e30),
    "renorm": Case(partial(renorm, 5, act="relu"), samples(2, 1, 4), steps=3),
    "renorm, masked": Case(partial(renorm, 5), samples(2, 0, 4), masked=True, steps=3),
    "ghosts": Case(lambda: normkit.GhostBatchNorm(5, 2).synchronize(), samples(2, 4, 2), steps=2),
    "ghosts, masked": Case(
        lambda: normkit.GhostBatchNorm(5, 2).synchronize(), samples(2, 4, 2), masked=True
    ),
    "plain batch norm": Case(lambda: normkit.BatchNorm2d(5).synchronize(), samples(2, 1, 4)),
    "micro-batches": Case(lambda: SYNC(5).accumulate(3), samples(2, 0, 4), steps=6),
}


def drawn(seed):
    """A random case."""
    draw = random.Random(seed)
    channels, positions = (
        draw.randint(1, 40),
        [draw.randint(1, 6) for _ in range(draw.randint(0, 3))],
    )
    sizes = [draw.choice([0, 1, 2, 3, 8, 17]) for _ in range(RANKS - 1)] + [draw.randint(2, 9)]
    act = draw.choice([None, "relu", "leaky_relu", "silu", "gelu"])
    last = len(positions) == 2 and draw.random() < 0.5
    return Case(
        partial(SYNC, channels, act=act, momentum=draw.choice([None, 0.1, 0.7])),
        samples(*sizes, of=(channels, *positions)),
        draw.choice([torch.float32, torch.float64]),
        torch.channels_last if last else torch.contiguous_format,
        draw.random() < 0.4,
        draw.random() < 0.3,
        steps=draw.randint(1, 2),
    )


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(16)}


def tensors(case, step):
    """What every rank is given: [(x, dy, mask, residual, weight)], the same wherever it is made."""
    made, generator = [], torch.Generator().manual_seed(step)
    for shape in case.shapes:
        noise, dy, residual = (torch.randn(shape, generator=generator) for _ in range(3))
        x = noise.double() * case.scale + case.offset
        x, dy, residual = (
            t.to(case.dtype).contiguous(memory_format=case.layout) for t in (x, dy, residual)
        )
        mask = torch.rand(shape, generator=generator) < 0.7
        weight = torch.randn(shape[:2], generator=generator).to(case.dtype)
        made.append(
            (
                *(x, dy, mask if case.masked else None),
                *(residual if case.residual else None, weight if case.per_sample else None),
            )
        )
    return made


def layer_of(case):
    torch.manual_seed(5)
    layer = case.make().to(case.dtype)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return layer


def trained(layer, steps):
    """(y, dx, dresidual) of each step, and the sums of the parameter gradients, the buffers."""
    results = []
    for x, dy, mask, residual, weight in steps:
        x.requires_grad_()
        if residual is not None:
            residual.requires_grad_()
        y = layer(x, mask=mask, residual=residual, weight=weight)
        y.backward(dy)
        assert x.grad.stride() == x.stride()
        results.append([y.detach(), x.grad, None if residual is None else residual.grad])
    return results, [p.grad for p in layer.parameters()], [b.clone() for b in layer.buffers()]


def numpy(tree):
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().double().numpy(), tree
    )


def rank_of(case, rank):
    return numpy(trained(layer_of(case), [tensors(case, s)[rank] for s in range(case.steps)]))


def rows(array):
    """(N, C, *) as (N *, C)."""
    return np.moveaxis(array, 1, -1).reshape(-1, array.shape[1])


def whole_of(case):
    """The same in one process, in rows where that makes no difference, to hold any positions."""
    layer = layer_of(case)
    layer.merge = None
    by_samples = "Ghost" in type(layer).__name__ or case.per_sample

    def joined(parts):
        if parts[0] is None or by_samples:
            return None if parts[0] is None else torch.cat(parts).detach()
        return torch.cat([p.detach().movedim(1, -1).flatten(0, -2) for p in parts])

    steps = [
        [joined(parts) for parts in zip(*tensors(case, step), strict=True)]
        for step in range(case.steps)
    ]
    if type(layer) is normkit.BatchNorm2d:
        layer.ranks = None
    if not sum(np.prod(shape) for shape in case.shapes):
        return None
    return numpy(trained(layer, steps))


@contextmanager
def counted():
    """How many collectives of each kind ran inside, read off the profiler."""
    counts = {}
    with torch.profiler.profile() as profile:
        yield counts
    for event in profile.events():
        if event.name.startswith("gloo:"):
            name = event.name.removeprefix("gloo:")
            counts[name] = counts.get(name, 0) + 1


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def part(x, rank):
    return x.split([2, 0, 5])[rank].clone()


def synced_and_whole(make):
    torch.manual_seed(0)
    layer = make()
    whole = copy.deepcopy(layer)
    whole.merge = None
    return layer, whole, torch.randn(7, 5, 3, 4) * 3 + 2, torch.randn(7, 5, 3, 4)


# ---- what ranks do


def collectives(rank):
    found = {}
    for name, make in {"sync": partial(SYNC, 5), "renorm": partial(renorm, 5)}.items():
        layer, x = make(), torch.randn(rank, 5, requires_grad=True)
        with counted() as first:
            layer(x)
        with counted() as forward:
            y = layer(x)
        with counted() as backward:
            y.sum().backward()
        with counted() as evaluation:
            layer.eval()(x)
        found[name] = (first, forward, backward, evaluation)
    ghost = normkit.GhostBatchNorm(5, 2).synchronize()
    x = torch.randn(4, 5, requires_grad=True)
    ghost(x)
    with counted() as both:
        ghost(x).sum().backward()
    found["ghost"] = both
    return found


def recomputed(rank):
    found = []
    for reentrant in (False, True):
        layer, whole, x, dy = synced_and_whole(partial(SYNC, 5, act="relu"))
        layer(part(x, rank))
        whole(x)
        mine, all_of_it = part(x, rank).requires_grad_(), x.clone().requires_grad_()
        with counted() as counts:
            checkpoint(layer, mine, use_reentrant=reentrant).backward(part(dy, rank))
        whole(all_of_it).backward(dy)
        distance = (mine.grad - part(all_of_it.grad, rank)).abs().sum()
        found.append((counts, float(distance), int(layer.num_batches_tracked)))
    return found


def compiled(rank):
    found = {}
    makes = {
        "batch": partial(SYNC, 5, act="relu"),
        "renorm": partial(renorm, 5),
        "ghost": lambda: normkit.GhostBatchNorm(5, 2).synchronize(),
    }
    for name, make in makes.items():
        layer, whole, x, dy = synced_and_whole(make)
        sizes = [2, 2, 2] if name == "ghost" else [2, 0, 5]
        x, dy = x[: sum(sizes)], dy[: sum(sizes)]
        mine, all_of_it = x.split(sizes)[rank].clone().requires_grad_(), x.clone().requires_grad_()
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(mine)
        y.backward(dy.split(sizes)[rank])
        expected = whole(all_of_it)
        expected.backward(dy)
        gradient = layer.weight.grad.clone()
        dist.all_reduce(gradient)
        evaluated = torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")(mine)
        found[name] = numpy(
            [
                (y, expected.split(sizes)[rank]),
                (mine.grad, all_of_it.grad.split(sizes)[rank]),
                (gradient, whole.weight.grad),
                (evaluated, whole.eval()(all_of_it).split(sizes)[rank]),
                *zip(layer.buffers(), whole.buffers(), strict=True),
            ]
        )
    return found


def transformed(rank):
    """Second derivatives, and torch.func.grad by functional_call."""
    layer, whole, x, _ = synced_and_whole(partial(SYNC, 5, act="silu"))
    layer, whole, x = layer.double(), whole.double(), x.double()
    mine, all_of_it = part(x, rank).requires_grad_(), x.clone().requires_grad_()
    found = []
    for model, at in ((layer, mine), (whole, all_of_it)):
        (gradient,) = torch.autograd.grad(model(at).pow(3).sum(), at, create_graph=True)
        gradient.square().sum().backward()

        def loss(parameters, buffers, x, model=model):
            y, buffers = normkit.functional_call(model, (parameters, buffers), (x,))
            return y.pow(3).sum(), buffers

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        given = (parameters, dict(model.named_buffers()), at.detach())
        functional, buffers = torch.func.grad(loss, argnums=2, has_aux=True)(*given)
        found.append((gradient, at.grad, functional, buffers["running_var"]))
    (first, second, third, variance), (*theirs, whole_variance) = found
    theirs = [part(t, rank) for t in theirs]
    return numpy(
        [(first, theirs[0]), (second, theirs[1]), (third, theirs[2]), (variance, whole_variance)]
    )


def one_gradient_at_a_time(rank):
    """What is said of many gradients at once, and of a tangent."""
    layer, _, x, dy = synced_and_whole(partial(SYNC, 5))
    mine, dy = part(x, rank).requires_grad_(), part(dy, rank)
    y = layer(mine)
    back = partial(torch.autograd.grad, y, mine, retain_graph=True)
    many = torch.stack([dy, dy])
    return [
        error_of(torch.vmap(back), many),
        error_of(back, many, is_grads_batched=True),
        error_of(torch.func.jvp, back, (dy,), (dy,)),
    ]


def network(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        norm(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        norm(4),
        nn.Flatten(),
        nn.Linear(16, 2),
    )


def data_parallel(rank):
    """DDP on uneven batches: averaged gradients, and the weight that makes them the whole's."""
    sizes = [4, 1, 3]
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    states = []
    for corrected in (False, True):
        net = network()
        normkit.swap(net, "sync")
        model = DistributedDataParallel(net)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(x.split(sizes)[rank]).square().mean()
            (loss * (RANKS * sizes[rank] / 8) if corrected else loss).backward()
            optimizer.step()
        states.append(numpy(net.state_dict()))
    alone = None
    if rank == 0:  # in evaluation a rank needs no other
        alone = numpy(net.eval()(x))
    whole = network()
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        whole(x).square().mean().backward()
        optimizer.step()
    return states, numpy(whole.state_dict()), alone, numpy(whole.eval()(x))


def sharded(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = network()
    normkit.swap(net, "sync")
    whole = copy.deepcopy(net)
    for layer in whole:
        layer.merge = None
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in net:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    x = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    y, expected = net(x.split(2)[rank]), whole(x)
    y.square().mean().backward()
    expected.square().mean().backward()
    gradients = [p.grad.full_tensor() for p in net.parameters()]
    return numpy(
        [
            (y, expected.split(2)[rank]),
            *zip(gradients, [p.grad for p in whole.parameters()], strict=True),
            (net[1].running_var, whole[1].running_var),
        ]
    )


def subgroups(rank):
    """Ranks 0 and 2 together, 1 alone: bitwise as without a group."""
    pair, single = dist.new_group([0, 2]), dist.new_group([1])
    group = single if rank == 1 else pair
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(2)).split(2)
    mine = x[rank].clone().requires_grad_()
    layer = SYNC(5, process_group=group)
    copied = copy.deepcopy(layer)
    y = copied(mine)
    y.pow(3).sum().backward()
    members = [1] if rank == 1 else [0, 2]
    whole, alone = normkit.BatchNorm(5), torch.cat([x[r] for r in members]).requires_grad_()
    expected = whole(alone)
    expected.pow(3).sum().backward()
    at = members.index(rank)
    stranger = SYNC(5, process_group=dist.GroupMember.NON_GROUP_MEMBER)
    return (
        numpy(
            [
                (y, expected[2 * at : 2 * at + 2]),
                (mine.grad, alone.grad[2 * at : 2 * at + 2]),
                *zip(copied.buffers(), whole.buffers(), strict=True),
            ]
        ),
        copied.process_group is group,
        error_of(stranger, mine),
    )


def disagreements(rank):
    last = rank == RANKS - 1
    layer = SYNC(4)
    free = SYNC(4, affine=False, track_running_stats=False)
    x = torch.randn(2, 4)
    return {
        "other layers": error_of(SYNC(4 + last), torch.randn(2, 4 + last)),
        "channels at first": error_of(layer, torch.randn(2, 4 + last)),
        "none": error_of(layer, x),
        "channels": error_of(layer, torch.randn(2, 4 + last)),
        "dtype": error_of(layer, x.double() if last else x),
        "rank": error_of(normkit.BatchNorm2d(4).synchronize(), x if last else x[..., None, None]),
        "mask": error_of(layer, x, mask=torch.ones(2, 4) if last else None),
        "gradient": error_of(layer, x.clone().requires_grad_(last)),
        "momentum": error_of(SYNC(4, momentum=None if last else 0.1), x),
        "everywhere": error_of(layer, torch.randn(2, 5)),
        "one value": error_of(layer, x[: int(last), :]),
        "now free": error_of(free, x),
        "free to change": error_of(free, torch.randn(2 + last, 6)),
        "not alone": error_of(free, torch.randn(2, 7 if last else 6)),
        "none at last": error_of(layer, x),
    }


def histories(rank):
    """One rank's layer copied or pickled; calls of which one rank's fails or holds nothing."""
    last = rank == RANKS - 1
    layer, x = SYNC(4), torch.randn(2, 4)
    layer(x)
    copied = copy.deepcopy(layer) if rank == 0 else layer
    pickled = pickle.loads(pickle.dumps(layer)) if last else layer
    local = normkit.GhostBatchNorm(4, 2, track_running_stats=False).synchronize()
    empty, counted = torch.zeros(2, 1, dtype=torch.bool), SYNC(4)
    counted(x)
    counted(x, mask=empty) if last else counted(x[:0])
    return {
        "copied": error_of(copied, x),
        "pickled": error_of(pickled, x),
        "sends nothing": error_of(local, x.long() if last else x),
        "elsewhere": error_of(layer, x.to("meta") if last else x),
        "batches": int(counted.num_batches_tracked),
        "none at last": error_of(layer, x),
    }


def absences(rank):
    found = []
    for backward in (False, True):
        group = dist.new_group([0, 1])
        if rank == 2:
            continue
        layer = SYNC(4, process_group=group)
        layer(torch.randn(2, 4))
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2), group)
        x = torch.randn(2, 4, requires_grad=True)
        y = layer(x)
        if rank == 0:
            found.append(error_of(y.sum().backward) if backward else error_of(layer, x))
    dist.barrier()
    return found


def recalibrated(rank):
    """Uneven numbers of batches through synchronized layers, in one pass, and one that fails."""
    sizes = [[3, 2, 2], [1], []][rank]
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    mine = list(x.split([7, 1, 0])[rank].split(sizes)) if sizes else []
    net = network()
    normkit.swap(net, "sync")
    merges = [m.merge for m in net.modules() if hasattr(m, "merge")]
    report = normkit.recalibrate(net, mine, process_group=dist.group.WORLD)
    kept = all(
        a is b
        for a, b in zip(
            merges, [m.merge for m in net.modules() if hasattr(m, "merge")], strict=True
        )
    )
    even = network()
    normkit.swap(even, "sync")
    batches = list(x[:6].split(2)[rank].split(1))
    normkit.recalibrate(even, batches, process_group=dist.group.WORLD)
    refused = error_of(
        *(normkit.recalibrate, even, batches if rank else iter(batches)),
        sequential=True,
        process_group=dist.group.WORLD,
    )

    def fails_between(model, x):
        y = model[:3](x)
        if rank == 1:
            raise OSError("its own")
        model[3:](y)

    before = numpy(even.state_dict())
    failed = error_of(
        normkit.recalibrate, even, batches, fails_between, process_group=dist.group.WORLD
    )
    kept = kept and all(np.array_equal(v, before[k]) for k, v in numpy(even.state_dict()).items())
    if rank == 0:  # without a group it waits for nobody
        normkit.recalibrate(copy.deepcopy(even), batches)
    told = (report.facts, [str(row) for row in report.rows], refused, failed)
    return numpy(net.state_dict()), kept, numpy(even.state_dict()), told


def standardized(rank):
    x = torch.randn(9, 3, 4, generator=torch.Generator().manual_seed(4)) * 5 + 1e6
    mine = x.split([7, 2, 0])[rank]
    fitted = normkit.Standardize(3).fit(
        mine.split(3) if len(mine) else [], process_group=dist.group.WORLD
    )
    broken = normkit.Standardize(3)
    bad = torch.full((2, 3), torch.nan) if rank == 1 else torch.ones(2, 3)
    stranger = {"process_group": dist.GroupMember.NON_GROUP_MEMBER}
    return (
        numpy((fitted.mean, fitted.std, fitted.count)),
        error_of(broken.fit, [bad], process_group=dist.group.WORLD),
        float(broken.count.sum()),
        error_of(broken.fit, bad[:0], **stranger),
    )


ACTS = (
    *(collectives, recomputed, compiled, transformed, data_parallel, sharded, subgroups),
    *(one_gradient_at_a_time, disagreements, histories, recalibrated, standardized, absences),
)


def everything(rank):
    found = {name: rank_of(case, rank) for name, case in CASES.items()}
    for act in ACTS:
        try:
            found[act.__name__] = act(rank)
        except Exception:
            found[act.__name__] = traceback.format_exc()
    return found


# ---- what comes of it


@pytest.fixture(scope="module")
def ranks():
    got = on_ranks(everything, ranks=RANKS)
    assert all(isinstance(said, dict) for said in got.values()), got
    return [got[rank] for rank in range(RANKS)]


def of(ranks, act):
    found = [said[act.__name__] for said in ranks]
    for said in found:
        assert not isinstance(said, str), said
    return found


TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def close(got, expected, case, factor=1.0):
    """To so many roundings of the largest value."""
    scale = max(1e-300, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(
        got / scale, expected / scale, rtol=0, atol=factor * TOLERANCE[case.dtype]
    )


@pytest.mark.parametrize("name", CASES)
def test_ranks_are_one_process_on_the_whole_batch(ranks, name):
    case = CASES[name]
    got, whole = [said[name] for said in ranks], whole_of(case)
    if whole is None:
        for results, gradients, buffers in got:
            assert all(array.size == 0 for array in results[0][:2])
            assert all((gradient == 0).all() for gradient in gradients)
            assert [b.max() for b in buffers] == [0, 1, 0]
        return
    results, gradients, buffers = whole
    by_samples = results[0][0].ndim > 2 or case.per_sample
    for step, expected in enumerate(results):
        for index, array in enumerate(expected):
            if array is None:
                continue
            parts = [rank[0][step][index] for rank in got]
            joined = np.concatenate(parts if by_samples else list(map(rows, parts)))
            close(joined, array, case, 4.0 if index else 1.0)
    for index, gradient in enumerate(gradients):
        if gradient is None:  # the call gave the weight
            continue
        close(sum(rank[1][index] for rank in got), gradient, case, 20.0)
    for index, buffer in enumerate(buffers):
        for rank in got:
            assert np.array_equal(rank[2][index], got[0][2][index], equal_nan=True)
        if np.isfinite(buffer).all():
            close(got[0][2][index], buffer, case, 2.0)
        else:
            assert np.array_equal(got[0][2][index], buffer)


@pytest.mark.parametrize("name", ["uneven", "other positions", "mean of 1e5", "huge", "2d"])
def test_ranks_are_the_formula_in_float64(ranks, name):
    case = CASES[name]
    layer = layer_of(case)
    x, dy = (
        np.concatenate([rows(t.double().numpy()) for t in parts])
        for parts in list(zip(*tensors(case, 0), strict=True))[:2]
    )
    weight, bias = numpy((layer.weight, layer.bias))
    y, _, variance = oracle.normalize(x, "batch", layer.eps, weight=weight, bias=bias)
    dx = oracle.input_gradient(x, dy, "batch", layer.eps, weight=weight)
    got = [said[name][0][0] for said in ranks]
    close(np.concatenate([rows(step[0]) for step in got]), y, case, 3.0)
    close(np.concatenate([rows(step[1]) for step in got]), dx, case, 6.0)
    if name != "huge":
        n = len(x)
        running = 0.9 + 0.1 * variance * n / (n - 1)
        close(ranks[0][name][2][1], running, case)


def test_one_collective_in_the_forward_and_one_in_the_backward(ranks):
    for found in of(ranks, collectives):
        for first, forward, backward, evaluation in (found["sync"], found["renorm"]):
            assert sum(first.values()) == 1  # what ranks agree on, they do in the store
            assert sum(forward.values()) == 1
            assert sum(backward.values()) == 1
            assert evaluation == {}
        assert sum(found["ghost"].values()) == 1


def test_a_recomputation_sends_nothing(ranks):
    for found in of(ranks, recomputed):
        for counts, distance, batches in found:
            assert sum(counts.values()) == 2
            assert distance < 1e-4
            assert batches == 2


@pytest.mark.parametrize("name", ["batch", "renorm", "ghost"])
def test_compiled_in_one_graph(ranks, name):
    for found in of(ranks, compiled):
        for got, expected in found[name]:
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_second_derivatives_and_functional_gradients(ranks):
    for found in of(ranks, transformed):
        for got, expected in found:
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_many_gradients_at_once_are_refused(ranks):
    for errors in of(ranks, one_gradient_at_a_time):
        for error in errors:
            assert error.startswith("RuntimeError: a synchronized batch norm takes one gradient")


def test_ddp_averages_and_the_weighted_loss_is_the_whole_batchs(ranks):
    found = of(ranks, data_parallel)
    for (averaged, corrected), whole, _, _ in found:
        for name, value in whole.items():
            np.testing.assert_allclose(corrected[name], value, rtol=1e-4, atol=1e-6)
        assert np.abs(averaged["0.weight"] - whole["0.weight"]).max() > 1e-4
    _, _, alone, expected = found[0]
    np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-5)


def test_fully_sharded(ranks):
    for found in of(ranks, sharded):
        for got, expected in found:
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_a_subgroup_merges_its_own_and_a_group_of_one_is_batch_norm_to_the_bit(ranks):
    found = of(ranks, subgroups)
    for rank, (pairs, kept, said) in enumerate(found):
        for got, expected in pairs:
            if rank == 1:
                assert np.array_equal(got, expected)
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert kept
        assert "SyncBatchNorm(5, eps=1e-05" in said
        assert f"rank {rank} isn't in its process_group" in said


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("channels at first", ["rank 0: channels 4, dtype float32", "input has 5 channels"]),
        ("channels", ["rank 1: channels 4, dtype float32", "rank 2: InputError: input has 5"]),
        ("dtype", ["rank 0: dtype float32; rank 1: dtype float32; rank 2: dtype float64"]),
        ("rank", ["rank 2: InputError: expected 4D input (got 2D input) of shape (2, 4)"]),
        ("mask", ["rank 2: TypeError: mask must be a boolean tensor"]),
        ("gradient", ["rank 1: input gradient False; rank 2: input gradient True"]),
        ("momentum", ["rank 1: momentum 0.1; rank 2: momentum None"]),
        ("one value", ["Expected more than 1 value per channel when training, got 1 on all"]),
        ("not alone", ["rank 1: channels 6; rank 2: channels 7"]),
        ("other layers", ["rank 1: channels 4; rank 2: channels 5"]),
    ],
)
def test_what_differs_is_the_same_error_on_every_rank(ranks, name, texts):
    said = [found[name] for found in of(ranks, disagreements)]
    for text in texts:
        assert all(text in one for one in said), said
    if name not in ("momentum", "other layers"):  # whose layers have names of their own
        assert said[0] == said[1] == said[2]
    assert said[0].startswith(
        "RankError: SyncBatchNorm(4" if name != "rank" else "RankError: Batch"
    )


def test_errors_leave_the_ranks_in_step(ranks):
    for found in of(ranks, disagreements):
        for name in ("none", "now free", "free to change", "none at last"):
            assert found[name] == "none"
        assert found["everywhere"].startswith("InputError: SyncBatchNorm(4")


def test_ranks_of_another_history_stay_in_step(ranks):
    for rank, found in enumerate(of(ranks, histories)):
        assert found["copied"] == found["pickled"] == found["none at last"] == "none"
        said = "InputTypeError: GhostBatchNorm(4" if rank == RANKS - 1 else "none"
        assert found["sends nothing"].startswith(said)
        assert "rank 2: InputError: running_mean is on cpu, the input on meta" in found["elsewhere"]
        assert found["batches"] == 1


def test_a_rank_that_stays_away_ends_in_an_error_with_layer_and_rank(ranks):
    forward, backward = of(ranks, absences)[0]
    for said, what in ((forward, "statistics"), (backward, "gradients")):
        assert said.startswith("RuntimeError: SyncBatchNorm(4, eps=1e-05"), said
        assert f"rank 0 of 2 waited for the other ranks' {what}" in said
        assert "Timed out waiting 2000ms" in said


def test_recalibrate_with_uneven_ranks_is_the_same_on_each(ranks):
    found = of(ranks, recalibrated)
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    first = rows(numpy(network()[0](x)))
    for state, kept, _, told in found:
        assert kept
        for name, value in state.items():
            assert np.array_equal(value, found[0][0][name])
        assert state["1.num_batches_tracked"] == told[0]["batches"] == 4
        assert told[:2] == found[0][3][:2]
        np.testing.assert_allclose(state["1.running_mean"], first.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state["1.running_var"], first.var(0, ddof=1), rtol=1e-5)


def test_what_fails_on_one_rank_ends_recalibrate_on_all(ranks):
    for rank, (*_, (_, _, refused, failed)) in enumerate(of(ranks, recalibrated)):
        said = "ToolError: sequential=True reads the loader more than once"
        assert refused.startswith(said if rank == 0 else f"ToolError: rank 0 failed: {said}")
        said = "OSError: its own"
        assert failed == (said if rank == 1 else f"ToolError: rank 1 failed: {said}")


def test_recalibrate_normalizes_synchronized_layers_as_training_does(ranks):
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(3))[:6]
    whole = network()
    normkit.recalibrate(whole, [x[[0, 2, 4]], x[[1, 3, 5]]])
    for _, _, state, _ in of(ranks, recalibrated):
        for index in (1, 4):
            for name in (f"{index}.running_mean", f"{index}.running_var"):
                np.testing.assert_allclose(
                    state[name], numpy(whole.state_dict()[name]), rtol=1e-5, atol=1e-6
                )


def test_standardize_over_ranks_is_the_same_on_each(ranks):
    found = of(ranks, standardized)
    x = torch.randn(9, 3, 4, generator=torch.Generator().manual_seed(4)) * 5 + 1e6
    values = rows(numpy(x))
    for rank, ((mean, std, count), said, fitted, stranger) in enumerate(found):
        assert f"rank {rank} isn't in its process_group" in stranger
        assert np.array_equal(mean, found[0][0][0])
        assert np.array_equal(std, found[0][0][1])
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(std, values.std(0), rtol=1e-9)
        assert (count == 36).all()
        assert "NaN in feature 0, 1, 2" in said
        assert said.startswith("ValueError" if rank == 1 else "RuntimeError: Standardize(3")
        assert fitted == 0


# ---- one process


def test_without_a_process_group_it_is_batch_norm_and_says_so_once():
    normkit.runtime.sync._say_alone.cache_clear()
    x = torch.randn(6, 5, 3)
    layer, plain = normkit.create("sync", 5), normkit.BatchNorm(5)
    with pytest.warns(RuntimeWarning, match="no process group is initialized"):
        y = layer(x)
    assert torch.equal(y, plain(x))
    assert torch.equal(layer(x), plain(x))  # warnings are errors
    for a, b in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


def test_the_layer_is_torchs():
    theirs, ours = nn.SyncBatchNorm(5, 1e-3, momentum=None), SYNC(5, 1e-3, momentum=None)
    assert isinstance(ours, nn.SyncBatchNorm)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert ours.process_group is None
    assert "synchronized=True" in repr(normkit.BatchNorm2d(5).synchronize())
    assert "synchronized" not in repr(normkit.BatchNorm2d(5).synchronize().desynchronize())
    with pytest.raises(RuntimeError, match="always synchronized"):
        ours.desynchronize()
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is SYNC
        assert copied.merge.layer is copied


class Doubled(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_swap_and_convert():
    net = nn.Sequential(
        nn.BatchNorm1d(4),
        nn.SyncBatchNorm(4, 1e-3),
        nn.GroupNorm(2, 4),
        normkit.BatchNorm(4, act="silu"),
        normkit.FrozenBatchNorm(4),
    ).eval()
    tensors = list(net.parameters())
    converted = SYNC.convert_sync_batchnorm(net, "a group")
    assert [type(m) for m in converted] == [SYNC, SYNC, nn.GroupNorm, SYNC, normkit.FrozenBatchNorm]
    assert converted[0].process_group == converted[3].process_group == "a group"
    assert converted[1].eps == 1e-3
    assert converted[3].act == "silu"
    assert not converted[0].training
    assert all(a is b for a, b in zip(tensors, converted.parameters(), strict=True))
    assert converted[0].ranks == (2, 3)
    assert type(SYNC.convert_sync_batchnorm(nn.BatchNorm2d(3))) is SYNC
    ghost = normkit.GhostBatchNorm(4, 2)
    assert SYNC.convert_sync_batchnorm(ghost, "a group") is ghost
    assert ghost.merge.process_group == "a group"
    shared = nn.BatchNorm1d(4)
    twice = SYNC.convert_sync_batchnorm(nn.Sequential(shared, nn.Sequential(shared)))
    assert twice[0] is twice[1][0]
    with pytest.raises(ValueError, match=r"1 is a Doubled with a forward of its own.*swap"):
        SYNC.convert_sync_batchnorm(nn.Sequential(nn.ReLU(), Doubled(4)))
    net = nn.Sequential(nn.SyncBatchNorm(4, process_group="theirs"))
    normkit.swap(net)
    assert type(net[0]) is SYNC
    assert net[0].process_group == "theirs"
    normkit.swap(net, "batch")
    assert type(net[0]) is normkit.BatchNorm
    assert net[0].merge is None
    with pytest.raises(normkit.tools.model.ToolError, match="belongs to to='sync'"):
        normkit.swap(net, "group", process_group="a group")


def test_swap_carries_what_the_calls_set():
    net = nn.Sequential(normkit.BatchNorm2d(4).accumulate(3), nn.BatchNorm1d(4))
    normkit.swap(net, "sync")
    assert net[0].micro_batches == 3
    assert [m.ranks for m in net] == [(4,), (2, 3)]
    normkit.swap(net, "batch")
    assert [type(m) for m in net] == [normkit.BatchNorm2d, normkit.BatchNorm1d]
    assert net[0].micro_batches == 3
    ghost = normkit.GhostBatchNorm(4, 2).synchronize("a group")
    net = nn.Sequential(ghost, nn.SyncBatchNorm(4, process_group="theirs"), normkit.BatchNorm(4))
    for to in ("renorm", "ghost:2"):
        report = normkit.swap(net, to)
        assert [m.merge and m.merge.process_group for m in net] == ["a group", "theirs", None]
        assert ["synchronized" in row.note for row in report.rows] == [True, True, False]
    normkit.swap(net, "batch")
    assert [m.merge for m in net] == [None] * 3


def test_a_torch_whose_ddp_cannot_be_mended_is_warned_of(monkeypatch):
    monkeypatch.delattr(DistributedDataParallel, "_passing_sync_batchnorm_handle")
    with pytest.warns(RuntimeWarning, match="DistributedDataParallel may refuse"):
        normkit.runtime.sync.let_ddp_take(SYNC)


def test_traced_by_fx_or_fused_it_keeps_its_ranks():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), SYNC(4), nn.ReLU())
    graph = torch.fx.symbolic_trace(net)
    assert getattr(graph, "1").merge is net[1].merge
    normkit.swap(net, "sync", fuse=True, example=torch.ones(2, 3, 2, 2))
    assert (type(net[1]), net[1].act, type(net[2])) == (SYNC, "relu", nn.Identity)
    assert net[1].merge is not None
