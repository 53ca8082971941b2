"""Confidence intervals of one time series whose samples resemble their neighbours.

A bootstrap that draws samples one by one takes n correlated samples for n independent ones.  Here whole blocks of
random length are drawn (stationary bootstrap, Politis & Romano 1994), of a mean length that the series itself asks
for (Politis & White 2004; Patton, Politis & White 2009).  Every statistic is brought to a ratio of two sums:

    mean          sum x / n
    ratio         sum a / sum b
    quantile q    F(x_q) = sum 1[x <= x_q] / n, whose limits go back through the inverse of F (Woodruff 1952)

so that the same blocks serve them all, by differences of running sums.  Neighbouring samples are first summed in at
most `CELLS` cells, which are drawn whole: a resample of 1e7 samples costs what one of 1e3 does.  Where cells are
longer than the blocks asked for, they are the blocks, longer than need be: that does not bias the width of an
interval, but scatters it by some 1/sqrt(2 CELLS) = 4 %.
"""

from dataclasses import dataclass, replace
from math import ceil, inf, isfinite, log10, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from scipy.special import ndtri

Array = NDArray[np.float64]
ROUNDING = 1e-12  # of the largest: what differs by less is constant
Statistic = str | float  # "mean", "median" or a quantile in 0..1

CELLS = 256
CHUNK = 1 << 15
RESAMPLES = 2000
FEWEST = 8  # samples: with less, no interval is tried
FEW_EFFECTIVE = 500  # below it, seen coverage of a nominal 95 % falls to 90 % (n = 2,000, AR(1) of 0.9)
TAIL_SAMPLES = 20  # effective samples that must lie beyond a quantile
NORMAL_MAD = 1.4826  # standard deviations in a median absolute deviation, if normal
MAY_BE_SHORT = "interval may be short"


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence limits; infinite where the data bound one side only, or none.

    n samples are worth n_eff independent ones.  `note` is empty where nothing need be said.
    """

    estimate: float
    low: float
    high: float
    n: int
    n_eff: float
    note: str = ""


def series(x: ArrayLike, name: str = "x") -> Array:
    """x as f64 [n].  Raises ValueError unless it is one-dimensional, finite and not empty."""
    array = np.asarray(x, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must have one dimension and a sample or more, found shape {array.shape}")
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, found {array[at]} at {at}")
    return array


def autocovariance(x: ArrayLike, lags: int) -> Array:
    """gamma_k = 1/n sum_i (x_i - mean)(x_{i+k} - mean) for k = 0..lags, f64 [lags + 1], by FFTs of chunks."""
    x = series(x)
    n = len(x)
    x, lags = x - x.mean(), min(lags, n - 1)
    chunk = min(n, max(CHUNK, lags))
    size = fft.next_fast_len(chunk + lags, real=True)
    products = np.zeros(size // 2 + 1, np.complex128)
    for at in range(0, n, chunk):
        head, reached = fft.rfft(x[at : at + chunk], size), fft.rfft(x[at : at + chunk + lags], size)
        products += head.conj() * reached
    return fft.irfft(products, size)[: lags + 1] / n


def autocorrelation_time(x: ArrayLike) -> float:
    """tau = 1 + 2 sum_k rho_k, in samples: n / tau independent samples would tell the mean as well.

    Summed over the initial positive sequence, pairs rho_2k + rho_2k+1 up to the first that is not positive (Geyer
    1992).  Never below 1: a series that alternates earns no credit.
    """
    x = series(x)
    if np.ptp(x) <= ROUNDING * np.abs(x).max():
        return 1.0
    lags = int(4 * sqrt(len(x))) + 1
    while True:
        gamma = autocovariance(x, lags)
        pairs = gamma[: len(gamma) // 2 * 2].reshape(-1, 2).sum(1)
        if lags >= len(x) or (pairs <= 0).any():
            return initial_positive_sum(gamma)
        lags *= 4


def initial_positive_sum(gamma: Array) -> float:
    """1 + 2 sum rho_k from autocovariances gamma [lags + 1], as in `autocorrelation_time`."""
    if gamma[0] <= 0 or len(gamma) < 2:
        return 1.0
    pairs = (gamma[: len(gamma) // 2 * 2] / gamma[0]).reshape(-1, 2).sum(1)
    ends = np.flatnonzero(pairs <= 0)
    return max(1.0, float(2 * pairs[: ends[0] if len(ends) else None].sum() - 1))


def block_length(x: ArrayLike) -> float:
    """The mean block, in samples, with which the stationary bootstrap tells the variance of the mean best.

    b = (G^2/g^2)^(1/3) n^(1/3) with G = sum_k lambda(k/M) |k| gamma_k and g = sum_k lambda(k/M) gamma_k over
    |k| <= M, lambda(t) = min(1, 2(1 - |t|)): Politis & White 2004, D_SB = 2 g^2 as corrected by Patton, Politis
    & White 2009.  M is twice the first lag m of max(5, log10 n) in a row with |rho| < 2 sqrt(log10(n)/n), which lets
    one lag more in than the paper's, as Patton's own program does.  At most min(3 sqrt n, n/3).
    """
    x = series(x)
    n = len(x)
    if n < FEWEST or np.ptp(x) == 0:
        return 1.0
    run = max(5, int(log10(n)))
    most = min(ceil(sqrt(n)) + run, n - 2)
    gamma = autocovariance(x, most)
    lags = _significant_lags(x, gamma, run)
    M = min(2 * max(lags, 1), most) if lags is not None else most
    k = np.arange(1, M + 1)
    weighted = np.minimum(1.0, 2 * (1 - k / M)) * gamma[1 : M + 1]
    G = 2 * (k * weighted).sum()
    g = gamma[0] + 2 * weighted.sum()
    longest = ceil(min(3 * sqrt(n), n / 3))
    # g = 0 is a series that alternates exactly: its mean has no variance to be told.
    return float(min((G * G / (g * g) * n) ** (1 / 3), longest)) if g != 0 else float(longest)


def _significant_lags(x: Array, gamma: Array, run: int) -> int | None:
    """The first lag that begins `run` lags which could be those of white noise; None where there is none."""
    n = len(x)
    squares = np.concatenate([[0.0], np.cumsum((x - x.mean()) ** 2)])
    k = np.arange(len(gamma))
    # Of the samples that both ends of a lag share, one fewer than the pairs: lag 0 then stands a little above 1.
    shared = (squares[-1] - squares[k + 1]) * squares[n - k - 1]
    rho = n * np.abs(gamma) / np.sqrt(np.maximum(shared, np.finfo(float).tiny))
    is_small = rho < 2 * sqrt(log10(n) / n)
    runs = np.convolve(is_small, np.ones(run), "valid")[: len(gamma) - run] >= run
    starts = np.flatnonzero(runs)
    return int(starts[0]) if len(starts) else None


def intervals(
    x: ArrayLike,
    statistics: list[Statistic] | tuple[Statistic, ...] = ("mean", "median"),
    *,
    level: float = 0.95,
    period: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[Statistic, Interval]:
    """Percentile intervals of x [n] in order of time, by the stationary bootstrap.

    A quantile above 1 - 20/n_eff or below 20/n_eff has too few samples beyond it: it gets the one-sided limit on
    the side of the data, an infinite one on the other, and a note.

    Args:    statistics: "mean", "median" or quantiles; period: of a disturbance found in x, in samples: blocks
             span three of them on average, or resampling would destroy the train.
    Raises:  ValueError on an empty or infinite series, an unknown statistic, or a level outside 0..1.
    Cost:    `resamples` x min(n, 256), and one FFT and sort of n.
    """
    x = series(x)
    _check(level, resamples)
    quantiles = {s: _quantile(s) for s in statistics if s != "mean"}
    ordered = np.sort(x)
    levels = {s: float(np.quantile(ordered, q)) for s, q in quantiles.items()}
    rows = {s: x if s == "mean" else (x <= levels[s]).astype(np.float64) for s in statistics}
    taus = {s: max(autocorrelation_time(x), autocorrelation_time(row)) for s, row in rows.items()}
    estimates = {s: float(x.mean()) if s == "mean" else levels[s] for s in statistics}
    if len(x) < FEWEST:
        note = f"no interval of {len(x)} samples"
        return {s: Interval(estimates[s], -inf, inf, len(x), len(x) / taus[s], note) for s in statistics}
    block = _block([x, *rows.values()], period)
    drawn = _ratios(np.stack([rows[s] for s in statistics]), np.ones(len(x)), block, resamples, seed)
    result: dict[Statistic, Interval] = {}
    for s, draws in zip(statistics, drawn, strict=True):
        of = len(x), len(x) / taus[s], block
        if s == "mean":
            result[s] = _of_mean(estimates[s], draws, level, *of)
        else:
            draws = _woodruff(ordered, levels[s], quantiles[s], draws)
            result[s] = _of_quantile(draws, level, levels[s], quantiles[s], of)
    return result


def median_shift(
    before: ArrayLike,
    after: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The interval of median(after) / median(before) - 1: two series, each in order of time, resampled on its own.

    n and n_eff are those of the series that is worth less.  Raises: ValueError as `intervals`.
    """
    sides = series(before, "before"), series(after, "after")
    _check(level, resamples)
    draws, worth = [], []
    for i, x in enumerate(sides):
        ordered, median = np.sort(x), float(np.median(x))
        row = (x <= median).astype(np.float64)
        block = _block([x, row], None)
        shares = _ratios(row[None], np.ones(len(x)), block, resamples, [seed, i])[0]
        draws.append(_woodruff(ordered, median, 0.5, shares))
        worth.append((len(x) / max(autocorrelation_time(x), autocorrelation_time(row)), len(x), block))
    n_eff, n, block = min(worth)
    estimate = float(np.median(sides[1]) / np.median(sides[0]) - 1)
    if n < FEWEST:
        return Interval(estimate, -inf, inf, n, n_eff, f"no interval of {n} samples")
    return _of_mean(estimate, draws[1] / draws[0] - 1, level, n, n_eff, block)


