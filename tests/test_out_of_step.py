"""Ranks that do different things with a synchronized layer: each that waits gets a named error.

Each case has a process group of its own, since an error leaves its ranks out of step.
"""

import datetime

import pytest
import torch
import torch.distributed as dist

import normkit
from ranks import on_ranks

X = torch.arange(8.0).reshape(2, 4) ** 2


def error_of(function, *args):
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def new(group, channels=4, kind=normkit.SyncBatchNorm):
    return kind(channels, process_group=group)


def used(group, channels=4, kind=normkit.SyncBatchNorm):
    layer = new(group, channels, kind)
    layer(torch.ones(2, channels))
    return layer


class FailsLate(normkit.SyncBatchNorm):
    """Fails on one rank when it has exchanged statistics with the other."""

    fails = False

    def _formula(self):
        function, own = super()._formula()

        def late(*args, **kwargs):
            y = function(*args, **kwargs)
            if self.fails:
                raise MemoryError("no room for the output")
            return y

        return late, own


# ---- what two ranks do; each returns its error


def new_beside_used(rank, group):
    layer = used(group)
    return error_of(layer if rank else new(group), X)


def new_of_other_channels_beside_used(rank, group):
    layer = used(group)
    return error_of(layer, X) if rank else error_of(new(group, 3), X[:, :3])


def new_beside_a_backward(rank, group):
    y = used(group)(X.clone().requires_grad_())
    return error_of(y.sum().backward) if rank else error_of(new(group), X)


def no_memory_for_statistics(rank, group):
    huge = torch.empty(1).expand(1 << 44, 4)
    return error_of(used(group), huge if rank else X)


def no_memory_in_a_first_call(rank, group):
    huge = torch.empty(1).expand(1 << 44, 4)
    return error_of(new(group), huge if rank else X)


def late_beside_another_layer(rank, group):
    first, second = used(group, kind=FailsLate), used(group, 7)
    first.fails = rank == 1
    said = error_of(first, X)
    return said if rank else error_of(second, torch.ones(2, 7))


def late_beside_a_backward(rank, group):
    layer = used(group, kind=FailsLate)
    layer.fails = rank == 1
    x = X.clone().requires_grad_()
    return error_of(layer, x) if rank else error_of(lambda: layer(x).sum().backward())


def evaluation(rank, group):
    return error_of(used(group).train(rank == 0), X)


def frozen(rank, group):
    layer = used(group)
    return error_of(layer.freeze() if rank else layer, X)


def evaluation_beside_a_first_call(rank, group):
    return error_of(new(group).train(rank == 0), X)


def compiled(layer):
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


def compiled_beside_eager(rank, group):
    layer = new(group)
    return error_of(compiled(layer) if rank else layer, X)


def compiled_later_on_one_rank(rank, group):
    layer = used(group)
    return error_of(compiled(layer) if rank else layer, X)


def compiled_and_eager_by_turns(rank, group):
    layer = new(group)
    runs = (layer, compiled(layer), layer, compiled(layer))
    return [
        error_of(lambda run=run: run(X.clone().requires_grad_()).sum().backward()) for run in runs
    ]


CASES = (
    *(new_beside_used, new_of_other_channels_beside_used, new_beside_a_backward),
    *(no_memory_for_statistics, no_memory_in_a_first_call),
    *(late_beside_another_layer, late_beside_a_backward),
    *(evaluation, frozen, evaluation_beside_a_first_call),
    *(compiled_beside_eager, compiled_later_on_one_rank, compiled_and_eager_by_turns),
)


def everything(rank):
    torch.manual_seed(0)
    found, short = {}, datetime.timedelta(seconds=2)
    for case in CASES:
        ends = short if "evaluation" in case.__name__ or case is frozen else None
        found[case.__name__] = case(rank, dist.new_group([0, 1], timeout=ends))
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def ranks():
    got = on_ranks(everything)
    assert all(isinstance(said, dict) for said in got.values()), got
    return [got[rank] for rank in (0, 1)]


def test_a_new_layer_and_a_used_one_of_the_same_channels_fit(ranks):
    assert [found["new_beside_used"] for found in ranks] == ["none", "none"]


@pytest.mark.parametrize(
    ("case", "texts"),
    [
        (
            "new_of_other_channels_beside_used",
            ["rank 0: channels 3, dtype float32; rank 1: statistics of 4 channels"],
        ),
        ("new_beside_a_backward", ["rank 0: channels 4", "rank 1: gradients"]),
        ("compiled_beside_eager", ["rank 0: channels 4", "rank 1: compiled statistics of 4"]),
        ("compiled_later_on_one_rank", ["rank 0: statistics of 4", "rank 1: compiled statistics"]),
        ("no_memory_for_statistics", ["rank 1: RuntimeError", "can't allocate memory"]),
        ("no_memory_in_a_first_call", ["rank 1: RuntimeError", "can't allocate memory"]),
    ],
)
def test_what_does_not_fit_is_a_named_error_on_both_ranks(ranks, case, texts):
    for found in ranks:
        assert found[case].startswith("RankError: SyncBatchNorm("), found[case]
        assert all(text in found[case] for text in texts), found[case]


@pytest.mark.parametrize("case", ["late_beside_another_layer", "late_beside_a_backward"])
def test_a_failure_behind_the_exchange_ends_the_others_next_wait(ranks, case):
    waiting, failing = (found[case] for found in ranks)
    assert failing == "MemoryError: no room for the output"
    layer = "SyncBatchNorm(7" if "another" in case else "FailsLate(4"
    assert waiting.startswith(f"RankError: {layer}")
    assert "got rank 1: MemoryError: no room for the output" in waiting


@pytest.mark.parametrize("case", ["evaluation", "frozen", "evaluation_beside_a_first_call"])
def test_who_waits_for_a_rank_in_evaluation_is_told_so(ranks, case):
    waiting, other = (found[case] for found in ranks)
    assert other == "none"
    assert waiting.startswith("RuntimeError: SyncBatchNorm(4")
    assert "rank 0 of 2 waited for the other ranks'" in waiting
    assert "rank 1 called one in evaluation, or frozen" in waiting


def test_all_ranks_may_compile_and_go_back_together(ranks):
    for found in ranks:
        assert found["compiled_and_eager_by_turns"] == ["none"] * 4
