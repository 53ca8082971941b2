"""E[max_N] in closed form and of a sample, and tails: fits, gates, the splice."""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
from noise_samples import bernoulli_slowdown, pareto_max, sample_max
from scipy import integrate, stats
from sigma_noise import pareto
from sigma_noise import tail as tails
from sigma_noise.expected_max import gap_sum
from sigma_noise.tail import NoTail, Parameters, Tail, excess_max, fit_tail, spliced_max

FRESH = int(os.environ.get("SIGMA_FRESH_SEED", "0"))
MAXIMA = 800_000
RANKS = np.array([1, 2, 8, 64, 512, 2048, 16384])


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed + FRESH)


def pareto_sample(rng: np.random.Generator, size, shape: float = 0.2) -> np.ndarray:
    return pareto.quantile(rng.exponential(size=size), shape, 1.0)


def test_figures_of_the_study():
    """Defends: an exponent of N - 1, a slowdown over T instead of over E[W], H_{N-1}."""
    slowdown = bernoulli_slowdown(10, 1, 1e-3, [8, 64, 512, 2048, 16384])
    assert np.round(slowdown, 4).tolist() == [1.0007, 1.0061, 1.0400, 1.0870, 1.0999]
    assert pareto_max(0.0, 1.0, 2048) == pytest.approx(8.2021, abs=5e-5)
    assert pareto_max(0.0, 3.0, 4) == pytest.approx(3 * (1 + 1 / 2 + 1 / 3 + 1 / 4))
    assert pareto_max(-1.0, 1.0, 8) == pytest.approx(8 / 9)
    assert pareto_max(0.2, 1.0, 2048) == pytest.approx(21.75, abs=5e-3)


CLOSED = {  # survival exp(-t) -> value, and E[max_N]
    "bernoulli": (
        lambda t: 10.0 + (t > -math.log(1e-3)),
        lambda N: 10.001 * bernoulli_slowdown(10, 1, 1e-3, N),
    ),
    "exponential": (lambda t: 2.0 * t, lambda N: pareto_max(0.0, 2.0, N)),
    "uniform": (lambda t: -np.expm1(-t), lambda N: N / (N + 1)),
    "pareto": (lambda t: pareto.quantile(t, 0.2, 1.0), lambda N: pareto_max(0.2, 1.0, N)),
    "bounded": (lambda t: pareto.quantile(t, -0.3, 1.0), lambda N: pareto_max(-0.3, 1.0, N)),
}


def test_closed_forms_equal_drawn_maxima():
    """Acceptance 2.  Defends: every closed form at N = 1..16384, within 3 errors of 800,000 maxima and 0.5 %.

    A maximum of N draws is the value at survival 1 - U^(1/N).  Of Bernoulli's at N = 16,384 the 0.5 % alone are asked:
    of 800,000 maxima 0.06 miss the detour, so that mostly none does, no error can be told from them, and the truth lies
    beyond three of 0.  Of the 34 other comparisons one may lie beyond 3 errors by chance (one or more do in 9 of 100
    runs, two or more in 4 of 1,000).
    """
    rng, beyond, compared = rng_of(20), [], 0
    for name, (value, closed) in CLOSED.items():
        for N in RANKS:
            t = -np.log(-np.expm1(np.log(rng.random(MAXIMA)) / N))
            drawn, want = value(t), float(closed(N))
            off = abs(drawn.mean() - want)
            assert off < 0.005 * want, (name, N)
            if name == "bernoulli" and MAXIMA * (1 - 1e-3) ** N < 10:
                continue
            compared += 1
            if off > 3 * drawn.std() / math.sqrt(MAXIMA) + 1e-12:
                beyond.append((name, N))
    assert compared == 34
    assert len(beyond) <= 1, beyond


@pytest.mark.parametrize("shape", [-0.5, -1e-4, 0.0, 1e-9, 0.99e-4, 1.01e-4, 0.3, 0.9])
def test_pareto_max_equals_its_product(shape):
    """Defends: cancellation near xi = 0 and at large N: N B(N, 1 - xi) = prod k / (k - xi)."""
    for N in (1, 2, 8, 2048, 10**6):
        k = np.arange(1, N + 1)
        grown = -math.fsum(np.log1p(-shape / k))
        want = math.expm1(grown) / shape if abs(shape) > 1e-6 else math.fsum(1 / k)
        assert float(pareto_max(shape, 1.0, N)) == pytest.approx(want, rel=2e-6)


