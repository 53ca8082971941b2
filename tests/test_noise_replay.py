"""Replay of detour traces against a loop that walks through them, and pools against what they stand for."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sigma_noise.correlation import correlation_factor, independent_max
from sigma_noise.pool import CoscheduledPool, Pool
from sigma_noise.replay import Detours, replay, replayed_windows, spread_offsets

FRESH = int(os.environ.get("SIGMA_FRESH_SEED", "0"))


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed + FRESH)


def trace(rng, rate: float, length: float, duration: float = 60.0) -> Detours:
    """Detours at random instants, `rate` a second, of exponential length."""
    n = rng.poisson(rate * duration)
    lengths = np.minimum(rng.exponential(length, n), 20 * length)
    return Detours.of(rng.random(n) * (duration - 20 * length), lengths, duration)


def walked(detours: Detours, offset: float, work: float) -> float:
    """How long `work` takes from `offset`: from edge to edge of the detours, around the circle."""
    edges = sorted([0.0, *detours.start_s, *(detours.start_s + detours.length_s), detours.duration_s])
    now, elapsed, left = offset, 0.0, work
    while True:
        upper = next((e for e in edges if e > now), None)
        if upper is None:
            now = 0.0
            continue
        middle = (now + upper) / 2
        is_lost = np.any((detours.start_s < middle) & (middle < detours.start_s + detours.length_s))
        if not is_lost and left <= upper - now:
            return elapsed + left
        left -= 0.0 if is_lost else upper - now
        elapsed += upper - now
        now = upper


@settings(max_examples=100, deadline=None, derandomize=not FRESH)
@given(
    pieces=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=8),
    offset=st.integers(0, 199),
    work=st.integers(1, 400),
)
def test_a_window_is_as_long_as_a_walk_through_the_trace(pieces, offset, work):
    """Defends: windows that do not grow by what they absorb, a detour entered half-way, several turns of the circle.

    Offset and work in odd eighths, detours in halves, so that no edge is met exactly.
    """
    starts, lengths = (np.array([p[i] / 2 for p in pieces]) for i in (0, 1))
    detours = Detours.of(starts, lengths, 25.0)
    begin, todo = offset / 8 + 1 / 16, work / 8 + 1 / 64
    assert float(detours.window(np.array([begin]), todo)[0]) == pytest.approx(
        walked(detours, begin, todo), rel=1e-12
    )


def test_detours_that_overlap_are_one():
    """Defends: noise counted twice."""
    detours = Detours.of([5, 1, 2, 3, 9], [1, 2, 0.5, 1, 1], 10)
    assert detours.start_s.tolist() == [1, 5, 9]
    assert detours.length_s.tolist() == [3, 1, 1]
    assert detours.noise == 0.5
    quiet = Detours.of([], [], 10)
    assert quiet.window(np.array([0.0, 9.9]), 25.0).tolist() == [25.0, 25.0]


@pytest.mark.parametrize(
    "start, length, text",
    [
        ([1], [-1], "within 0..10"),
        ([9.5], [1], "within 0..10"),
        ([0], [10], "no time for work"),
        ([1, 2], [1], "shapes"),
    ],
)
def test_detours_refuse(start, length, text):
    with pytest.raises(ValueError, match=text):
        Detours.of(start, length, 10)


def test_the_window_grows_by_what_it_absorbs():
    """Defends: LogGOPSim's fixed window.  Half of the time is noise, so W of work takes 2 W; a fixed one says 1.5 W."""
    dense = Detours.of(np.arange(1000) * 0.01, np.full(1000, 0.005), 10.0)
    window = replay([[dense]], 1.0, 1, 200, seed=FRESH)
    assert window.mean() == pytest.approx(2.0, rel=0.01)


def test_same_seed_same_bytes_and_cosched_is_never_longer():
    """Acceptance 15.  Defends: seeds from the clock; a common offset that is drawn for each host anew."""
    rng = rng_of(70)
    hosts = [[trace(rng, 5.0, 2e-3)] for _ in range(8)]
    for N in (2, 8, 64, 1000):
        drawn = [replay(hosts, 0.05, N, 300, seed=5, is_cosched=c) for c in (False, True)]
        again = [replay(hosts, 0.05, N, 300, seed=5, is_cosched=c) for c in (False, True)]
        assert [d.tobytes() for d in drawn] == [d.tobytes() for d in again]
        error = np.sqrt((drawn[0].var() + drawn[1].var()) / 300)
        assert drawn[1].mean() <= drawn[0].mean() + 4 * error
        if N >= 64:  # eight hosts have no more than eight windows
            assert drawn[1].mean() < drawn[0].mean() - 4 * error
        assert replay(hosts, 0.05, N, 300, seed=6).tobytes() != drawn[0].tobytes()
    offsets = spread_offsets(hosts, 0.05, rng_of(71))
    pool = Pool(tuple(replayed_windows(hosts, 0.05, offsets)))
    ranks = [1, 2, 8, 64, 1000, 16384]
    apart, together = pool.expected(ranks)[0], CoscheduledPool(pool.hosts).expected(ranks)[0]
    assert np.all(together <= apart)
    assert together[0] == apart[0]
    assert together[-1] == pytest.approx(np.stack(pool.longest).max(0).mean())  # all hosts, and no more


