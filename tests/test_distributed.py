"""Expert parallelism on two and four ranks over gloo: what tests/ranks.py asserts on every one of them."""

import math
import re

import forked
import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st

import sigma_kernels as sk
from sigma_kernels.distributed import balanced_placement, rank_load

CHECKS = {  # by ranks; those of a number share its processes, whose start takes longer than they do
    2: ("layer", "crowded", "chunks", "payloads", "placed", "moved", "refused"),
    4: ("layer", "order", "visits", "limited", "placed", "group_of_two"),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", CHECKS)
def test_on_ranks(tmp_path, size):
    forked.spawn(ranks.run, (CHECKS[size], size, str(tmp_path / "store")), size)


@pytest.mark.parametrize("gain", [-1, math.nan, "x", True, False])
def test_a_gain_that_is_none_is_refused(gain):
    message = f"balanced_placement: gain must be a number of at least 0, found {gain!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        balanced_placement(torch.ones(4), 2, gain=gain)


def test_without_a_process_group_it_says_so():
    routing = sk.route(torch.randn(4, 8))
    for call in (
        lambda: sk.distributed.dispatch(torch.randn(4, 8), routing),
        lambda: sk.distributed.ExpertParallelMoE(16, 8, 4),
    ):
        with pytest.raises(
            RuntimeError, match=r"no process group; call torch\.distributed\.init_process_group"
        ):
            call()


loads = st.integers(1, 6).flatmap(
    lambda ranks: st.integers(1, 6).flatmap(
        lambda each: st.tuples(
            st.just(ranks),
            st.lists(st.integers(0, 1 << 40), min_size=ranks * each, max_size=ranks * each),
            st.permutations(range(ranks * each)),
        )
    )
)


@given(loads, st.sampled_from([0.0, 0.01, 0.5]))
def test_a_balanced_placement_is_one_and_never_the_worse(case, gain):
    """Defends: a place twice; more load on the busiest rank than before; experts that move though nothing is gained."""
    ranks, load, former = case[0], torch.tensor(case[1]), torch.tensor(case[2])
    for now in (None, former):
        new = balanced_placement(load, ranks, now, gain)
        assert sorted(new.tolist()) == list(range(len(load)))
        after = rank_load(load, ranks, new)
        assert after.sum() == load.sum()
        before = rank_load(load, ranks, now)
        has_won = int(before.max() - after.max()) > gain * sum(case[1]) / ranks
        assert has_won or torch.equal(new, torch.arange(len(load)) if now is None else now)
        size = len(load) // ranks
        lightest = load.sort().values[: size - 1].sum()
        assert after.max() >= max(load.max() + lightest, load.sum() / ranks)
        if now is not None:  # who stays on a rank stays where it is
            assert torch.equal(new[now // size == new // size], now[now // size == new // size])
        assert torch.equal(balanced_placement(load, ranks, new, gain), new)


def test_a_hot_half_is_spread():
    """Known by hand: 8 and 1 go together, as do 7 and 2; ranks are those that hold most of the group."""
    load = torch.tensor([7, 8, 2, 1])
    assert rank_load(load, 2).tolist() == [15, 3]
    new = balanced_placement(load, 2)
    assert new.tolist() == [3, 1, 2, 0]
    assert rank_load(load, 2, new).tolist() == [9, 9]


WRONG_LOADS = [
    ((torch.ones(4, 1), 2), "load must be [E], found [4, 1]"),
    ((torch.tensor([1.0, float("nan")]), 2), "load must be numbers of at least 0, found nan at expert 1"),
    ((torch.tensor([1, -1]), 2), "load must be numbers of at least 0, found -1 at expert 1"),
    ((torch.ones(4), 0), "ranks must be at least 1, found 0"),
    ((torch.ones(4), 3), "the number of experts must be a multiple of the 3 ranks, found E=4"),
    ((torch.ones(2), 2, torch.tensor([0, 2])), "in 0..1, found 2 at expert 1"),
]


WRONG_TYPES = [
    (([1, 2], 2), "load must be a Tensor, found list"),
    ((torch.ones(2, dtype=torch.complex64), 2), "load must be real numbers, found torch.complex64 on cpu"),
    ((torch.ones(2, device="meta"), 2), "load must be real numbers, found torch.float32 on meta"),
    ((torch.ones(2), 1.5), "ranks must be an integer, found 1.5"),
    ((torch.ones(2), True), "ranks must be an integer, found True"),
    ((torch.ones(2), torch.tensor(2.0)), "ranks must be an integer, found a Tensor [] of torch.float32"),
    ((torch.ones(2), 2, [0, 1]), "placement must be a Tensor, found list"),
    ((torch.ones(2), 2, torch.ones(2)), "placement must be int32 or int64, found torch.float32"),
]


@pytest.mark.parametrize("function", [balanced_placement, rank_load])
@pytest.mark.parametrize("arguments, told", WRONG_TYPES, ids=[told for _, told in WRONG_TYPES])
def test_what_is_no_load_is_refused(function, arguments, told):
    with pytest.raises(TypeError, match=re.escape(f"{function.__name__}: {told}")):
        function(*arguments)


@pytest.mark.parametrize("function", [balanced_placement, rank_load])
@pytest.mark.parametrize("arguments, told", WRONG_LOADS, ids=[told for _, told in WRONG_LOADS])
def test_a_load_that_is_none_is_refused(function, arguments, told):
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    assert str(caught.value).startswith(f"{function.__name__}: ")
    assert told in str(caught.value)
