"""The expected longest of N ranks, E[max_N] = integral of 1 - F(x)^N, in closed form and of a measured sample.

A barrier ends when the last rank arrives, so a step of N independent ranks with cdf F takes E[max_N] on average, and
noise that costs one rank E[W] - floor costs the job E[max_N] - floor (Petrini, Kerbyson & Pakin, SC 2003).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import digamma, gammaln, poch, polygamma

Floats = NDArray[np.float64]

VANISHED = -45.0  # log F^N below which 1 - F^N is 1 to the last bit


def pareto_max(shape: float, scale: float, ranks: ArrayLike) -> Floats:
    """E[max_N] of the generalised Pareto distribution: scale/xi (N B(N, 1 - xi) - 1), for a shape xi < 1.

    Near xi = 0 the first two terms of its series, H_N + xi/2 (H_N^2 + sum 1/k^2): the closed form cancels there.
    Raises: ValueError if the shape is 1 or more, where the mean is infinite.
    """
    if shape >= 1:
        raise ValueError(f"pareto_max: shape must be below 1, where the mean is finite, found {shape}")
    N = np.asarray(ranks, np.float64)
    if abs(shape) < 1e-4:
        H = digamma(N + 1) + np.euler_gamma
        return scale * (H + shape / 2 * (H**2 + np.pi**2 / 6 - polygamma(1, N + 1)))
    grown = np.log(poch(N + 1 - shape, shape)) + gammaln(1 - shape)  # log of N B(N, 1 - xi)
    return scale / shape * np.expm1(grown)


def sample_max(ordered: ArrayLike, ranks: ArrayLike, counts: ArrayLike | None = None) -> Floats:
    """E[max_N] of the empirical cdf of a sample, exactly: x_1 + sum (x_{i+1} - x_i)(1 - F(x_i)^N).

    The sum over gaps is the integral itself.  It never subtracts numbers near one another, so it holds for N = 1e6 and
    1e7 samples; equal samples give their value to the last bit, and N = 1 gives the mean.

    Args:    ordered [n], ascending; ranks, any shape, real and at least 1; counts [n], how often each was drawn.
    Returns: f64 of the shape of `ranks`.
    Raises:  ValueError if the sample is empty or not ascending, or a rank count is below 1.
    """
    x = np.asarray(ordered, np.float64)
    N = np.asarray(ranks, np.float64)
    if x.ndim != 1 or not x.size or np.any(x[1:] < x[:-1]):
        raise ValueError(f"sample_max: ordered must be one ascending row of values, found shape {x.shape}")
    if np.any(N < 1):
        raise ValueError(f"sample_max: ranks must be at least 1, found {N.min()}")
    c = np.ones(x.size) if counts is None else np.asarray(counts, np.float64)
    return gap_sum(x, np.cumsum(c), N)


def gap_sum(x: Floats, below: Floats, ranks: Floats) -> Floats:
    """E[max_N] where `below[i]` of `below[-1]` draws are at most x[i], unchecked.

    Args:    x [n], ascending; below [..., n]; ranks of any shape.
    Returns: f64 [..., *shape of ranks].
    """
    n = below[..., -1:]
    out = np.empty(below.shape[:-1] + ranks.shape)
    for at, N in np.ndenumerate(ranks):
        vanished = below <= n * np.exp(VANISHED / N)  # these gaps count in full
        k = int(vanished.sum(-1).min()) if below.ndim > 1 else int(vanished.sum())
        missing = (n - below[..., k:-1]) / n
        with np.errstate(divide="ignore"):  # log 0 of values that were not drawn
            share = -np.expm1(N * np.log1p(-missing))
        out[(..., *at)] = x[k] + share @ np.diff(x[k:])
    return out