def test_drawn_replay_has_the_computed_mean():
    """Defends: partial hosts, hosts drawn with the wrong chance, E[max_N] of a pool that is not that of N draws.

    Hosts of 4 ranks, one of which is much noisier than its neighbours.
    """
    rng = rng_of(72)
    hosts = [[trace(rng, rate, 3e-3) for rate in (1, 2, 4, 20 + 10 * h)] for h in range(3)]
    offsets = spread_offsets(hosts, 0.05, rng_of(73))
    pool = Pool(tuple(replayed_windows(hosts, 0.05, offsets)))
    together = CoscheduledPool(pool.hosts)
    for N in (1, 2, 4, 8, 64):
        for computed, is_cosched in ((pool, False), (together, True)):
            drawn = replay(hosts, 0.05, N, 4000, seed=7 + FRESH, is_cosched=is_cosched)
            error = drawn.std() / np.sqrt(len(drawn))
            assert abs(drawn.mean() - computed.expected([N])[0, 0]) < 4 * error + 1e-12, (N, is_cosched)


def test_a_partial_host_sends_as_many_ranks_as_are_left():
    """Defends: 5 ranks on hosts of 4 taken for 8.  Each rank of a host is late in a quarter of time of its own."""
    ranks = [Detours.of([10.0 * r], [4.0], 40.0) for r in range(4)]
    late = replay([ranks], 1.0, 5, 20_000, seed=FRESH)
    whole = replay([ranks], 1.0, 4, 20_000, seed=FRESH)
    chance = 5 / 40  # that a window of 1 s meets a detour of 4 s
    assert np.mean(whole > 1) == pytest.approx(4 * chance, abs=0.015)
    assert np.mean(late > 1) == pytest.approx(1 - (1 - 4 * chance) * (1 - chance), abs=0.015)


def test_16384_ranks_and_hundreds_of_windows():
    """Defends: batches of windows whose seams repeat or leave out a draw."""
    rng = rng_of(74)
    hosts = [[trace(rng, 50.0, 1e-3, 1000.0)] for _ in range(4)]
    drawn = replay(hosts, 0.01, 16384, 100, seed=FRESH)  # 64 windows, then 36
    assert len(np.unique(drawn)) > 40
    assert np.sum(drawn[:36] == drawn[64:]) < 9
    pool = Pool(tuple(replayed_windows(hosts, 0.01, spread_offsets(hosts, 0.01, rng_of(75), most=1 << 18))))
    error = drawn.std() / 10
    assert abs(drawn.mean() - pool.expected([16384])[0, 0]) < 4 * error + 0.01 * drawn.mean()


def test_replay_refuses():
    quiet = Detours.of([], [], 1.0)
    with pytest.raises(ValueError, match="same number of ranks, found \\[1, 2\\]"):
        replay([[quiet], [quiet, quiet]], 0.1, 4, 4, seed=0)
    with pytest.raises(ValueError, match="work_s must be positive"):
        replay([[quiet]], 0.0, 4, 4, seed=0)
    with pytest.raises(ValueError, match="ranks and windows"):
        replay([[quiet]], 0.1, 0, 4, seed=0)


def test_correlation_factor():
    """Defends: kappa over the mean instead of over what independence would cost; ranks of unlike noise."""
    rng = rng_of(76)
    apart = rng.exponential(size=(8, 20_000)) * np.linspace(1, 3, 8)[:, None]
    shuffled = rng.permuted(apart, axis=1).max(0)
    assert independent_max(apart) == pytest.approx(shuffled.mean(), abs=4 * shuffled.std() / np.sqrt(20_000))
    assert correlation_factor(apart) == pytest.approx(1.0, abs=0.03)
    assert correlation_factor(np.repeat(apart[:1], 8, axis=0)) == pytest.approx(0.0, abs=1e-9)
    pairs = np.repeat(apart[::2], 2, axis=0)
    assert 0.4 < correlation_factor(pairs) < 0.9
    assert np.isnan(correlation_factor(np.ones((4, 50))))
    exact = independent_max([[1.0, 2.0], [0.0, 3.0]])
    assert exact == pytest.approx((1 + 2 + 3 + 3) / 4)