def test_sample_max_equals_its_definition_in_fractions():
    """Defends: an off-by-one in i/n, ties, resample counts."""
    x = [3, 5, 5, 11]
    for N in (1, 2, 7):
        weight = [Fraction(i + 1, 4) ** N - Fraction(i, 4) ** N for i in range(4)]
        want = float(sum(w * v for w, v in zip(weight, x, strict=True)))
        assert sample_max(x, N) == pytest.approx(want, rel=1e-14)
        assert sample_max([1, 3, 5, 11], N, counts=[0, 1, 2, 1]) == pytest.approx(want, rel=1e-14)
    assert sample_max(x, 1) == 6
    assert sample_max([7.3] * 9, [1, 5, 10**6]).tolist() == [7.3] * 3


def test_sample_max_is_stable_for_a_million_ranks_and_ten_million_samples():
    """Defends: 1 - F^N by subtraction of powers near 1."""
    n, N = 10**7, 10**6
    want = 1 - math.fsum(math.exp(N * math.log1p(-j / n)) for j in range(1, 1000)) / n
    assert float(sample_max(np.arange(1, n + 1) / n, N)) == pytest.approx(want, abs=1e-13)


def test_gaps_of_several_draws_are_summed_as_each_alone():
    """Defends: gaps that vanish for one draw and not for another, left out for all."""
    x = np.sort(rng_of(64).exponential(size=2000))
    counts = rng_of(65).multinomial(2000, np.full(2000, 1 / 2000), size=5).astype(float)
    counts[0, :1900] = 0  # only long ones
    counts[1, 100:] = 0
    got = gap_sum(x, counts.cumsum(-1), RANKS.astype(float))
    for row, drawn in zip(got, counts, strict=True):
        np.testing.assert_allclose(row, sample_max(x, RANKS, drawn), rtol=1e-12)


@pytest.mark.acceptance
def test_projection_of_a_heavy_tail_to_2048():
    """Acceptance 3.  Defends: bias below 4 % and rmse below 6 % over 40 samples of 1e5, by the sample and by its tail.

    The sample's own rmse is near 5 %: 49 blocks of 2,048, whose maxima scatter by a third.  Of 40 it comes out above
    6 % once in 25, and above 6.8 % once in 1,000: the bound at fresh seeds.
    """
    most = 0.05 * np.sqrt(stats.chi2.isf(1e-3, 40) / 40) if FRESH else 0.06
    by_sample, by_tail = [], []
    for seed in range(40):
        values = pareto_sample(rng_of(1000 + seed), 100_000)
        ordered, below = np.sort(values), np.arange(1.0, 100_001)[None, :]
        by_sample.append(float(sample_max(ordered, 2048)))
        tail = fit_tail(values, rng_of(seed))
        by_tail.append(float(spliced_max(ordered, below, np.array([2048.0]), tail, tail.parameters)[0, 0]))
    for found in (by_sample, by_tail):
        off = np.array(found) / float(pareto_max(0.2, 1.0, 2048)) - 1
        assert abs(off.mean()) < 0.04
        assert np.sqrt((off**2).mean()) < most


@pytest.mark.parametrize("shape", [-0.2, 0.0, 0.2, 0.4])
def test_shape_is_found_again(shape):
    """Acceptance 5.  Defends: a fit with a wrong sign or a bias, |error| < 0.06 in 95 % of 200 samples of 5,000."""
    samples = np.sort(3e-3 * pareto_sample(rng_of(50), (200, 5000), shape), axis=-1)
    shapes, scales = pareto.fit(samples)
    assert np.mean(np.abs(shapes - shape) < 0.06) >= 0.95
    assert scales.mean() == pytest.approx(3e-3, rel=0.01)
    one = fit_once(samples[0], np.ones((1, 5000)))
    assert one == pytest.approx((shapes[0], scales[0]), rel=1e-9)  # one fit by two ways of adding up
    likelihood = stats.genpareto.fit(samples[0], floc=0)
    assert one[0] == pytest.approx(likelihood[0], abs=0.01)


def test_fit_is_that_of_the_paper():
    """Defends: the grid and its prior, which few excesses feel: equations 7 to 9, term by term."""
    y = np.sort(pareto_sample(rng_of(62), 23))
    n, m = 23, 20 + 4
    theta = [
        1 / y[-1] + (1 - math.sqrt(m / (j - 0.5))) / (3 * y[5]) for j in range(1, m + 1)
    ]  # n/4 + 1/2 = 6.25
    k = [-sum(math.log(1 - t * v) for v in y) / n for t in theta]
    log_l = [n * (math.log(t / a) + a - 1) for t, a in zip(theta, k, strict=True)]
    weight = [1 / sum(math.exp(other - own) for other in log_l) for own in log_l]
    best = sum(t * w for t, w in zip(theta, weight, strict=True))
    shape = sum(math.log(1 - best * v) for v in y) / n
    assert [float(p) for p in pareto.fit(y)] == pytest.approx([shape, -shape / best], rel=1e-10)


