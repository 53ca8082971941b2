"""Scores of ranks: who is named, who is not, and against what a score of medians stays blind."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from scipy.stats import binom
from sigma_noise.flags import contest, flag
from sigma_noise.losses import Losses
from sigma_noise.outliers import cut, robust_z
from sigma_noise.scores import SPREAD, score

FRESH = int(os.environ.get("SIGMA_FRESH_SEED", "0"))


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed + FRESH)


def most(runs: int, rate: float) -> float:
    """Of `runs`, at a fixed seed what the rate says; at fresh ones what once in 1,000 is passed at that rate."""
    return binom.isf(1e-3, runs, rate) if FRESH else rate * runs


def correlated(rng, shape, phi: float):
    """Unit AR(1) series along the last axis, stationary from the start."""
    noise = rng.standard_normal(shape)
    noise[..., 0] /= np.sqrt(1.0 - phi**2)
    return lfilter([np.sqrt(1.0 - phi**2)], [1.0, -phi], noise, axis=-1)


def steps(rng, ranks: int, n: int, sigma: float = 0.01, phi: float = 0.0):
    """Lognormal steps of a millisecond, [P, n]."""
    x = correlated(rng, (ranks, n), phi) if phi else rng.standard_normal((ranks, n))
    return 1e-3 * np.exp(sigma * x)


def detours(rng, x, rank: int, share: float = 0.01, factor: float = 10.0):
    x[rank, rng.random(x.shape[1]) < share] *= factor
    return x


def of_medians(x):
    """The score of NVIDIA's resiliency extension (NVRx), of one kernel: the fastest median over each, [P]."""
    medians = np.median(x, axis=1)
    return medians.min() / medians


# Test 12 of the acceptance list: nobody stands out, and nobody is named.

NULLS = {
    "white": lambda rng, p, n: steps(rng, p, n, 0.03),
    "AR(1) 0.9": lambda rng, p, n: steps(rng, p, n, 0.03, 0.9),
    "detours on all": lambda rng, p, n: (
        steps(rng, p, n) + 1e-3 * rng.pareto(1.5, (p, n)) * (rng.random((p, n)) < 0.02)
    ),
    "healthy spread": lambda rng, p, n: steps(rng, p, n) * np.exp(SPREAD * rng.standard_normal((p, 1))),
}


@pytest.mark.acceptance
@pytest.mark.parametrize(
    "ranks, n, runs, null",
    [
        *((8, 512, 500, null) for null in NULLS),
        *((64, 256, 200, null) for null in NULLS),
        *((2048, 64, 200, null) for null in ("AR(1) 0.9", "detours on all")),  # the hard ones: a second each
    ],
)
def test_nobody_is_named_where_ranks_are_equal(ranks, n, runs, null):
    """Defends: multiplicity (2,048 ranks), skewed tails, steps that hang together, small samples."""
    rng = generator(1000)
    alarms = 0
    for _ in range(runs):
        flags = flag(NULLS[null](rng, ranks, n), 0.01, SPREAD, 30)
        alarms += bool(flags.is_slow.any() or flags.has_tail.any())
    assert alarms <= most(runs, 0.02)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 16, 64, 2048])
