"""Detours and noise shares: exact on traces whose detours are known one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sigma_noise import detours as dt

TAU = 5e-6


def synthetic(seed, n=20_000, k=300, work=1e-3, jitter=0.99 * TAU):
    """FWQ of n quanta: starts, durations, and the k detours in them: which, how long.

    Quanta abut; the shortest detours are 1 % above tau, the largest jitter 1 % below.
    """
    rng = np.random.default_rng(seed)
    duration = work + rng.uniform(0, jitter, n)
    duration[: n // 10] = work  # more than a twentieth without any: the floor is known to the last bit
    which = np.sort(rng.choice(np.arange(n // 10, n), k, replace=False))
    length = 1.01 * TAU * 10 ** rng.uniform(0, 3, k)
    duration[which] = work + length
    rng.shuffle(order := np.arange(n))
    duration, is_hit = duration[order], np.isin(order, which)
    start = np.concatenate([[0.0], np.cumsum(duration)[:-1]])
    return start, duration, np.flatnonzero(is_hit), duration[is_hit] - work


@pytest.mark.parametrize("seed, k", [(0, 300), (1, 1), (2, 0), (3, 1000)])
def test_every_detour_of_a_synthetic_trace_and_no_other(seed, k):
    """Acceptance test 1: recall and precision of 1, noise share to 1e-9."""
    start, duration, which, length = synthetic(seed, k=k)
    found = dt.fixed_work(start, duration, [0, len(start)], TAU)
    np.testing.assert_array_equal(found.detours.index, which)
    np.testing.assert_allclose(found.detours.length_s, length, rtol=1e-9)
    np.testing.assert_array_equal(found.detours.start_s, start[which])
    window = start[-1] + duration[-1] - start[0]
    work = duration.min()
    assert found.share == pytest.approx((window - work * len(start)) / window, abs=1e-9)
    assert found.burst == pytest.approx(length.sum() / window, abs=1e-9)
    assert found.level == 0
    assert found.total == found.share
    assert found.observed_s == pytest.approx(window, rel=1e-12)
    assert found.per_second == pytest.approx(k / window, rel=1e-12)


def test_level_burst_and_jitter_by_hand():
    """Two segments of 20 quanta, floors 10 and 12, with a detour and a little jitter in each."""
    duration = np.array([10.0] * 18 + [11.0, 17.0] + [12.0] * 18 + [12.5, 22.0])
    start = np.cumsum(duration) - duration
    found = dt.fixed_work(start, duration, [0, 20, 40], 4.0)
    observed = 10 * 18 + 28 + 12 * 18 + 34.5
    assert found.observed_s == observed
    assert found.level * observed == pytest.approx(20 * 2)
    assert found.burst * observed == pytest.approx(7 + 10)
    assert found.jitter * observed == pytest.approx(1 + 0.5)
    assert found.share * observed == pytest.approx(18.5)
    assert found.total * observed == pytest.approx(np.maximum(0, duration - 10).sum())
    np.testing.assert_array_equal(found.detours.index, [19, 39])
    np.testing.assert_array_equal(found.detours.length_s, [7.0, 10.0])
    assert found.longest_s == 10.0
    assert found.quantile_s(0.5) == 8.5
    assert found.by_decade() == {0: pytest.approx(7 / observed), 1: pytest.approx(10 / observed)}


def test_a_faster_clock_for_a_while_is_no_noise_of_the_rest():
    """Defends: one floor for all, where a tenth at turbo clocks turns 900 undisturbed quanta into noise."""
    duration = np.concatenate([np.full(900, 1.0), np.full(100, 0.8)])
    found = dt.fixed_work(np.arange(1000.0), duration, [0, 900, 1000], 0.1)
    assert found.share == 0
    assert found.level == pytest.approx(900 * 0.2 / 980)
    assert len(found.detours) == 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(2, 300), st.integers(1, 4), st.floats(1e-7, 1), st.floats(0.01, 1000)
)
def test_parts_add_up_and_follow_the_unit(seed, n, parts, tau, scale):
    """Defends: samples below their floor counted as level, any part counted twice; thresholds with a unit in them."""
    rng = np.random.default_rng(seed)
    duration = rng.lognormal(0, 1, n)
    start = np.cumsum(duration) - duration
    bounds = np.unique([0, n, *rng.integers(1, n, parts)])
    found = dt.fixed_work(start, duration, bounds, tau)
    lowest = dt.floor(duration, bounds).min()
    want = np.maximum(0, duration - lowest).sum() / duration.sum()
    assert found.level + found.burst + found.jitter == pytest.approx(want, abs=1e-12)
    assert sum(found.by_decade().values()) == pytest.approx(found.burst, abs=1e-12)
    assert min(found.level, found.burst, found.jitter) >= 0

    later = dt.fixed_work(start + 1e6, duration, bounds, tau)
    np.testing.assert_array_equal(later.detours.length_s, found.detours.length_s)
    assert (later.level, later.burst, later.jitter) == (found.level, found.burst, found.jitter)

    scaled = dt.fixed_work(start * scale, duration * scale, bounds, tau * scale)
    np.testing.assert_array_equal(scaled.detours.index, found.detours.index)
    np.testing.assert_allclose(scaled.detours.length_s, found.detours.length_s * scale)
    np.testing.assert_allclose(
        [scaled.level, scaled.burst, scaled.jitter, scaled.per_second],
        [found.level, found.burst, found.jitter, found.per_second / scale],
        atol=1e-12,
    )


def test_floor_is_a_measured_sample_of_its_segment():
    x = np.concatenate([np.arange(100.0), 50 + np.arange(200.0)])
    np.testing.assert_array_equal(dt.floor(x, [0, 100, 300]), np.repeat([4.0, 59.0], [100, 200]))
    np.testing.assert_array_equal(dt.floor(x, [0, 100, 300], 0.95), np.repeat([95.0, 240.0], [100, 200]))


def test_thresholds():
    """Defends: the units of the default thresholds, 1.4826, and a change of level that widens the spread."""
    assert dt.gap_threshold(20e-9) == 1e-6
    assert dt.gap_threshold(200e-9) == pytest.approx(1.8e-6)
    rng = np.random.default_rng(0)
    x = 1e-3 + 1e-5 * rng.normal(size=100_000)
    x[50_000:] += 1e-3
    assert dt.work_threshold(x, [0, 50_000, 100_000]) == pytest.approx(6e-5, rel=0.02)
    assert dt.work_threshold(np.full(10, 1e-3), [0, 10]) == 2e-6


def test_fixed_time_by_hand():
    """Quanta of 1 s: 100 units undisturbed; half of one lost, then a detour of 1.7 s over three, then 8 % of jitter."""
    count = np.full(100, 100.0)
    count[[7, 40, 41, 42, 60]] = [50.0, 70.0, 0.0, 60.0, 92.0]
    start = np.arange(100.0)
    found = dt.fixed_time(start, count, 1.0, [0, 100], 0.1)
    np.testing.assert_array_equal(found.detours.index, [7, 40])
    np.testing.assert_allclose(found.detours.length_s, [0.5, 1.7])
    np.testing.assert_array_equal(found.detours.start_s, [7.0, 40.0])
    assert found.burst == pytest.approx(0.022)
    assert found.jitter == pytest.approx(0.0008)
    assert found.level == 0
    start[41:] += 5  # quanta were skipped: what lies on both sides is not one detour
    np.testing.assert_allclose(
        dt.fixed_time(start, count, 1.0, [0, 100], 0.1).detours.length_s, [0.5, 0.3, 1.4]
    )


def ends_in_cells(chunk_s, quantum_s, n, delays=()):
    """How many of equal chunks end in each of n cells, where (begin, length) are of when nothing went on."""
    ends = chunk_s * np.arange(1, n * quantum_s / chunk_s + 1)
    for begin_s, length_s in delays:
        ends[ends > begin_s] += length_s
    return np.histogram(ends, quantum_s * np.arange(n + 1))[0].astype(float)


@pytest.mark.parametrize("fit", [1.5, 2.02, 4.04, 4.1, 4.5, 4.878, 4.97, 31.4, 300.3])
def test_chunks_that_do_not_fit_a_quantum_are_no_noise(fit):
    """Defends: 205 us of detour in each quantum of 1 ms in which 4 chunks ended, not 5; noise of a quiet GPU."""
    count = ends_in_cells(1e-3 / fit, 1e-3, 4000)
    assert set(count) <= {float(int(fit)), float(int(fit)) + 1}
    for tau_s in (None, 2e-6):
        found = dt.fixed_time(1e-3 * np.arange(4000), count, 1e-3, [0, 4000], tau_s)
        assert (found.level, found.burst, found.jitter, len(found.detours)) == (0, 0, 0, 0)
        assert found.tau_s >= 2e-3 / np.ceil(fit)


def test_a_delay_of_three_chunks_is_found():
    """Defends: a threshold that hides what a count does tell; what was lost, known to a chunk."""
    cells = np.arange(50, 4000, 101)
    for chunk_s in (205e-6, 244e-6, 33e-6):
        delays = [(1e-3 * cell + 1e-5, 3 * chunk_s) for cell in cells]
        count = ends_in_cells(chunk_s, 1e-3, 4000, delays)
        found = dt.fixed_time(1e-3 * np.arange(4000), count, 1e-3, [0, 4000])
        np.testing.assert_array_equal(found.detours.index, cells)
        assert (np.abs(found.detours.length_s / chunk_s - 3) <= 1.1).all(), (
            "a chunk, of which b has no broken part"
        )
        assert found.burst == found.share


@pytest.mark.parametrize("b, tau_s", [(1000.0, 2e-6), (990.0, 2e-6), (501.0, 2e-6), (499.0, 2e-3 / 499)])
def test_chunks_shorter_than_the_least_tau_count_as_they_are(b, tau_s):
    """Defends: a share of 0 where single chunks of 1 us were lost, as a CPU makes them."""
    count = np.full(1000, b)
    count[::10] -= 1
    found = dt.fixed_time(1e-3 * np.arange(1000), count, 1e-3, [0, 1000])
    assert found.share == pytest.approx(0.1 / b if b > 500 else 0.0)
    assert found.tau_s == pytest.approx(tau_s)


def test_fixed_time_with_a_slower_level():
    """total = q (1 - c / best), of which what was taken at the slower level is at that level's speed."""
    count = np.concatenate([np.full(100, 100.0), np.full(100, 80.0)])
    count[150] = 40.0
    found = dt.fixed_time(np.arange(200.0), count, 1.0, [0, 100, 200], 0.1)
    np.testing.assert_allclose(found.detours.length_s, [0.5])
    assert found.burst * 200 == pytest.approx(0.5)
    assert found.level * 200 == pytest.approx(99 * 0.2 + 0.1)
    assert found.total * 200 == pytest.approx((1 - count / 100).sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 200), st.floats(1e-3, 1e3))
