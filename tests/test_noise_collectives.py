"""Collectives split into local, wait and transfer: the rank that all wait for is named, which its own collective
time hides."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sigma_noise.collectives import NOBODY, split
from sigma_noise.links import Finding, links
from sigma_noise.scores import score

FRESH = int(os.environ.get("SIGMA_FRESH_SEED", "0"))
MS = 1_000_000


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed + FRESH)


def barriers(rng, ranks: int, n: int, late: int | None = None, delay_ns: int = 0, begin_ns: int = 10**15):
    """Stamps of n all-reduces of 2 ms after 10 ms of work, +-1 %; `late` works longer and all end together."""
    arrival, end = np.zeros((2, ranks, n), np.int64)
    now = np.full(ranks, begin_ns)
    for t in range(n):
        work = (10 * MS * (1 + 0.01 * rng.standard_normal(ranks))).astype(np.int64)
        if late is not None:
            work[late] += delay_ns
        arrival[:, t] = now + work
        end[:, t] = arrival[:, t].max() + 2 * MS + rng.integers(0, 20_000, ranks)
        now = end[:, t]
    return arrival, end


def test_the_culprit_has_the_shortest_collective_time():
    """Test 14 without processes: four ranks, the third sleeps before each all-reduce.

    Local time and "arrived last" name rank 2.  A ranking by collective time names another, and rank 2 as the best.
    """
    arrival, end = barriers(generator(1), 4, 400, late=2, delay_ns=5 * MS)
    parts = split(arrival, end)
    scores = score(parts.local_s)
    assert scores.flagged == [2]
    assert scores.ranks[0].rank == 2
    assert scores.pattern == "recurs"
    assert parts.times_last.argmax() == 2
    assert parts.times_last[2] == 399
    assert parts.caused_wait_s.argmax() == 2
    by_collective_time = score(parts.collective_s, spread=0.05)
    assert by_collective_time.ranks[0].rank != 2
    assert parts.collective_s.mean(axis=1).argmin() == 2
    assert min(by_collective_time.ranks, key=lambda r: -r.location).rank == 2
    steps = parts.local_s + parts.collective_s
    assert (
        steps.mean(axis=1).max() < 1.0001 * steps.mean(axis=1).min()
    )  # and the step time shows nothing at all


def test_split_by_hand():
    arrival = [[100, 1100, 2100], [300, 1000, 2500]]
    end = [[350, 1150, 2600], [340, 1160, 2620]]
    parts = split(arrival, end, begin_ns=[0, 50])
    ns = 1e-9
    np.testing.assert_allclose(parts.local_s, ns * np.array([[100, 750, 950], [250, 660, 1340]]))
    np.testing.assert_allclose(parts.wait_s, ns * np.array([[200, 0, 400], [0, 100, 0]]))
    np.testing.assert_allclose(parts.transfer_s, ns * np.array([[50, 50, 100], [40, 60, 120]]))
    np.testing.assert_allclose(parts.collective_s, parts.wait_s + parts.transfer_s)
    assert parts.last.tolist() == [1, 0, 1]
    assert parts.times_last.tolist() == [1, 2]
    np.testing.assert_allclose(parts.caused_wait_s, ns * np.array([100, 600]))
    assert (parts.undecided, parts.impossible, parts.unmatched) == (0, 0, 0)
    without_begin = split(arrival, end)
    np.testing.assert_array_equal(without_begin.local_s, parts.local_s[:, 1:])
    assert without_begin.step.tolist() == [1, 2]
    assert split(arrival, end, most=1).step.tolist() == [2]
    np.testing.assert_array_equal(split(arrival, end, most=1).local_s, parts.local_s[:, 2:])


def test_ranks_that_lack_the_last_steps():
    arrival, end = barriers(generator(2), 3, 20)
    lengths = [20, 17, 19]
    short = split(
        [a[:n] for a, n in zip(arrival, lengths, strict=True)],
        [e[:n] for e, n in zip(end, lengths, strict=True)],
    )
    whole = split(arrival[:, :17], end[:, :17])
    assert (short.unmatched, whole.unmatched) == (3, 0)
    np.testing.assert_array_equal(short.local_s, whole.local_s)
    np.testing.assert_array_equal(short.wait_s, whole.wait_s)
    np.testing.assert_array_equal(short.transfer_s, whole.transfer_s)


def test_arrivals_closer_than_the_clocks_have_no_order():
    arrival = np.array([[1000, 5000, 9000], [1090, 5110, 9110], [900, 4900, 9000]])
    end = np.full((3, 3), [2000, 6000, 10000])
    sharp = split(arrival, end, begin_ns=0)
    blunt = split(arrival, end, begin_ns=0, residual_ns=[50, 50, 50])
    assert sharp.last.tolist() == [1, 1, 1]
    assert blunt.last.tolist() == [NOBODY, 1, 1]
    assert blunt.undecided == 1
    assert blunt.times_last.tolist() == [0, 2, 0]
    assert split(arrival, end, begin_ns=0, residual_ns=[0, 50, 60]).last.tolist() == [1, 1, NOBODY]
    assert split(arrival, end, begin_ns=0, residual_ns=[0, 50, 59]).last.tolist() == [1, 1, 1]  # by one ns


def test_clocks_that_are_apart_do_not_make_a_culprit():
    """Defends: offsets added instead of taken off; local time, which one clock measures, taken from two."""
    rng = generator(3)
    arrival, end = barriers(rng, 4, 300, late=1, delay_ns=3 * MS)
    offset = np.array([0, -40 * MS, 7 * MS, 90 * MS])
    drift = (arrival * 1e-6).astype(np.int64)  # a part in a million
    shown = [offset[:, None] + drift, offset[:, None] + (end * 1e-6).astype(np.int64)]
    true = split(arrival, end)
    mended = split(arrival + shown[0], end + shown[1], offset_ns=shown[0], residual_ns=20_000)
    np.testing.assert_allclose(mended.wait_s, true.wait_s, atol=1e-12)
    np.testing.assert_allclose(mended.local_s, true.local_s, atol=1e-7)
    assert mended.times_last.argmax() == 1
    constant = split(arrival + offset[:, None], end + offset[:, None], offset_ns=offset)
    np.testing.assert_array_equal(constant.wait_s, true.wait_s)
    np.testing.assert_array_equal(constant.local_s, true.local_s)
    with pytest.raises(ValueError, match=r"one that does in 299 of 299 steps; .*clocks"):
        split(arrival + offset[:, None], end + offset[:, None])


def test_an_impossible_step_is_left_out():
    arrival, end = barriers(generator(4), 3, 10, late=1, delay_ns=5 * MS)
    end[0, 4] = arrival[1, 4] - 1000
    parts = split(arrival, end)
    assert parts.impossible == 1
    assert parts.step.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    assert split(arrival, end, residual_ns=600).impossible == 0  # within what the clocks may be off


@given(st.integers(2, 6), st.integers(2, 30), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_parts_are_the_whole_and_ranks_may_change_places(ranks, n, seed):
    rng = np.random.default_rng(seed)
    arrival, end = barriers(rng, ranks, n)
    parts = split(arrival, end)
    span = (end[:, -1] - end[:, 0]) * 1e-9
    np.testing.assert_allclose(
        (parts.local_s + parts.wait_s + parts.transfer_s).sum(axis=1), span, atol=1e-12
    )
    assert parts.wait_s.min(axis=0).max() == 0.0
    assert parts.times_last.sum() + parts.undecided == n - 1
    order = rng.permutation(ranks)
    moved = split(arrival[order], end[order])
    np.testing.assert_array_equal(moved.wait_s, parts.wait_s[order])
    np.testing.assert_array_equal(moved.times_last, parts.times_last[order])


@pytest.mark.parametrize(
    "arrival, end, options, message",
    [
        ([[1, 2]], [[2, 3]], {}, r"2 or more ranks and steps, found \[2\] and \[2\]"),
        ([[1, 2], [1, 2]], [[2, 3], [2]], {}, r"found \[2, 2\] and \[2, 1\] steps"),
        ([[1], [1]], [[2], [2]], {}, "2 steps that all ranks made are needed, found 1"),
        ([[1.0, 2.0]] * 2, [[2, 3]] * 2, {}, "integer ns for each rank, found float64"),
        ([[1, 2]] * 2, [[3, 4]] * 2, {}, "must rise, found end 3, arrival 2, end 4 at step 1 of rank 0"),
        ([[1, 4]] * 2, [[3, 5]] * 2, {"residual_ns": [1, 2, 3]}, r"residual_ns must be a number for each of 2 ranks"),
        ([[1, 4]] * 2, [[3, 5]] * 2, {"begin_ns": 2}, "found end 2, arrival 1"),
        ([[1, 4], [9, 12]], [[3, 5], [10, 13]], {}, "one that does in 1 of 1 steps"),
    ],
)  # fmt: skip
def test_wrong_stamps(arrival, end, options, message):
    with pytest.raises(ValueError, match=message):
        split(arrival, end, **options)


# Links.


def waits(rng, ranks: int, scatter: float = 0.05):
    return 1e-4 * np.exp(scatter * rng.standard_normal((ranks, ranks)))


@pytest.mark.parametrize("ranks", [4, 8, 16])
@pytest.mark.parametrize("kind", ["source", "destination", "path"])
def test_a_slow_link_is_named(ranks, kind):
    rng = generator(20)
    named = 0
    for _ in range(100):
        w = waits(rng, ranks)
        where = {"source": np.s_[2], "destination": np.s_[:, 2], "path": np.s_[1, 2]}[kind]
        w[where] *= 4.0 if kind == "path" else 2.0
        found = links(w).findings
        want = {"source": (2, None), "destination": (None, 2), "path": (1, 2)}[kind]
        named += [(f.kind, f.source, f.destination) for f in found] == [(kind, *want)]
    assert named >= 95


@pytest.mark.parametrize("scatter", [0.05, 0.3])
@pytest.mark.parametrize("ranks, runs", [(4, 400), (8, 400), (32, 100)])
def test_equal_links_raise_no_alarm(ranks, runs, scatter):
    rng = generator(21)
    assert sum(bool(links(waits(rng, ranks, scatter)).findings) for _ in range(runs)) <= 0.02 * runs


def test_means_of_rows_and_columns_would_blame_the_ends_of_a_slow_path():
    """Why medians: one path 20 times as slow makes means of its row and column 3.7 of the usual."""
    w = np.ones((8, 8))
    w[1, 2] = 20.0
    off = w.copy()
    np.fill_diagonal(off, np.nan)
    means = np.nanmean(off, axis=1)
    assert means[1] / np.median(means) == pytest.approx(26 / 7)
    found = links(w)
    assert found.findings == (Finding("path", 1, 2, pytest.approx(20.0)),)
    np.testing.assert_allclose(found.source, 1.0)
    np.testing.assert_allclose(found.destination, 1.0)


def test_what_links_explain():
    """Rows, columns and cells multiply to the waits; the diagonal and pairs that send nothing are passed over."""
    w = waits(generator(22), 6)
    w[3] *= 3.0
    w[:, 5] *= 2.0
    w[0, 1] = np.nan
    np.fill_diagonal(w, 0.0)
    found = links(w)
    product = found.usual_s * found.source[:, None] * found.destination * found.path
    known = ~np.isnan(found.path)
    assert known.sum() == 29
    np.testing.assert_allclose(product[known], w[known])
    assert [f.kind for f in found.findings] == ["source", "destination"]
    assert found.findings[0].ratio == pytest.approx(3.0, rel=0.1)
    assert found.findings[1].ratio == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(
    "wait, message",
    [
        (np.ones((3, 3)), r"\[P, P\] of 4 or more ranks, found shape \(3, 3\)"),
        (np.ones((4, 5)), r"found shape \(4, 5\)"),
        (np.full((4, 4), -1.0), "above 0 and finite, and some of each rank, found -1.0"),
        (np.where(np.arange(4) == 2, np.nan, np.ones((4, 4))), "found none of rank 2"),
    ],
)
def test_wrong_waits(wait, message):
    with pytest.raises(ValueError, match=message):
        links(wait)
