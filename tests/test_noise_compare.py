"""Comparison of runs: equal code raises no alarm, changes are found, and what cannot be said is not."""

import os
from functools import cache
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.signal import lfilter
from sigma_noise.calibrate import calibrate, split
from sigma_noise.codes import Exit, Verdict
from sigma_noise.compare import MARGINS, compare, holm
from sigma_noise.shape import shape
from sigma_noise.shift import shift

FRESH = int(os.environ.get("SIGMA_FRESH_SEED", "0"))
CHANGED = (Verdict.REGRESSED, Verdict.IMPROVED)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed + FRESH)


def most(runs: int, rate: float) -> float:
    """Of `runs`, at a fixed seed what the rate says; at fresh ones what once in 1,000 is passed at that rate."""
    return stats.binom.isf(1e-3, runs, rate) if FRESH else rate * runs


def samples(rng, runs: int, n: int, phi: float = 0.0, run_effect: float = 0.01, sigma: float = 0.05):
    """Seconds [runs, n]: AR(1) within a run, and a luck of its own for each run."""
    noise = rng.standard_normal((runs, n))
    noise[:, 0] /= np.sqrt(1.0 - phi**2)
    within = lfilter([np.sqrt(1.0 - phi**2)], [1.0, -phi], noise, axis=1)
    return 1e-3 * np.exp(sigma * within + run_effect * rng.standard_normal((runs, 1)))


def numbers(x):
    """What a run leaves behind: five numbers."""
    base = np.quantile(x, 0.05, axis=1, keepdims=True)
    excess = np.maximum(x - base, 0.0)
    return {
        "median_s": np.median(x, axis=1),
        "p99_s": np.quantile(x, 0.99, axis=1),
        "noise_share": excess.sum(axis=1) / x.sum(axis=1),
        "detours_per_s": (excess > 0.1 * base).sum(axis=1) / x.sum(axis=1),
        "slowdown_2048": np.quantile(x, 0.9995, axis=1) / x.mean(axis=1),
    }


# Test 7: A against A.


@cache
def numbers_of_equal_runs(phi, run_effect):
    """Of 2,000 runs, 200 times two arms of five."""
    return numbers(samples(generator(100), 2000, 500, phi, run_effect))


@pytest.mark.parametrize(
    "phi, run_effect",
    [
        (0.0, 0.0),
        (0.9, 0.01),
        *(
            pytest.param(*null, marks=pytest.mark.acceptance)
            for null in ((0.5, 0.0), (0.9, 0.0), (0.0, 0.01))
        ),
    ],
)
@pytest.mark.parametrize(
    "metrics", [["median_s"], ["p99_s"], list(MARGINS)], ids=["median", "p99", "all five"]
)
def test_equal_code_raises_no_alarm(phi, run_effect, metrics):
    """Without a margin the rate is the test's own; with the default ones next to nothing is left.

    Defends: samples of a run taken for replicates, Holm left out, one-sided levels taken twice.
    """
    of_run = numbers_of_equal_runs(phi, run_effect)
    alarms = with_margins = 0
    for at in range(0, 2000, 10):
        a, b = ({name: x[i : i + 5] for name, x in of_run.items()} for i in (at, at + 5))
        bare = compare(a, b, metrics=metrics, margins=dict.fromkeys(metrics, 0.0), most_noise=1.0)
        alarms += any(m.verdict in CHANGED for m in bare.metrics)
        with_margins += compare(a, b, metrics=metrics, most_noise=1.0).verdict in CHANGED
    assert alarms <= most(200, 0.085)
    assert with_margins <= most(200, 0.02)


def test_pooled_samples_would_raise_alarms():
    """Why runs: Mann-Whitney over the pooled samples of the same equal code."""
    rng = generator(101)
    alarms = 0
    for _ in range(100):
        x = samples(rng, 10, 500, 0.9, 0.01)
        alarms += stats.mannwhitneyu(x[:5].ravel(), x[5:].ravel()).pvalue < 0.05
    assert alarms > 60


# Test 8: a change of 5 %, and one of 1 % within a margin of 2 %.


def arms(rng, ratio: float, runs: int = 5):
    """Run medians that scatter by 1 %."""
    return {"median_s": np.exp(0.01 * rng.standard_normal(runs))}, {
        "median_s": ratio * np.exp(0.01 * rng.standard_normal(runs))
    }


@pytest.mark.parametrize("ratio, verdict", [(1.05, Verdict.REGRESSED), (1 / 1.05, Verdict.IMPROVED)])
def test_five_per_cent_are_found(ratio, verdict):
    rng = generator(200)
    found = sum(compare(*arms(rng, ratio)).verdict == verdict for _ in range(400))
    assert 400 - found <= most(400, 0.10)


