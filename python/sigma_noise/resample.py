"""What else could have been measured: other stretches of time on the same hosts, other hosts at the same time.

Each source alone, and the interval holds both: to draw hosts and stretches at once counts the noise of single windows
twice and more (Owen, Annals of Applied Statistics 2007).
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from sigma_noise.blocks import block_length
from sigma_noise.pool import Draws, Pool

Floats = NDArray[np.float64]

CHUNK = 1 << 18  # counts of a batch: 2 MB stay in a cache
LEVEL = 0.9

Statistic = Callable[[list[Draws]], Floats]


def interval(
    statistic: Statistic, estimate: Floats, pools: Sequence[Pool], resamples: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """90 % interval of `statistic(draws)` [B, K] about its estimate [K]: what holds that of time and that of hosts."""
    sources = [over_time] if len(pools[0].hosts) < 2 else [over_time, over_hosts]
    ends = []
    for source in sources:
        values = np.concatenate([statistic(draws) for draws in source(pools, resamples, rng)])
        ends.append(bias_corrected(values, estimate))
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


def over_time(pools: Sequence[Pool], resamples: int, rng: np.random.Generator) -> Iterator[list[Draws]]:
    """Batches of circular blocks of time, the same for all hosts and pools: what falls together stays together.

    The block's share of a run is the largest that any pool's correlation time asks for; pools may cut a step into
    different numbers of windows.
    """
    share = max(block_length(n, pool.tau) / n for pool in pools for n in [min(x.size for x in pool.longest)])
    for batch in _batches(pools, resamples):
        begin = rng.random((batch, max(1, round(1 / share))))
        yield [
            Draws(np.ones((batch, len(pool.hosts))), _instants(pool.longest, begin, share)) for pool in pools
        ]


def over_hosts(pools: Sequence[Pool], resamples: int, rng: np.random.Generator) -> Iterator[list[Draws]]:
    """Batches of H - 1 of H hosts with replacement, whose variance is unbiased at small H (Rao & Wu, JASA 1988)."""
    H = len(pools[0].hosts)
    for batch in _batches(pools, resamples):
        counts = rng.multinomial(H - 1, np.full(H, 1 / H), size=batch).astype(np.float64)
        yield [
            Draws(counts, tuple(np.broadcast_to(1.0, (batch, x.size)) for x in pool.longest))
            for pool in pools
        ]


def _batches(pools: Sequence[Pool], resamples: int) -> Iterator[int]:
    most = max(1, CHUNK // max(pool.instants for pool in pools))
    for first in range(0, resamples, most):
        yield min(most, resamples - first)


def _instants(series: Sequence[Floats], begin: Floats, share: float) -> tuple[Floats, ...]:
    """How often blocks that begin at fractions `begin` [B, blocks] of a run hold each instant, [B, n] a host."""
    drawn: dict[int, Floats] = {}
    for n in {x.size for x in series}:
        block = max(1, round(share * n))
        at = (np.floor(begin * n).astype(np.int64)[..., None] + np.arange(block)) % n
        flat = at.reshape(len(begin), -1) + n * np.arange(len(begin))[:, None]
        counts = np.bincount(flat.ravel(), minlength=n * len(begin))
        drawn[n] = counts.reshape(len(begin), n).astype(np.float64)
    return tuple(drawn[x.size] for x in series)