def test_fixed_time_parts_add_up(seed, n, quantum):
    rng = np.random.default_rng(seed)
    count = 1000.0 - rng.poisson(20, n) * (1 + 20 * (rng.random(n) < 0.05))
    bounds = np.unique([0, n // 2, n])
    found = dt.fixed_time(np.arange(n) * quantum, count, quantum, bounds, 0.03 * quantum)
    best = dt.floor(count, bounds, 0.95).max()
    is_told = (quantum / best <= dt.MIN_WORK_TAU_S) | (best - count > 1)
    assert found.total == pytest.approx(np.maximum(0, is_told * (1 - count / best)).mean(), abs=1e-12)
    assert found.burst == pytest.approx(found.detours.length_s.sum() / (n * quantum), abs=1e-12)


def test_gaps_of_a_clock_loop():
    """Defends: the window from the first detour to the last (netgauge), thresholds compared with gap - g0."""
    start, gap = np.array([1.0, 2.0, 5.0]), np.array([1e-3, 9e-7, 3e-3])
    found = dt.gaps(start, gap, 20e-9, 10.0)
    assert found.tau_s == 1e-6
    np.testing.assert_array_equal(found.detours.index, [0, 2])
    np.testing.assert_allclose(found.detours.length_s, [1e-3 - 20e-9, 3e-3 - 20e-9])
    assert found.share == pytest.approx((4e-3 - 40e-9) / 10)
    assert found.per_second == 0.2
    assert len(dt.gaps(start[1:2], gap[1:2], 20e-9, 10.0).detours) == 0
    assert len(dt.gaps([1.0], [1.01e-6], 20e-9, 10.0).detours) == 1
    empty = dt.gaps([], [], 20e-9, 10.0)
    assert empty.share == 0
    assert np.isnan(empty.longest_s)
    assert empty.by_decade() == {}


def test_ccdf_and_decades():
    x, p = dt.ccdf([3.0, 1.0, 3.0, 2.0])
    np.testing.assert_array_equal(x, [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(p, [1.0, 0.75, 0.5])
    assert len(dt.ccdf([])[0]) == 0
    lengths = np.array([1e-6, 9.99e-6, 1e-5, 1e-3, 9.999999999e-4, 1.0, 0.1, 1e-4])
    found = dt.Noise(0, 0, 0, 1.0, 1e-7, dt.Detours(lengths, lengths, np.arange(8))).by_decade()
    assert list(found) == [-6, -5, -4, -3, -1, 0]
    assert found[-6] == pytest.approx(1.099e-5)
    assert found[-4] == pytest.approx(1e-4 + 9.999999999e-4)
    assert found[-3] == 1e-3


def test_wrong_arguments():
    x = np.ones(10)
    with pytest.raises(ValueError, match=r"bounds must rise from 0 to 10, found \[0, 9\]"):
        dt.fixed_work(x, x, [0, 9])
    with pytest.raises(ValueError, match="duration_s must have the 3 samples of start_s, found 10"):
        dt.find(x[:3], x, 1.0, 1.0)
    with pytest.raises(ValueError, match="tau_s must be positive, found 0"):
        dt.find(x, x, 1.0, 0.0)
    with pytest.raises(ValueError, match="duration_s must not be negative"):
        dt.fixed_work(x, -x, [0, 10])
    with pytest.raises(ValueError, match="quantum_s must be positive and count not negative, found 0"):
        dt.fixed_time(x, x, 0, [0, 10])
    with pytest.raises(ValueError, match="count must be positive in more than a twentieth"):
        dt.fixed_time(x, 0 * x, 1.0, [0, 10])
    with pytest.raises(ValueError, match="window_s hold all gaps"):
        dt.gaps(x, x, 1e-8, 5.0)