@pytest.mark.parametrize("deviation", [0.001, 0.005, 0.01])
def test_cut_keeps_the_family_where_ranks_truly_differ(ranks, deviation):
    """Defends: a normal cut for the MAD of few (7 % alarms at 8 ranks for z > 3.5, 35 % at 2,048)."""
    runs = min(20_000, 4_000_000 // ranks)
    z = robust_z(deviation * generator(2000).standard_normal((runs, ranks)), SPREAD)
    assert np.mean(z.max(axis=1) > cut(ranks, 0.01, SPREAD)) <= 0.02


@pytest.mark.parametrize("ranks", [4, 8, 16, 64])
def test_cut_needs_no_spread_where_none_is_expected(ranks):
    """Whatever the scale: without a prior the cut alone keeps the rate."""
    z = robust_z(1e6 * generator(2001).standard_normal((20_000, ranks)))
    assert np.mean(z.max(axis=1) > cut(ranks, 0.01)) <= 0.02


def test_cut_is_the_normal_one_for_many():
    assert cut(2048, 0.01, SPREAD) == pytest.approx(4.42, abs=0.05)  # z(1 - 0.01/2048)
    assert cut(8, 0.01, SPREAD) > 5.0
    assert cut(2, 0.01) == np.inf


def test_robust_z_by_hand():
    """MAD 1 of five, 1.4826 and 1.206 to a deviation; with a spread of 2, (3 * 4 + 1.48 s^2) / 4.48."""
    deviation = 1.4826 * 1.206
    x = [10.0, 11.0, 9.0, 12.0, 8.0]
    np.testing.assert_allclose(robust_z(x), np.array([0, 1, -1, 2, -2]) / deviation)
    moderated = np.sqrt((3 * 4.0 + 1.48 * deviation**2) / 4.48)
    np.testing.assert_allclose(robust_z(x, 2.0), np.array([0, 1, -1, 2, -2]) / moderated)
    np.testing.assert_array_equal(robust_z([1.0, 1.0, 1.0, 2.0]), [0.0, 0.0, 0.0, np.inf])


# Test 13: a rank with a level, and a rank with a tail, are named.


@pytest.mark.parametrize("ranks, runs", [(4, 100), (8, 100), (64, 20)])
def test_a_rank_three_per_cent_slow_is_named(ranks, runs):
    rng = generator(3000)
    named = 0
    for run in range(runs):
        slow = run % ranks
        x = steps(rng, ranks, 1000)
        x[slow] *= 1.03
        scores = score(x, replicates=8)
        worst = scores.ranks[0]
        named += (scores.flagged, worst.rank, worst.kind) == ([slow], slow, "slow throughout")
    assert runs - named <= most(runs, 0.05)


@pytest.mark.parametrize("ranks, runs", [(4, 100), (8, 100), (64, 20)])
def test_a_rank_with_a_tail_is_named_which_medians_do_not_see(ranks, runs):
    """Side by side: 1 % of a rank's steps are ten times as long.  Its median is everybody's."""
    rng = generator(4000)
    named, least = 0, 1.0
    for run in range(runs):
        rough = run % ranks
        x = detours(rng, steps(rng, ranks, 2000), rough)
        scores = score(x, replicates=8)
        worst = scores.ranks[0]
        named += (scores.flagged, worst.rank, worst.kind) == ([rough], rough, "rare long detours")
        least = min(least, of_medians(x).min())
        assert worst.tail < 0.12
        assert worst.what_if > 0.03
    assert runs - named <= most(runs, 0.05)
    assert least > 0.98  # a straggler to NVRx is below 0.75


def slowed(rng, x, rank: int, factor: float = 1.03):
    x[rank] *= factor
    return x


@pytest.mark.parametrize("runs", [10, pytest.param(100, marks=pytest.mark.acceptance)])
@pytest.mark.parametrize("spoil", [detours, slowed])
def test_one_of_2048(spoil, runs):
    """Of 100 with a tail 95 are named; of the rest most have no detour in two quarters of their time."""
    rng = generator(4100)
    named, least = 0, 1.0
    for _ in range(runs):
        x = spoil(rng, steps(rng, 2048, 1000), 1234)
        flags = flag(x, 0.01, SPREAD, 10)
        of_kind, of_other = (
            (flags.has_tail, flags.is_slow) if spoil is detours else (flags.is_slow, flags.has_tail)
        )
        named += np.flatnonzero(of_kind).tolist() == [1234] and not of_other.any()
        assert Losses(x).what_if().argmax() == 1234
        least = min(least, of_medians(x)[1234])
    assert runs - named <= most(runs, 0.05)
    assert (least > 0.98) == (spoil is detours)  # a straggler to NVRx is below 0.75


def test_what_does_not_recur_is_not_flagged():
    """Defends: one huge detour, and trouble in half of the run, called a property of the rank."""
    rng = generator(5000)
    once = steps(rng, 8, 2000)
    once[3, 700] *= 5000.0
    assert score(once).flagged == []
    assert score(once).ranks[0].rank == 3
    assert score(once).pattern == "few steps dominate"
    brief = steps(rng, 8, 2000)
    brief[2, :1010] *= 1.05
    found = score(brief).ranks[0]
    assert (found.rank, found.is_slow, found.slow_quarters) == (2, False, 2)
    rough = steps(rng, 8, 2000)
    detours(rng, rough[:, :1000], 5, 0.05)
    found = score(rough).ranks[0]
    assert (found.rank, found.has_tail, found.tail_quarters) == (5, False, 2)
    assert found.tail_p < 0.01


def test_kinds():
    rng = generator(5100)
    x = steps(rng, 8, 2000)
    x[1] *= 1.05
    x[4, :1300] *= 1.2  # most of three quarters
    detours(rng, x, 6, 0.03)  # so many that each quarter tells
    detours(rng, x, 1, 0.03)
    kinds = {r.rank: r.kind for r in score(x).ranks}
    assert kinds == {
        0: "usual",
        1: "slow throughout with rare long detours",
        2: "usual",
        3: "usual",
        4: "slow throughout",
        5: "usual",
        6: "rare long detours",
        7: "usual",
    }
    x = steps(rng, 64, 2000, 0.001)
    x[5, :1001] *= 1.5
    assert {r.rank: r.kind for r in score(x).ranks}[5] == "slow for a time"


@pytest.mark.parametrize("pattern", ["even", "recurs", "rotates", "few steps dominate"])
def test_patterns(pattern):
    rng = generator(5200)
    x = steps(rng, 8, 2000, 0.001)
    match pattern:
        case "recurs":
            detours(rng, x, 5)
        case "rotates":
            x[rng.integers(0, 8, 2000), np.arange(2000)] *= 1.5
        case "few steps dominate":
            x[rng.integers(0, 8, 10), np.arange(0, 2000, 200)] *= 100.0
    assert score(x).pattern == pattern


# The numbers themselves.


def brute_what_if(x):
    """Every step with every draw of the median rank's, as the definition has it."""
    losses = Losses(x)
    usual = np.sort(x, axis=0)[(len(x) - 1) // 2]
    drawn = x[losses.median_rank] / usual
    result = []
    for rank in range(len(x)):
        others = np.delete(x, rank, axis=0).max(axis=0)
        replaced = np.maximum(others[:, None], usual[:, None] * drawn[None, :]).mean(axis=1)
        result.append((x.max(axis=0) - replaced).mean() / x[losses.median_rank].mean())
    return np.array(result)


@given(st.integers(2, 6), st.integers(4, 30), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_blame_and_what_if_are_their_definitions(ranks, n, seed):
    x = np.exp(np.random.default_rng(seed).standard_normal((ranks, n)))
    ordered = np.sort(x, axis=0)
    gap, last = ordered[-1] - ordered[-2], x.argmax(axis=0)
    blame = [gap[last == r].sum() / ordered[-1].sum() for r in range(ranks)]
    losses = Losses(x)
    np.testing.assert_allclose(losses.blame(), blame, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(losses.what_if(), brute_what_if(x), rtol=1e-9, atol=1e-12)


def test_what_if_saves_nothing_among_equals():
    """Defends: blame sold as savings; the blame of equals is above 0, as somebody is always last."""
    losses = Losses(steps(generator(6000), 8, 20_000, 0.1))
    assert losses.blame().min() > 0.003
    assert np.abs(losses.what_if()).max() < 0.002


def test_what_befalls_all_ranks_together_is_nobodys():
    """Defends: a long step of all (an evaluation, a longer batch) counted as what a replacement would do."""
    rng = generator(6100)
    common = np.where(rng.random(4000) < 0.1, 10.0, 1.0)
    calm = steps(rng, 8, 4000)
    calm[2] *= 1.1
    shaken = calm * common
    assert Losses(calm).what_if()[2] == pytest.approx(0.09, abs=0.01)
    assert Losses(shaken).what_if()[2] == pytest.approx(Losses(calm).what_if()[2], rel=0.02)
    assert np.abs(np.delete(Losses(shaken).what_if(), 2)).max() < 0.001


def test_two_ranks():
    x = np.ones((2, 100))
    x[1, ::10] = 5.0
    losses = Losses(x)
    assert losses.slowdown() == pytest.approx(1.4)
    np.testing.assert_allclose(losses.blame(), [0.0, 0.4 / 1.4])
    np.testing.assert_allclose(losses.what_if(), [0.0, 0.4])


def test_location_and_tail_by_hand():
    x = np.ones((4, 1000))
    x[1] *= 2.0
    x[2] *= 0.5
    x[3, ::100] = 4.0
    by_rank = {r.rank: r for r in score(x).ranks}
    assert [by_rank[r].location for r in range(4)] == [1.0, 0.5, 2.0, 1.0]
    assert [by_rank[r].tail for r in range(4)] == [1.5, 0.75, 3.0, 0.375]
    assert [r.location for r in sorted(score(x, reference="min").ranks, key=lambda r: r.rank)] == [
        0.5,
        0.25,
        1.0,
        0.5,
    ]


def test_contest_by_hand():
    """Of 64 blocks of two, three have a detour and rank 1 wins them: 2 * P(Binomial(3, 1/2) >= 3)."""
    x = np.ones((2, 128))
    x[1, [4, 5, 90, 127]] = 3.0
    np.testing.assert_allclose(contest(x, 1.5, 1), [1.0, 2 * 0.5**3])
    np.testing.assert_allclose(contest(x, 5.0, 1), [1.0, 1.0])


# Properties.


def table(scores):
    rows = sorted(scores.ranks, key=lambda r: r.rank)
    return np.array([[r.location, *r.location_interval, r.tail, r.blame, *r.blame_interval, r.what_if, r.z, r.tail_z,
                      r.tail_p, r.is_slow, r.has_tail, r.slow_quarters] for r in rows])  # fmt: skip


@given(st.integers(2, 9), st.integers(16, 200), st.integers(0, 10_000), st.floats(1e-6, 1e6))
@settings(max_examples=40, deadline=None)
def test_order_of_ranks_and_unit_of_time_do_not_matter(ranks, n, seed, scale):
    rng = np.random.default_rng(seed)
    x = np.exp(rng.standard_normal((ranks, n)) * rng.choice([0.01, 1.0]))
    order = rng.permutation(ranks)
    once = score(x, replicates=20)
    np.testing.assert_allclose(
        table(score(x[order], replicates=20)), table(once)[order], rtol=1e-6, atol=1e-9
    )
    np.testing.assert_allclose(table(score(x * scale, replicates=20)), table(once), rtol=1e-6, atol=1e-9)
    assert once.pattern == score(x[order] * scale, replicates=20).pattern
    assert [r.what_if for r in once.ranks] == sorted((r.what_if for r in once.ranks), reverse=True)
    assert sum(r.blame for r in once.ranks) <= 1.0


def test_same_seed_same_scores():
    x = steps(generator(8000), 4, 300)
    assert score(x, seed=3) == score(x, seed=3)
    assert score(x, seed=3) != score(x, seed=4)


def test_ranks_that_lack_the_last_steps():
    x = steps(generator(8100), 3, 100)
    cut_short = [x[0], x[1][:60], x[2][:80]]
    result = score(cut_short)
    assert (result.steps, result.unmatched) == (60, 40)
    assert result.ranks == score(x[:, :60]).ranks


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"durations": [[1.0] * 20]}, "2 or more ranks, found 1"),
        ({"durations": np.ones((2, 3, 4))}, r"found 2 of shapes \[\(3, 4\)\]"),
        ({"durations": [[1.0] * 20, [1.0] * 15]}, "16 steps or more, found 15 of rank 1"),
        ({"durations": [[1.0] * 16, [1.0] * 7 + [0.0] * 9]}, "found 0.0 at step 7 of rank 1"),
        ({"durations": [[1.0] * 16, [np.nan] * 16]}, "found nan at step 0 of rank 1"),
        ({"durations": np.ones((2, 16)), "alpha": 0.0}, "alpha must lie between 0 and 1, found 0.0"),
        ({"durations": np.ones((2, 16)), "confidence": 95}, "confidence must lie between 0 and 1, found 95"),
        ({"durations": np.ones((2, 16)), "reference": "mean"}, "one of median, min, found 'mean'"),
        ({"durations": np.ones((2, 16)), "spread": -1.0}, "spread must be 0 or more"),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        score(**arguments)
