"""What else could have been measured: other stretches of time on the same hosts, other hosts at the same time.

Each source alone, and the interval holds both: to draw hosts and stretches at once counts the noise of single windows
twice and more (Owen, Annals of Applied Statistics 2007).
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from sigma_noise.pool import Draws, Pool

Floats = NDArray[np.float64]

MOST_BLOCKS = 1024  # of time: more would sharpen nothing, and what is drawn is counted by block
LEVEL = 0.9

Statistic = Callable[[list[Draws]], Floats]


def interval(
    statistic: Statistic, estimate: Floats, pools: Sequence[Pool], resamples: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """90 % interval of `statistic(draws)` [B, K] about its estimate [K]: what holds that of time and that of hosts."""
    sources = [over_time] if len(pools[0].hosts) < 2 else [over_time, over_hosts]
    ends = []
    for source in sources:
        ends.append(bias_corrected(statistic(source(pools, resamples, rng)), estimate))
    low = np.minimum(np.min([e[0] for e in ends], axis=0), estimate)
    high = np.maximum(np.max([e[1] for e in ends], axis=0), estimate)
    return low, high


def bias_corrected(values: Floats, estimate: Floats) -> tuple[Floats, Floats]:
    """Ends of a 90 % interval from resampled values [B, K], Efron's BC (Canadian Journal of Statistics 1981).

    z0 = the normal quantile of the share of values below the estimate; the ends are the quantiles Phi(2 z0 -+ 1.645).
    A resample of a heavy tail is mostly below its sample, as a sample is mostly below the truth.  The correction is
    itself an estimate, so it only ever widens the plain interval of quantiles.
    """
    below = ((values < estimate).mean(0) + (values <= estimate).mean(0)) / 2
    z0 = ndtri(np.clip(below, 0.05, 0.95))
    z = ndtri((1 + LEVEL) / 2)
    low, high = np.minimum(ndtr(2 * z0 - z), ndtr(-z)), np.maximum(ndtr(2 * z0 + z), ndtr(z))
    ends = [(np.quantile(v, a), np.quantile(v, b)) for v, a, b in zip(values.T, low, high, strict=True)]
    return np.array(ends).T[0], np.array(ends).T[1]


def over_time(pools: Sequence[Pool], resamples: int, rng: np.random.Generator) -> list[Draws]:
    """Stretches of time with replacement (Carlstein 1986), the same for all hosts and pools: what falls together stays.

    A run is cut into as many equal stretches as the longest correlation time of the pools lets it, and 1,024 at most;
    pools may cut a step into different numbers of windows.
    """
    n = [min(x.size for x in pool.longest) for pool in pools]
    blocks = min(
        MOST_BLOCKS, *(size // block_length(size, pool.tau) for size, pool in zip(n, pools, strict=True))
    )
    times = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples).astype(np.float64)
    return [
        Draws(times, np.concatenate([np.arange(x.size) * blocks // x.size for x in pool.longest]))
        for pool in pools
    ]


def over_hosts(pools: Sequence[Pool], resamples: int, rng: np.random.Generator) -> list[Draws]:
    """H - 1 of H hosts with replacement, whose variance is unbiased at small H (Rao & Wu, JASA 1988)."""
    H = len(pools[0].hosts)
    times = rng.multinomial(H - 1, np.full(H, 1 / H), size=resamples).astype(np.float64)
    return [Draws(times, np.repeat(np.arange(H), [x.size for x in pool.longest])) for pool in pools]


def block_length(n: int, tau: float) -> int:
    """Length of blocks, in samples, that serves n samples of correlation time tau best.

    (6 rho^2 / (1 - rho^2)^2 * n)^(1/3), the optimum for resampled blocks (Politis & White 2004) of an
    autoregression of order one whose correlation time is tau; at most n/4, so that four blocks differ.
    """
    rho = (tau - 1) / (tau + 1)
    best = (6 * rho**2 / (1 - rho**2) ** 2 * n) ** (1 / 3)
    return int(np.clip(np.ceil(best), 1, max(1, n // 4)))
