"""How far one set of runs is shifted against another: p-values and intervals, a run being one number."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray
from scipy import stats

MOST_RELABELLINGS = 50_000  # 9 runs against 9; beyond, Welch
STEPS_AT_LEVEL = 3  # fewer p-values than that up to the level: exactness would cost too much power


@dataclass(frozen=True)
class Shift:
    """Of b against a, in the units of both: the difference of means, and how to test any other."""

    estimate: float
    method: str  # "permutation" or "welch"
    _differences: NDArray[
        np.float64
    ]  # permutation: sorted differences, one for each relabelling but the identity
    _error: float  # Welch: standard error and degrees of freedom
    _freedom: float

    def p_above(self, delta: float) -> float:
        """One-sided p-value of "the shift is delta or less"; small where it is more."""
        if self.method == "permutation":
            below = np.searchsorted(self._differences, delta, side="right")
            return float(1 + below) / (1 + len(self._differences))
        return _t_above(self.estimate - delta, self._error, self._freedom)

    def p_below(self, delta: float) -> float:
        """One-sided p-value of "the shift is delta or more"."""
        if self.method == "permutation":
            above = len(self._differences) - np.searchsorted(self._differences, delta, side="left")
            return float(1 + above) / (1 + len(self._differences))
        return _t_above(delta - self.estimate, self._error, self._freedom)

    def interval(self, side: float) -> tuple[float, float]:
        """All shifts which neither p-value, at level `side`, rejects."""
        if self.method == "permutation":
            steps = int(side * (1 + len(self._differences)) + 1e-9)
            if not steps:
                return -np.inf, np.inf
            return float(self._differences[steps - 1]), float(self._differences[-steps])
        reach = stats.t.isf(side, self._freedom) * self._error
        return self.estimate - reach, self.estimate + reach


def shift(a: NDArray[np.float64], b: NDArray[np.float64], level: float) -> Shift:
    """Estimate b - a from two or more runs each, for tests at one-sided `level` and above.

    Exact permutation where there are enough relabellings for that level and no more than can be listed; else Welch.
    If b is a shifted by delta, labels may be exchanged once delta is taken off.  A relabelling that swaps k runs
    raises the difference of means where delta > mean(the k of b) - mean(the k of a): so these differences, sorted,
    are the ends of all intervals (the typical values of Hartigan 1969), and p = (1 + those up to delta) / relabellings.
    """
    difference = float(b.mean() - a.mean())
    relabellings = comb(len(a) + len(b), len(a))
    if level * relabellings >= STEPS_AT_LEVEL and relabellings <= MOST_RELABELLINGS:
        differences = np.sort(_swaps(len(a), len(b)) @ np.concatenate([a, b]))
        return Shift(difference, "permutation", differences, np.nan, np.nan)
    parts = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
    total = parts.sum()
    freedom = total**2 / (parts**2 / [len(a) - 1, len(b) - 1]).sum() if total > 0.0 else len(a) + len(b) - 2.0
    return Shift(difference, "welch", np.empty(0), float(np.sqrt(total)), float(freedom))


@lru_cache(maxsize=8)
def relabellings(n_a: int, n_b: int) -> NDArray[np.bool_]:
    """Every way to call n_a of all runs "a", the identity first: [comb, n_a + n_b]."""
    chosen = np.array(list(combinations(range(n_a + n_b), n_a)))
    is_a = np.zeros((len(chosen), n_a + n_b), bool)
    np.put_along_axis(is_a, chosen, True, axis=1)
    is_a.flags.writeable = False  # it is shared
    return is_a


@lru_cache(maxsize=8)
def _swaps(n_a: int, n_b: int) -> NDArray[np.float64]:
    """Rows that take all runs to mean(swapped of b) - mean(swapped of a)."""
    is_a = relabellings(n_a, n_b)[1:]
    from_b, from_a = is_a[:, n_a:], ~is_a[:, :n_a]
    swapped = from_a.sum(axis=1, keepdims=True)
    rows = np.concatenate([from_a / -swapped, from_b / swapped], axis=1)
    rows.flags.writeable = False
    return rows


def _t_above(distance: float, error: float, freedom: float) -> float:
    if error == 0.0:  # runs that do not differ at all
        return 0.0 if distance > 0.0 else 1.0
    return float(stats.t.sf(distance / error, freedom))
