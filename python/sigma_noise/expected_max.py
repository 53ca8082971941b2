"""The expected longest of N ranks, E[max_N] = integral of 1 - F(x)^N, of a measured sample.

A barrier ends when the last rank arrives, so a step of N independent ranks with cdf F takes E[max_N] on average, and
noise that costs one rank E[W] - floor costs the job E[max_N] - floor (Petrini, Kerbyson & Pakin, SC 2003).
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

VANISHED = -45.0  # log F^N below which 1 - F^N is 1 to the last bit


def gap_sum(x: Floats, below: Floats, ranks: Floats) -> Floats:
    """E[max_N] where `below[i]` of `below[-1]` draws are at most x[i]: x_1 + sum (x_{i+1} - x_i)(1 - F(x_i)^N).

    The sum over gaps is the integral itself.  It never subtracts numbers near one another, so it holds for N = 1e6 and
    1e7 samples; equal samples give their value to the last bit, and N = 1 gives the mean.

    Args:    x [n], ascending; below [..., n]; ranks of any shape, real and at least 1; unchecked.
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
