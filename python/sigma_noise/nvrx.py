"""The median-based straggler score of NVIDIA Resiliency Extension, to be shown beside ours.

It sees a rank that is slow throughout.  A rank with a rare long detour keeps its median, and so a score of 1.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLD = 0.75  # a rank below is a straggler to its API; its Lightning example takes 0.7


def nvrx_score(*kernels: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """Relative score of each rank: 1 for the fastest, towards 0 for a slow one.

        score_r = sum_k w_rk ref_k / med_rk / sum_k w_rk,   ref_k = min_r med_rk,   w_rk = total time of kernel k

    (`straggler/reporting.py` of nvidia-resiliency-ext 0.7.0.)

    Args:    one or several kernels, each the durations of its calls by rank, in seconds.
    Raises:  ValueError if kernels have different ranks, or a rank has no call of one.
    """
    if len({len(kernel) for kernel in kernels}) != 1:
        found = ", ".join(str(len(kernel)) for kernel in kernels) or "none"
        raise ValueError(f"nvrx_score: kernels must have the same ranks, found {found}")
    ranks = [[np.asarray(calls, np.float64) for calls in kernel] for kernel in kernels]
    if not all(calls.size for kernel in ranks for calls in kernel):
        raise ValueError("nvrx_score: every rank must have a call of every kernel")
    median = np.array([[np.median(calls) for calls in kernel] for kernel in ranks])  # [K, P]
    weight = np.array([[calls.sum() for calls in kernel] for kernel in ranks])
    return (weight * median.min(1, keepdims=True) / median).sum(0) / weight.sum(0)
