"""Which ranks are slow, and which have a tail of long detours, at one rate of false alarms for all ranks together."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sigma_noise.outliers import cut, robust_z

TAIL = 0.999
LEAST_EFFECT = 0.01  # a rank that is less than 1 % off is nobody's business
QUARTERS, RECURS = 4, 3  # a flag wants the effect in three of four quarters of the run
CONTESTS = 64  # blocks of time in which ranks compete for the longest detours


@dataclass(frozen=True)
class Flags:
    """Arrays [P]."""

    level: NDArray[np.float64]  # median, seconds
    tail: NDArray[np.float64]  # q99.9, seconds
    z: NDArray[np.float64]  # robust deviations of log level
    tail_z: NDArray[np.float64]  # the same of log tail / level
    tail_p: NDArray[np.float64]  # that one of P equal ranks wins as many blocks, times P
    slow_quarters: NDArray[np.int64]  # of the run in which the rank was over 1 % slow
    tail_quarters: NDArray[np.int64]
    is_off: NDArray[np.bool_]  # slow over the whole, in however few quarters
    is_slow: NDArray[np.bool_]
    has_tail: NDArray[np.bool_]
    cut: float  # of z


def flag(durations: NDArray[np.float64], alpha: float, spread: float, block: int) -> Flags:
    """Judge the rows of [P, n] seconds, P >= 2, by their medians, and by their q99.9 over the median.

    Slow: the robust z of log med_r passes `cut(P, alpha)`, med_r is over 1 % above the median of ranks, and so it is in
    3 of 4 quarters.  Tail: the same of q99.9_r / med_r, and the rank has the longest detours in more blocks of time
    than one of P equals would (`contest`): numbers as skewed as q99.9 pass any z now and then.

    Args: block: steps after which most ranks have forgotten.
    """
    level, tail = _level_and_tail(durations, 1)[:, :, 0]
    stretch = tail / level
    by_quarter = _level_and_tail(durations, QUARTERS)
    slow_quarters = _recurrence(by_quarter[0])
    tail_quarters = _recurrence(by_quarter[1] / by_quarter[0])
    limit = cut(len(durations), alpha, spread)
    z, tail_z = robust_z(np.log(level), spread), robust_z(np.log(stretch), spread)
    tail_p = contest(durations / level[:, None], float(np.median(stretch)), block)
    is_off = (z > limit) & _over(level)
    return Flags(
        level, tail, z, tail_z, tail_p, slow_quarters, tail_quarters, is_off,
        is_slow=is_off & (slow_quarters >= RECURS),
        has_tail=(tail_z > limit) & _over(stretch) & (tail_p < alpha) & (tail_quarters >= RECURS),
        cut=limit,
    )  # fmt: skip


def contest(durations: NDArray[np.float64], threshold: float, block: int) -> NDArray[np.float64]:
    """p-value, times P, of how many blocks of time each rank wins, [P].

    A block of steps goes to the rank with the most time above `threshold`.  Among P equal ranks, whatever their
    distribution, each wins with probability 1/P, so wins are Binomial(blocks with any such time, 1/P).  One huge
    detour is one win.

    Args: durations [P, n]; block: steps, at least; longer where n / 64 is.
    """
    ranks, n = durations.shape
    length = max(block, -(-n // CONTESTS))
    count = n // length
    excess = np.maximum(durations[:, : count * length] - threshold, 0.0).reshape(ranks, count, length).sum(2)
    contested = excess.max(axis=0) > 0.0
    wins = np.bincount(excess[:, contested].argmax(axis=0), minlength=ranks)
    return np.minimum(1.0, ranks * stats.binom.sf(wins - 1, contested.sum(), 1.0 / ranks))


def _level_and_tail(durations: NDArray[np.float64], parts: int) -> NDArray[np.float64]:
    """Median and q99.9 of each rank and part of its time, [2, P, parts]; the steps that are over are left out."""
    ranks, n = durations.shape
    ordered = np.sort(durations[:, : n // parts * parts].reshape(ranks, parts, -1), axis=2)
    return np.stack([_of_sorted(ordered, p) for p in (0.5, TAIL)])


def _of_sorted(ordered: NDArray[np.float64], p: float) -> NDArray[np.float64]:
    """The p-quantile along the last axis, as `np.quantile`, which takes five times as long for many short rows."""
    below, part = divmod(p * (ordered.shape[-1] - 1), 1.0)
    low = ordered[..., int(below)]
    return low + part * (ordered[..., min(int(below) + 1, ordered.shape[-1] - 1)] - low)


def _recurrence(by_quarter: NDArray[np.float64]) -> NDArray[np.int64]:
    """In how many quarters [P, 4] a rank is over 1 % above the median of ranks, [P]."""
    return _over(by_quarter).sum(axis=1)


def _over(x: NDArray[np.float64]) -> NDArray[np.bool_]:
    return x > (1.0 + LEAST_EFFECT) * np.median(x, axis=0)