def test_one_per_cent_within_a_margin_of_two_is_no_regression():
    rng = generator(201)
    verdicts = [compare(*arms(rng, 1.01)).verdict for _ in range(400)]
    assert verdicts.count(Verdict.REGRESSED) <= most(400, 0.05)
    assert verdicts.count(Verdict.IMPROVED) == 0


@pytest.mark.parametrize("ratio", [1.02, 1 / 1.02])
def test_at_the_edge_of_the_margin_the_levels_hold(ratio):
    """A change of just the margin: a claim of more at alpha/2, and one of less at alpha."""
    rng = generator(202)
    verdicts = [compare(*arms(rng, ratio)).verdict for _ in range(1000)]
    assert sum(v in CHANGED for v in verdicts) <= most(1000, 0.035)
    assert verdicts.count(Verdict.EQUIVALENT) <= most(1000, 0.06)


def test_equal_arms_are_equivalent_once_runs_suffice():
    rng = generator(203)
    assert sum(compare(*arms(rng, 1.0, 12)).verdict == Verdict.EQUIVALENT for _ in range(200)) >= 180


def test_all_five_metrics_find_a_slower_kernel():
    """+5 % on all times, eight runs an arm as Holm over five metrics takes its share: two move, three are not times."""
    rng = generator(204)
    found = 0
    for _ in range(100):
        x = samples(rng, 16, 500, 0.5)
        result = compare(numbers(x[:8]), numbers(1.05 * x[8:]), most_noise=1.0)
        found += result.verdict == Verdict.REGRESSED
        assert {m.name for m in result.metrics if m.verdict == Verdict.REGRESSED} <= {"median_s", "p99_s"}
    assert found >= 90


# The numbers themselves.


def brute_p(a, b, delta):
    """Every relabelling of the shifted runs."""
    pool = np.concatenate([a, b - delta])
    total, n = pool.sum(), len(a)
    means = [pool[list(c)].sum() for c in combinations(range(len(pool)), n)]
    differences = [(total - m) / len(b) - m / n for m in means]
    return np.mean(np.array(differences) >= differences[0] - 1e-12)