def fit_once(excess, counts):
    shape, scale = pareto.fit_resamples(excess, counts)
    return float(shape[0]), float(scale[0])


def test_a_resample_is_fitted_as_its_repeated_values():
    """Defends: counts left out of the likelihood.  Grids differ a little, as the largest value may not be drawn."""
    rng = rng_of(51)
    excess = np.sort(pareto_sample(rng, 400))
    counts = rng.multinomial(400, np.full(400, 1 / 400), size=3).astype(float)
    shapes, scales = pareto.fit_resamples(excess, counts)
    for b in range(3):
        want = pareto.fit(np.repeat(excess, counts[b].astype(int)))
        assert float(shapes[b]) == pytest.approx(float(want[0]), abs=5e-3)
        assert float(scales[b]) == pytest.approx(float(want[1]), rel=5e-3)


def test_interval_of_the_shape_covers():
    """Defends: an interval that ignores how few exceedances there are, or how they cluster (tau)."""
    hits = 0
    for seed in range(100):
        found = pareto.check(pareto_sample(rng_of(6000 + seed), 300), rng_of(seed), draws=99)
        hits += found.shape_low <= 0.2 <= found.shape_high
    assert 80 <= hits <= 98
    sample = pareto_sample(rng_of(52), 2000)
    alone, clustered = (pareto.check(sample, rng_of(1), tau=tau) for tau in (1, 9))
    wider = (clustered.shape_high - clustered.shape_low) / (alone.shape_high - alone.shape_low)
    assert 2 < wider < 4.5  # sqrt(9)


def test_anderson_darling_equals_scipy():
    sample = np.sort(pareto_sample(rng_of(53), 200))
    known = {"c": 0.2, "loc": 0.0, "scale": 1.0}
    rng = np.random.default_rng(0)
    want = stats.goodness_of_fit(
        stats.genpareto, sample, known_params=known, statistic="ad", n_mc_samples=2, rng=rng
    )
    got = pareto.anderson_darling(sample, np.array(0.2), np.array(1.0))
    assert float(got) == pytest.approx(want.statistic, rel=1e-9)


def test_anderson_darling_refuses_what_is_no_tail_and_keeps_what_is():
    """Defends: p from tables that do not know of the fit; such p stay above 5 % far too often."""
    p = [pareto.check(pareto_sample(rng_of(7000 + s), 150), rng_of(s), draws=99).p_value for s in range(100)]
    assert np.sum(np.array(p) <= 0.05) <= 13  # binomial(100, 0.05): 0.1 % lie above
    assert np.mean(np.array(p) <= 0.5) == pytest.approx(0.5, abs=0.17)
    two_humps = np.concatenate([rng_of(54).normal(1, 0.1, 250), rng_of(55).normal(3, 0.1, 250)])
    assert pareto.check(rng_of(56).permutation(two_humps), rng_of(0)).p_value < 0.01
    assert pareto.check(np.ones(200), rng_of(0)).p_value == 0


@pytest.mark.parametrize("shape", [-0.4, 0.0, 0.2, 0.45])
def test_excess_max_equals_the_closed_form(shape):
    """Defends: nodes that miss the step of the integrand; the share of samples above the threshold."""
    all_above = Parameters(*(np.array([a]) for a in (1 - 1e-16, shape, 2.0)))
    assert excess_max(RANKS, all_above, room=1e9)[0] == pytest.approx(
        pareto_max(shape, 2.0, RANKS), rel=1e-10
    )
    few = Parameters(*(np.array([a]) for a in (0.1, shape, 2.0)))

    def beyond(y, N=64):
        return -math.expm1(N * math.log1p(-0.1 * stats.genpareto.sf(y, shape, scale=2.0)))

    want = integrate.quad(beyond, 0, stats.genpareto.ppf(1.0, shape, scale=2.0), limit=400)[0]
    assert excess_max(np.array([64]), few, room=1e9)[0, 0] == pytest.approx(want, rel=1e-6)


