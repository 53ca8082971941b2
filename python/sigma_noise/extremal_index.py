"""The extremal index: how far large values come in clusters of time, theta = 1 / mean cluster size.

It belongs to maxima over TIME in one rank, where neighbours in a series are alike: P(max of T windows <= x) is about
F(x)^(theta T).  A barrier takes the maximum over RANKS at one instant: N draws of the marginal F, whatever each rank's
series does before and after, so theta has no place in `project`; to put it there is the commonest error of the trade.
"""

import numpy as np
from numpy.typing import ArrayLike


def extremal_index(is_above: ArrayLike) -> float:
    """theta in 0..1 from which windows of one rank, in order, exceed a high threshold.

    The intervals estimator of Ferro & Segers (JRSS B 2003) on the gaps between exceedances.
    Raises: ValueError if fewer than two windows exceed it.
    """
    gaps = np.diff(np.flatnonzero(np.asarray(is_above))).astype(np.float64)
    if not gaps.size:
        raise ValueError("extremal_index: at least two windows must exceed the threshold, found fewer")
    if gaps.max() <= 2:
        return float(min(1.0, 2 * gaps.sum() ** 2 / (gaps.size * (gaps**2).sum())))
    return float(min(1.0, 2 * (gaps - 1).sum() ** 2 / (gaps.size * ((gaps - 1) * (gaps - 2)).sum())))