@given(st.integers(5, 6), st.integers(4, 6), st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_permutation_is_the_enumeration(n_a, n_b, seed):
    """p at any shift, and the ends of the interval where it passes the level."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal(n_a), rng.standard_normal(n_b) + 0.5
    s = shift(a, b, 0.025)
    assert s.method == "permutation"
    for delta in (-1.0, 0.0, 0.7):
        assert s.p_above(delta) == pytest.approx(brute_p(a, b, delta))
        assert s.p_below(delta) == pytest.approx(brute_p(-a, -b, -delta))
    low, high = s.interval(0.025)
    assert brute_p(a, b, low - 1e-6) <= 0.025 < brute_p(a, b, low + 1e-6)
    assert brute_p(-a, -b, -high - 1e-6) <= 0.025 < brute_p(-a, -b, -high + 1e-6)


def test_permutation_agrees_with_scipy():
    rng = generator(300)
    a, b = rng.standard_normal(6), rng.standard_normal(5) + 0.5
    want = stats.permutation_test(
        (b, a), lambda x, y: x.mean() - y.mean(), alternative="greater", n_resamples=10**4
    )
    assert shift(a, b, 0.025).p_above(0.0) == pytest.approx(want.pvalue)


def test_welch_agrees_with_scipy():
    rng = generator(301)
    a, b = rng.standard_normal(7), 3.0 * rng.standard_normal(30) + 1.0
    s = shift(a, b, 0.001)
    assert s.method == "welch"
    want = stats.ttest_ind(b, a, equal_var=False)
    assert 2.0 * min(s.p_above(0.0), s.p_below(0.0)) == pytest.approx(want.pvalue)
    interval = want.confidence_interval(0.95)
    np.testing.assert_allclose(s.interval(0.025), [interval.low, interval.high])


@pytest.mark.parametrize(
    "runs, level, method",
    [
        (5, 0.025, "permutation"),
        (5, 0.005, "welch"),
        (6, 0.005, "permutation"),
        (9, 1e-4, "permutation"),
        (10, 0.025, "welch"),
    ],
)
def test_permutation_where_feasible(runs, level, method):
    """At least three relabellings up to the level, 50,000 in all."""
    x = np.arange(float(runs))
    assert shift(x, x, level).method == method
    assert (level * comb(2 * runs, runs) >= 3 and comb(2 * runs, runs) <= 50_000) == (method == "permutation")


def test_runs_that_do_not_differ_at_all():
    a = {"median_s": np.full(10, 2.0)}
    assert compare(a, a).verdict == Verdict.EQUIVALENT
    assert compare(a, {"median_s": np.full(10, 2.1)}).verdict == Verdict.REGRESSED
    assert compare(a, {"median_s": np.full(10, 1.9)}).verdict == Verdict.IMPROVED


def test_holm_by_hand():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm(np.array([0.9, 0.02, 0.6, 0.01])), [1.0, 0.06, 1.0, 0.04])


def test_a_ratio_is_of_geometric_means():
    one = compare({"median_s": [1, 1, 1, 1, 4]}, {"median_s": [2, 2, 2, 2, 8]}).metrics[0]
    assert one.ratio == pytest.approx(2.0)
    assert one.low < 2.0 < one.high


# Verdicts and gates.


def test_too_few_runs_say_how_many_more():
    result = compare({"median_s": [1.0, 1.01, 1.02]}, {"median_s": [2.0, 2.01, 2.02, 2.0]})
    assert (result.verdict, result.exit) == (Verdict.INCONCLUSIVE, 3)
    assert result.reasons == (
        "median_s: 5 runs an arm are needed, found 3 and 4; make 2 more of base and 1 more of new",
    )
    one = compare({"median_s": [1.0] * 5}, {"median_s": [1.0]})
    assert one.reasons[0].endswith("found 5 and 1; make 4 more of new")
    assert one.metrics[0].method == "none"


def quiet(rng, runs=5, noise=0.03):
    return {"median_s": np.exp(0.002 * rng.standard_normal(runs)), "noise_share": noise * np.ones(runs)}


def test_a_noisy_baseline_is_unfit():
    """Test 23: over 20 % of noise nothing is said, however clear it looks."""
    rng = generator(400)
    loud = quiet(rng, noise=0.27)
    slower = {"median_s": 2.0 * loud["median_s"], "noise_share": loud["noise_share"]}
    result = compare(loud, slower)
    assert (result.verdict, result.exit) == (Verdict.UNFIT, 4)
    assert result.reasons == ("the baseline's noise is 27.0%, over 20%; quieten the machine first",)
    assert compare(loud, slower, metrics=["median_s"]).exit == 4
    assert compare(loud, slower, metrics=["median_s"], most_noise=0.3).exit == 1
    assert compare(quiet(rng), quiet(rng, noise=0.27)).exit == 1  # noise that is new is a regression


def test_a_throttled_unit_is_unfit():
    rng = generator(401)
    result = compare(quiet(rng), quiet(rng), throttled=["GPU 3 of node7"])
    assert result.exit == 4
    assert "GPU 3 of node7 was throttled" in result.reasons[0]


def test_an_interval_wider_than_the_margin_is_unfit_unless_it_is_clear():
    """Defends: a verdict out of an interval of 71 %."""
    wide = {"median_s": [1.0, 1.4, 0.7, 1.2, 0.9]}
    result = compare(wide, {"median_s": [1.1, 1.3, 0.8, 1.2, 0.9]})
    assert result.exit == 4
    assert "reaches further than the margin of 2.0%; not even 100 runs" in result.reasons[0]
    assert compare(wide, {"median_s": [3.0, 4.4, 2.7, 3.2, 2.9]}).exit == 1


def test_what_crosses_the_margin_is_inconclusive_and_says_how_many_runs():
    a = {"median_s": [1.0, 1.004, 0.996, 1.002, 0.998]}
    b = {"median_s": [1.017, 1.021, 1.013, 1.019, 1.015]}
    result = compare(a, b)
    assert (result.verdict, result.exit) == (Verdict.INCONCLUSIVE, 3)
    assert result.reasons[0].startswith("median_s: +1.7% (+1.2% to +2.2%) crosses the margin of 2.0%; about ")
    more = int(result.reasons[0].split("about ")[1].split()[0])
    assert 1 <= more <= 20


def test_the_whole_is_as_bad_as_its_worst():
    """Defends: an improvement that covers a regression."""
    a = {
        "median_s": np.linspace(1.0, 1.004, 8),
        "p99_s": np.linspace(1.0, 1.004, 8),
        "noise_share": [0.0] * 8,
    }
    better = {"median_s": 0.9 * a["median_s"], "p99_s": a["p99_s"], "noise_share": [0.0] * 8}
    mixed = better | {"p99_s": 1.2 * a["p99_s"]}
    unclear = better | {"p99_s": 1.05 * a["p99_s"]}
    assert [m.verdict for m in compare(a, better).metrics] == ["improved", "equivalent", "equivalent"]
    assert compare(a, better).verdict == Verdict.IMPROVED
    assert compare(a, mixed).verdict == Verdict.REGRESSED
    assert compare(a, unclear).verdict == Verdict.INCONCLUSIVE
    assert compare(a, a).verdict == Verdict.EQUIVALENT


def test_exit_codes_are_never_a_count():
    assert [int(code) for code in Exit] == [0, 1, 2, 3, 4, 5]
    assert {v.value: int(v.exit) for v in Verdict} == {
        "improved": 0, "equivalent": 0, "regressed": 1, "inconclusive": 3, "unfit": 4,
    }  # fmt: skip


@given(st.integers(5, 12), st.floats(1e-6, 2.0), st.floats(1e-3, 1.0), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_against_itself_is_never_a_change(runs, margin, scatter, seed):
    a = {"median_s": np.exp(scatter * np.random.default_rng(seed).standard_normal(runs))}
    result = compare(a, a, margins={"median_s": margin})
    assert result.verdict not in CHANGED
    assert result.metrics[0].ratio == pytest.approx(1.0)


@given(st.integers(5, 11), st.floats(0.5, 2.0), st.floats(1e-9, 1e9), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_units_and_sides(runs, ratio, unit, seed):
    """The unit of time changes nothing; sides exchanged, the ratio is its inverse and a regression an improvement."""
    rng = np.random.default_rng(seed)
    a, b = ({"median_s": r * np.exp(0.01 * rng.standard_normal(runs))} for r in (1.0, ratio))
    there, back = compare(a, b).metrics[0], compare(b, a).metrics[0]
    scaled = compare(*({"median_s": unit * arm["median_s"]} for arm in (a, b))).metrics[0]
    mirrored = {Verdict.REGRESSED: Verdict.IMPROVED, Verdict.IMPROVED: Verdict.REGRESSED}
    assert back.verdict == mirrored.get(there.verdict, there.verdict)
    assert scaled.verdict == there.verdict
    np.testing.assert_allclose(
        [back.ratio, back.low, back.high], [1 / there.ratio, 1 / there.high, 1 / there.low]
    )
    np.testing.assert_allclose([scaled.ratio, scaled.low, scaled.high], [there.ratio, there.low, there.high])


@pytest.mark.parametrize(
    "base, new, options, message",
    [
        ({"median_s": [1.0]}, {"p99_s": [1.0]}, {}, "a metric in common, found none"),
        ({"median_s": [1.0]}, {"p99_s": [1.0]}, {"metrics": ["median_s"]}, "'median_s' is not in new"),
        ({"other": [1.0]}, {"other": [1.0]}, {}, "'other' must have a margin of 0 or more, found None"),
        (
            {"median_s": [0.0]},
            {"median_s": [1.0]},
            {},
            r"median_s of base must be finite and above 0, found \[0.0\]",
        ),
        (
            {"noise_share": [0.1]},
            {"noise_share": [-1]},
            {},
            r"noise_share of new must be finite and 0 or more",
        ),
        ({"median_s": []}, {"median_s": [1.0]}, {}, r"a number a run, found shape \(0,\)"),
        (
            {"median_s": [1.0]},
            {"median_s": [1.0]},
            {"alpha": 0.5},
            "alpha must lie between 0 and 0.5, found 0.5",
        ),
    ],
)
def test_wrong_input(base, new, options, message):
    with pytest.raises(ValueError, match=message):
        compare(base, new, **options)


# Calibration.


def test_calibration_by_hand():
    """Three comparisons of equal code: 1 %, 3 % and 10 % apart, either way; the 95th percentile is the largest."""
    pairs = [
        ({"median_s": [1.0] * 5, "p99_s": [1.0] * 5}, {"median_s": [r] * 5, "p99_s": [1.001] * 5})
        for r in (1.01, 1 / 1.03, 1.10)
    ]
    found = calibrate(pairs)
    np.testing.assert_allclose(found.differences["median_s"], [0.01, 0.03, 0.10])
    assert found.floor["median_s"] == pytest.approx(0.10)
    assert found.margins["median_s"] == pytest.approx(0.10)
    assert found.margins["p99_s"] == MARGINS["p99_s"]
    assert calibrate(pairs, {"median_s": 0.2}).margins["median_s"] == 0.2
    with pytest.raises(ValueError, match="found none"):
        calibrate([])


def test_margins_of_calibration_keep_equal_code_apart():
    """On a machine whose runs scatter by 10 %, with no margin of its own."""
    rng = generator(500)

    def arm():
        return {"median_s": np.exp(0.1 * rng.standard_normal(5))}

    found = calibrate([(arm(), arm()) for _ in range(100)])
    assert found.margins["median_s"] == pytest.approx(1.96 * 0.1 * np.sqrt(2 / 5), rel=0.35)
    alarms = sum(compare(arm(), arm(), margins=found.margins).verdict in CHANGED for _ in range(200))
    assert alarms <= most(200, 0.01)


def test_split_of_runs():
    runs = {"median_s": np.arange(12.0), "p99_s": 100 + np.arange(12.0)}
    pairs = split(runs, 5, 30, generator(501))
    assert len(pairs) == 30
    for a, b in pairs:
        assert len({*a["median_s"], *b["median_s"]}) == 10
        np.testing.assert_array_equal(a["p99_s"], a["median_s"] + 100)
    assert len({tuple(sorted(a["median_s"])) for a, _ in pairs}) > 20
    with pytest.raises(
        ValueError, match=r"twice 7 runs of each metric, the same number of all, found \[12\]"
    ):
        split(runs, 7, 1, generator(0))


# Shape.


def test_shape_agrees_with_scipy():
    rng = generator(600)
    a = [np.exp(rng.standard_normal(100)) for _ in range(4)]
    b = [np.exp(rng.standard_normal(100) * 1.5) for _ in range(5)]
    found = shape(a, b)
    flat_a, flat_b = np.concatenate(a), np.concatenate(b)
    assert found.wasserstein_log == pytest.approx(stats.wasserstein_distance(np.log(flat_a), np.log(flat_b)))
    area = stats.wasserstein_distance(flat_a, flat_b)
    x = np.sort(np.concatenate([[0.0], flat_a, flat_b]))
    low = np.minimum(*(np.searchsorted(np.sort(f), x[:-1], side="right") / len(f) for f in (flat_a, flat_b)))
    assert found.similarity == pytest.approx(1.0 - area / ((1.0 - low) * np.diff(x)).sum())


def test_runs_count_the_same_however_long():
    ones, twos = np.ones(10), np.full(1000, 2.0)
    assert shape([ones, twos], [ones, ones]).wasserstein_log == pytest.approx(0.5 * np.log(2.0))
    assert shape([ones], [twos]).similarity == pytest.approx(0.5)
    assert shape([ones], [ones]) == shape([ones], [ones], seed=9)
    assert shape([ones], [ones]).similarity == 1.0


def test_shape_of_a_shift_and_of_a_tail():
    """A shift of 5 % is 0.05 in log time; a tail that the median does not see is seen."""
    rng = generator(601)
    x = samples(rng, 10, 1000, run_effect=0.0)
    moved = shape(x[:5], 1.05 * x[5:])
    assert moved.wasserstein_log == pytest.approx(np.log(1.05), rel=0.1)
    assert moved.p == pytest.approx(2 / 252)
    rough = x[5:].copy()
    rough[:, ::100] *= 10.0
    tail = shape(x[:5], rough)
    assert tail.wasserstein_log == pytest.approx(0.01 * np.log(10.0), rel=0.2)
    assert tail.p == pytest.approx(2 / 252)
    assert 0.88 < tail.similarity < 0.95


@pytest.mark.acceptance
def test_p_of_shape_holds_where_pooled_samples_do_not():
    """Equal code at phi = 0.9: at most 5 % by runs, and most of the time by a pooled Kolmogorov-Smirnov test."""
    rng = generator(602)
    by_runs = pooled = 0
    for seed in range(200):
        x = samples(rng, 10, 300, 0.9, 0.01)
        by_runs += shape(x[:5], x[5:], seed=seed).p <= 0.05
        pooled += stats.ks_2samp(x[:5].ravel(), x[5:].ravel(), method="asymp").pvalue <= 0.05
    assert by_runs <= most(200, 0.085)
    assert pooled > 100


@pytest.mark.acceptance
def test_many_runs_are_drawn_not_listed():
    rng = generator(603)
    x = samples(rng, 24, 50)
    one, other = shape(x[:12], x[12:], seed=1), shape(x[:12], x[12:], seed=1)
    assert one == other
    assert 0.0 < one.p <= 1.0
    assert shape(x[:12], 1.1 * x[12:]).p < 0.001


def test_wrong_shape_input():
    with pytest.raises(ValueError, match="found 0 and 1 runs"):
        shape([], [[1.0]])
    with pytest.raises(ValueError, match="above 0 and finite"):
        shape([[0.0, 1.0]], [[1.0]])
    with pytest.raises(ValueError, match="above 0 and finite"):
        shape([[1.0]], [[np.nan]])
