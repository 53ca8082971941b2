"""Which of N numbers stand out, at one rate of false alarms for all N together."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sigma_noise.intervals import NORMAL_MAD

# What a MAD so scaled lacks in small samples (Croux and Rousseeuw 1992); N / (N - 0.8) beyond.
SMALL_SAMPLE = {2: 1.196, 3: 1.495, 4: 1.363, 5: 1.206, 6: 1.200, 7: 1.140, 8: 1.129, 9: 1.107}
EFFICIENCY = 0.37  # of the MAD against the standard deviation: N numbers are worth 0.37 N degrees of freedom
PRIOR_FREEDOM = 3.0  # degrees of freedom that `spread` is worth


def robust_z(values: ArrayLike, spread: float = 0.0) -> NDArray[np.float64]:
    """How many robust deviations each of N values lies above their median.

        z = (x - median) / s,   s^2 = (f0 spread^2 + f MAD^2) / (f0 + f),   f = 0.37 (N - 1)

    MAD is scaled to a standard deviation.  `spread` is the deviation that is expected beforehand and counts like
    f0 = 3 degrees of freedom (Smyth 2004, moderated t): it carries few ranks, whose MAD may be anything, and is
    nothing beside many.

    Args:    values [..., N], finite.
    Returns: [..., N]; where nothing varies and nothing is expected to, 0 at the median and infinite off it.
    """
    x = np.asarray(values, np.float64)
    n = x.shape[-1]
    away = x - np.median(x, axis=-1, keepdims=True)
    mad = np.median(np.abs(away), axis=-1, keepdims=True)
    mad *= NORMAL_MAD * SMALL_SAMPLE.get(n, n / (n - 0.8))
    prior, own = _freedom(n, spread)
    scale = np.sqrt((prior * spread**2 + own * mad**2) / max(prior + own, 1e-9))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(away == 0.0, 0.0, away / scale)


def cut(n: int, alpha: float, spread: float = 0.0) -> float:
    """The z which the largest of n numbers passes with probability `alpha` at most.

    Bonferroni, t_{f0 + f}(1 - alpha/n): near the normal quantile z(1 - alpha/n) for many (4.4 at n = 2,048 and
    alpha = 1 %), and far above it for few, whose MAD is a poor estimate.  Infinite where nothing is known.
    """
    freedom = sum(_freedom(n, spread))
    return float(stats.t.isf(alpha / n, freedom)) if freedom else float("inf")


def _freedom(n: int, spread: float) -> tuple[float, float]:
    """Degrees of freedom of what is expected, and of the MAD; that of two numbers is their distance."""
    return PRIOR_FREEDOM if spread > 0.0 else 0.0, EFFICIENCY * (n - 1) if n > 2 else 0.0
