"""The generalised Pareto distribution of what exceeds a threshold: its fit, and whether the fit holds.

P(Y > y) = (1 + xi y / sigma)^(-1/xi): xi < 0 ends, xi = 0 is exponential, at xi >= 1/2 the variance is infinite and
at xi >= 1 the mean (Pickands 1975).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CHUNK = 1 << 17  # numbers of a temporary: 1 MB stays in a cache


def fit(excess: Floats) -> tuple[Floats, Floats]:
    """Shape and scale of each row of excesses, by Zhang & Stephens (Technometrics 2009).

    The mean of theta = -xi/sigma under its profile likelihood, on a grid with a weak prior: as sharp as maximum
    likelihood, less biased for small samples, and without an iteration that could fail.

    Args:    excess [..., n] above the threshold, ascending, positive, not all equal.
    Returns: shape [...], scale [...].
    """
    y = np.asarray(excess, np.float64)
    n = y.shape[-1]
    rows = y.reshape(-1, n)
    theta = _grid(rows)
    step = max(1, CHUNK // (theta.shape[-1] * n))
    xi = np.concatenate(
        [
            _mean_log(1 - theta[r : r + step, :, None] * rows[r : r + step, None, :])
            for r in range(0, len(rows), step)
        ]
    )
    best = _posterior_mean(theta, xi, n)
    shape = _mean_log(1 - best[:, None] * rows)
    return shape.reshape(y.shape[:-1]), (-shape / best).reshape(y.shape[:-1])


def fit_resamples(excess: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Shape and scale of resamples of ascending excesses [n], each drawn counts [B, n] times; no row all zero.

    The grid is that of the whole sample, so that one product of matrices serves all resamples.
    """
    theta = _grid(excess[None, :])[0]
    n = counts.sum(-1, keepdims=True)
    xi = counts @ np.log(1 - excess[:, None] * theta) / n
    best = _posterior_mean(theta, xi, n)
    shape = (counts * np.log(1 - best[:, None] * excess)).sum(-1) / n[:, 0]
    return shape, -shape / best


def _grid(rows: Floats) -> Floats:
    """theta [rows, m] below 1 / the largest excess, spread by the first quartile (equation 8 of the paper)."""
    n = rows.shape[-1]
    m = 20 + int(np.sqrt(n))
    spread = 1 - np.sqrt(m / (np.arange(1, m + 1) - 0.5))
    quartile = rows[:, int(n / 4 + 0.5) - 1 : int(n / 4 + 0.5)]
    return 1 / rows[:, -1:] + spread / (3 * quartile)


def _posterior_mean(theta: Floats, xi: Floats, n: int | Floats) -> Floats:
    """theta [rows], weighted by the profile likelihood exp(n (log(-theta / xi) - xi - 1)) of the grid."""
    log_likelihood = n * (np.log(-theta / xi) - xi)
    weight = np.exp(log_likelihood - log_likelihood.max(-1, keepdims=True))
    return (weight * theta).sum(-1) / weight.sum(-1)


def _mean_log(z: Floats) -> Floats:
    """Mean logarithm along the last axis: of products of eight, as logarithms are what a fit takes its time for.

    Factors here are below 1 + 5 max/quartile of the excesses, so that eight of them are far from overflow.
    """
    n = z.shape[-1]
    whole = n // 8 * 8
    eights = z[..., :whole].reshape(*z.shape[:-1], 8, whole // 8).prod(-2)
    return (np.log(eights).sum(-1) + np.log(z[..., whole:]).sum(-1)) / n


def log_survival(y: Floats, shape: Floats, scale: Floats) -> Floats:
    """log P(Y > y); parameters broadcast."""
    z = y / scale
    flat = np.abs(shape) < 1e-9
    xi = np.where(flat, 1.0, shape)
    with np.errstate(divide="ignore"):  # the end of a distribution with xi < 0
        return np.where(flat, -z, -np.log1p(np.maximum(xi * z, -1.0)) / xi)


def quantile(level: Floats, shape: Floats, scale: Floats) -> Floats:
    """y with P(Y > y) = exp(-level): sigma (exp(xi level) - 1) / xi."""
    flat = np.abs(shape) < 1e-9
    xi = np.where(flat, 1.0, shape)
    return scale * np.where(flat, level, np.expm1(xi * level) / xi)


def anderson_darling(excess: Floats, shape: Floats, scale: Floats) -> Floats:
    """A^2 of each row of ascending excesses [..., n] against its own fit (Anderson & Darling 1954): heavy on tails."""
    n = excess.shape[-1]
    above = log_survival(excess, shape[..., None], scale[..., None])
    tiny = np.finfo(np.float64).tiny
    below = np.log(np.maximum(-np.expm1(above), tiny))
    above = np.maximum(above, np.log(tiny))  # a sample beyond the fitted end: far off, but finite
    return -n - ((2 * np.arange(1, n + 1) - 1) * (below + above[..., ::-1])).sum(-1) / n


@dataclass(frozen=True)
class Check:
    """p of the Anderson-Darling test, and 90 % interval of the shape, both from samples of the fit, fitted again."""

    p_value: float
    shape_low: float
    shape_high: float


def check(
    excess: Floats, rng: np.random.Generator, *, tau: float = 1.0, draws: int = 199, most: int = 500
) -> Check:
    """Whether excesses, in order of time [n], are of a generalised Pareto distribution at all.

    The parameters are fitted, so tables of A^2 do not hold; each drawn sample is fitted again (Lilliefors' idea).
    Excesses that come in clusters of correlation time `tau` are thinned evenly to n/tau and at most `most`: the test
    takes them for independent, and of more it would see the grain of the clock.
    """
    n = len(excess)
    kept = int(np.clip(n / tau, min(n, 30), most))
    y = np.sort(excess[np.linspace(0, n - 1, kept).round().astype(int)])
    if y[0] == y[-1]:
        return Check(0.0, np.nan, np.nan)
    shape, scale = fit(y)
    drawn = np.sort(quantile(rng.exponential(size=(draws, kept)), shape, scale), axis=-1)
    shapes, scales = fit(drawn)
    as_far = anderson_darling(drawn, shapes, scales) >= anderson_darling(y, shape, scale)
    error = (shapes - shape) * np.sqrt(kept * tau / n)
    whole, _ = fit(np.sort(excess))
    high, low = whole - np.quantile(error, [0.05, 0.95])
    return Check(float((1 + as_far.sum()) / (draws + 1)), float(low), float(high))
