"""How far ranks are from independent: kappa, from the maxima that were measured."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sigma_noise.expected_max import Floats


def independent_max(series: ArrayLike) -> float:
    """E[max] of one window of each series [m, n], were they independent: integral of 1 - prod F_r(x), exactly.

    What a bootstrap that shuffles each series by itself tends to.
    """
    x = np.asarray(series, np.float64)
    m, n = x.shape
    order = np.argsort(x, axis=None, kind="stable")
    place = np.empty(x.shape, np.int64)
    np.put_along_axis(place, np.argsort(x, axis=1, kind="stable"), np.arange(n)[None, :], axis=1)
    risen = _log_risen(place, n).ravel()[order]  # how far log prod F_r rises at each value
    seen = np.cumsum(place.ravel()[order] == 0)
    F = np.where(seen == m, np.exp(np.minimum(np.cumsum(risen), 0.0)), 0.0)
    values = x.ravel()[order]
    return float(values[0] + np.dot(np.diff(values), 1 - F[:-1]))


def correlation_factor(series: ArrayLike) -> float:
    """kappa(m) = (E[max of m at one instant] - E[W]) / (E[max of m independent] - E[W]) of windows [m, n].

    1 where ranks are independent, 0 where they do the same at every instant; nan where nothing varies.
    """
    x = np.asarray(series, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(
            f"correlation_factor: series must be [m, n] with m of 2 or more, found shape {x.shape}"
        )
    mean = x.mean()
    excess = independent_max(x) - mean
    return float((x.max(axis=0).mean() - mean) / excess) if excess > 1e-12 * mean else float("nan")


def _log_risen(place: NDArray[np.int64], n: int) -> Floats:
    """log F at the first of n values, log (k+1)/k at the next."""
    return np.where(place == 0, -np.log(n), np.log1p(1 / np.maximum(place, 1)))