def test_an_unstable_mean_is_capped_at_twice_the_largest():
    """Defends: an infinite mean that is printed as a figure."""
    values = pareto_sample(rng_of(57), 20_000, shape=1.3)
    tail = fit_tail(values, rng_of(0))
    assert tail.is_unstable
    assert tail.shape == pytest.approx(1.3, abs=4 * 2.3 / np.sqrt(tail.exceedances))  # four standard errors
    assert tail.cap == 2 * values.max()
    ordered, below = np.sort(values), np.arange(1.0, 20_001)[None, :]
    huge = spliced_max(ordered, below, np.array([1e9]), tail, tail.parameters)[0, 0]
    assert huge == pytest.approx(tail.cap, rel=0.01)
    assert huge <= tail.cap * (1 + 1e-9)


def test_the_threshold_leaves_the_body_out():
    """Defends: a threshold in the body.  Below 3 the density is flat, above it an exponential tail holds 8 %."""
    rng = rng_of(58)
    body, beyond = 3 * rng.random(18_400), 3 + rng.exponential(size=1600)
    tail = fit_tail(rng.permutation(np.concatenate([body, beyond])), rng_of(0))
    assert tail.threshold > 2.9
    assert abs(tail.shape) < 0.12
    assert tail.exceedances >= 100
    assert tail.share == pytest.approx(tail.exceedances / 20_000)


def test_a_bend_that_anderson_darling_does_not_see():
    """Defends: the walk up the ladder.  The 2,000 largest of 100,000 fall half as fast as those below them; one fit to
    the 10,000 largest passes the test of 500 of them, with a shape of 0.24."""
    e, bend = rng_of(63).exponential(size=100_000), np.log(50)
    tail = fit_tail(np.where(e < bend, e, 2 * e - bend), rng_of(0))
    assert tail.threshold > bend - 0.3
    assert abs(tail.shape) < 0.1


@pytest.mark.parametrize("off, shape, is_steady", [
    (0.0, 0.2, True),
    (0.0, 0.45, True), (0.0, 0.47, False), (0.0, -0.05, True), (0.0, -0.07, False),
    (0.24, 0.2, True), (0.26, 0.2, False), (-0.24, 0.2, True), (-0.26, 0.2, False),
])  # fmt: skip
def test_a_rung_is_steady_within_its_errors(off, shape, is_steady):
    """Defends: the test of each of the two figures.  Above a threshold 3 higher, a tail of shape 0.2 and scale 1 has a
    mean excess of (1 + 0.2 * 3) / (1 - 0.2) = 2; of 100 samples with a deviation of 1 it is known to 2.5 / 10.

    The shape of 400 samples is known to 2.5 * 1.2 sqrt(1/100 - 1/400) = 0.26 of that of these.  Of samples that come in
    clusters of 5 both are known less well.
    """
    excess = 2.0 + off + np.resize([-1.0, 1.0], 100)
    high = tails._Rung(4.0, excess, shape, 1.6)
    low = tails._Rung(1.0, np.ones(400), 0.2, 1.0)
    assert tails._is_steady(low, high, tau=1.0) == is_steady
    assert tails._is_steady(low, high, tau=5.0)


def test_no_tail_is_said_why():
    with pytest.raises(NoTail, match="499 windows leave 99 above the threshold; a tail needs 100"):
        fit_tail(np.arange(1.0, 500.0), rng_of(0))
    with pytest.raises(NoTail, match="all of one length"):
        fit_tail(np.where(np.arange(2000) % 3, 1.0, 2.0), rng_of(0))
    steps = 1 + rng_of(59).integers(0, 2, 4000) * 0.5 + rng_of(60).integers(0, 2, 4000) * 0.7
    with pytest.raises(NoTail, match=r"no generalised Pareto tail fits|all of one length"):
        fit_tail(steps, rng_of(0))


def test_refitted_needs_thirty_exceedances_for_a_shape():
    tail = Tail(1.0, 0.1, 200, 0.3, 1.0, 0.2, 0.4, 0.5, 100.0)
    x = np.concatenate([[0.5], 1 + np.arange(1, 41) / 10])
    few, none = np.zeros((2, 41))
    few[:11], none[0] = 1, 20
    many = np.ones(41)
    found = tail.refitted(x, np.stack([few, none, many]))
    assert found.share.tolist() == [10 / 11, 0.0, 40 / 41]
    assert found.shape[0] == 0.3
    assert found.scale[0] == pytest.approx(0.7 * 0.55)
    assert found.shape[2] < 0  # evenly spread excesses end