def ratio_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    level: float = 0.95,
    period: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The interval of sum a / sum b, a and b [n] in order of time: a noise share, a rate of detours.

    Raises: ValueError as `intervals`, or if b is not of a's length or has a sum that is not positive.
    """
    a, b = series(numerator, "numerator"), series(denominator, "denominator")
    _check(level, resamples)
    if len(a) != len(b) or b.sum() <= 0:
        raise ValueError(
            f"denominator must have the {len(a)} samples of the numerator and a positive sum, found {len(b)} "
            f"samples of sum {b.sum():g}"
        )
    estimate = float(a.sum() / b.sum())
    influence = a - estimate * b
    n_eff = len(a) / autocorrelation_time(influence)
    if len(a) < FEWEST:
        return Interval(estimate, -inf, inf, len(a), n_eff, f"no interval of {len(a)} samples")
    block = _block([influence], period)
    draws = _ratios(a[None], b, block, resamples, seed)[0]
    return _of_mean(estimate, draws, level, len(a), n_eff, block)


def picked_of(x: Interval, n: int, level: float = 0.95) -> Interval:
    """The interval of one of n series that was picked by its estimate: it holds if those of all n do.

    Either half is z(1 - (1 - level) / 2n) / z((1 + level) / 2) times as long (Bonferroni); resamples tell no quantiles
    so far out, the normal law does.
    """
    side = (1 - level) / 2
    k = float(ndtri(side / n) / ndtri(side))
    return replace(x, low=x.estimate - k * (x.estimate - x.low), high=x.estimate + k * (x.high - x.estimate))


def _check(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, found {level}")
    if resamples < 100:
        raise ValueError(f"resamples must be 100 or more, found {resamples}")


def _quantile(statistic: Statistic) -> float:
    q = 0.5 if statistic == "median" else statistic
    if isinstance(q, str) or not 0 < q < 1:
        raise ValueError(f"statistic must be 'mean', 'median' or a quantile in 0..1, found {statistic!r}")
    return q


def _block(rows: list[Array], period: float | None) -> float:
    """The longest that any of the rows asks for.

    The series itself is among them as well as what the statistic counts: rare long detours hide from the one, slow
    drifts that lie under them do not from the other.
    """
    if period is not None and not (isfinite(period) and period > 0):
        raise ValueError(f"period must be a positive number of samples, found {period}")
    return max([1.0, 3 * period if period else 1.0, *(block_length(row) for row in rows)])


def _ratios(
    numerators: Array, denominator: Array, block: float, resamples: int, seed: int | list[int]
) -> Array:
    """sum a* / sum b* of every resample: numerators [k, n], denominator [n] to [k, resamples]."""
    n = len(denominator)
    width = ceil(n / CELLS)
    cells = np.add.reduceat(np.vstack([numerators, denominator]), np.arange(0, n, width), axis=1)
    rng = np.random.default_rng(seed)
    mean, rows = max(1.0, block / width), 1 << 7  # few at a time: what is drawn stays in the cache
    sums = np.concatenate(
        [
            block_sums(cells, *stationary_blocks(cells.shape[1], mean, min(rows, resamples - done), rng))
            for done in range(0, resamples, rows)
        ],
        axis=1,
    )
    return sums[:-1] / sums[-1]


def stationary_blocks(
    n: int, block: float, resamples: int, rng: np.random.Generator
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """begin and end of blocks that fill n places, each [resamples, blocks]; end up to 2n: place i >= n is i - n.

    They begin anywhere, have geometric lengths of mean `block`, and go round (Politis & Romano 1994).
    """
    if block <= 1:
        begin = rng.integers(0, n, (resamples, n), dtype=np.int32)
        return begin, begin + 1
    most = ceil(n / block + 6 * sqrt(n / block) + 12)
    filled = np.minimum(np.cumsum(rng.geometric(1 / block, (resamples, most)), axis=1), n)
    filled[:, -1] = n  # the last block takes what is left, should six standard deviations not have sufficed
    begin = rng.integers(0, n, (resamples, most), dtype=np.int32)
    return begin, begin + np.diff(filled, axis=1, prepend=0)


def block_sums(rows: Array, begin: NDArray[np.integer], end: NDArray[np.integer]) -> Array:
    """The sums of rows [k, n] over the blocks of every resample: f64 [k, resamples]."""
    sums = np.empty((len(rows), len(begin)))
    before = np.zeros(2 * rows.shape[1] + 1)
    for row, out in zip(rows, sums, strict=True):
        np.cumsum(np.concatenate([row, row]), out=before[1:])
        np.sum(before[end] - before[begin], axis=1, out=out)
    return sums


def _note(n: int, n_eff: float, block: float) -> str:
    if n_eff < FEW_EFFECTIVE:
        return f"{MAY_BE_SHORT}: {n} samples are worth {n_eff:.0f}"
    if n / block < TAIL_SAMPLES:
        return f"{MAY_BE_SHORT}: {n / block:.0f} blocks of {block:.0f} samples"
    return ""


def _of_mean(estimate: float, draws: Array, level: float, n: int, n_eff: float, block: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), n, n_eff, _note(n, n_eff, block))


def _woodruff(ordered: Array, estimate: float, q: float, draws: Array) -> Array:
    """Resampled shares of samples up to x_q, read back as quantiles.

    1[x <= x_q] has a mean that is q only to within 1/n, or more where samples tie: the draws are centred on q.
    """
    shares = q + draws - np.searchsorted(ordered, estimate, "right") / len(ordered)
    return np.quantile(ordered, np.clip(shares, 0, 1))


def _of_quantile(
    draws: Array, level: float, estimate: float, q: float, of: tuple[int, float, float]
) -> Interval:
    n, n_eff, block = of
    enough = TAIL_SAMPLES / n_eff
    if q > 1 - enough:
        note = (
            f"no upper limit: {n_eff:.0f} effective samples carry quantiles up to {max(0.0, 1 - enough):.4g}"
        )
        return Interval(estimate, float(np.quantile(draws, 1 - level)), inf, n, n_eff, note)
    if q < enough:
        note = f"no lower limit: {n_eff:.0f} effective samples carry quantiles from {min(1.0, enough):.4g}"
        return Interval(estimate, -inf, float(np.quantile(draws, level)), n, n_eff, note)
    return _of_mean(estimate, draws, level, n, n_eff, block)
