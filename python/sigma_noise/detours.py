"""Where the time of one rank's quanta went: the level of its clock, detours, and jitter.

Fixed work, quantum i of T_i seconds.  b(t) is the 5th percentile of T within the segment of constant level that t lies
in (a segment is what `changes.segments` finds), b0 the lowest of them, tau a threshold:

    level_i  = min(max(0, T_i - b0), b(t_i) - b0)      a slower clock, for as long as it is one
    burst_i  = max(0, T_i - b(t_i)) if above tau       a detour: the work was interrupted
    jitter_i = max(0, T_i - b(t_i)) if not             the rest

each divided by sum T_i.  burst + jitter is the noise of the study of Sottile & Minnich 2004 with a floor that moves;
with level it is max(0, T_i - b0), what the same work would have been spared at its best level throughout.

Fixed time, count c_i in quanta of q seconds: b(t) is the 95th percentile of counts within the segment, b0 the highest
of them; q max(0, 1 - c_i / b(t_i)) was taken from quantum i, and with the level q max(0, 1 - c_i / b0).  A count is
known to one chunk: where a chunk is long against what is looked for, a loss is more than one, and tau two or more.

Gaps between reads of a clock (selfish): those longer than tau alone are kept; a detour is gap - g0, of a known window.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sigma_noise.intervals import NORMAL_MAD, Array, series

FLOOR = 0.05  # the quantile that is called undisturbed
MIN_GAP_TAU_S, GAP_TAU_FLOORS = 1e-6, 9.0
MIN_WORK_TAU_S, WORK_TAU_SIGMA = 2e-6, 6.0
ROUNDING = 1e-9  # of a window that gaps may fill to the last ns


@dataclass(frozen=True)
class Detours:
    """Begin and length of each, seconds [d], in order of time, and the quantum (gap) in which it began, [d]."""

    start_s: Array
    length_s: Array
    index: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start_s)


@dataclass(frozen=True)
class Noise:
    """Shares of the observed time, 0..1, and the detours above tau.  NaN where there is no detour to describe."""

    level: float
    burst: float
    jitter: float
    observed_s: float
    tau_s: float
    detours: Detours

    @property
    def share(self) -> float:
        """Against the floor of its time, sum max(0, T - b(t)) / sum T: burst + jitter.

        The headline: a clock that ran faster for a minute does not make noise of the rest of the day.
        """
        return self.burst + self.jitter

    @property
    def total(self) -> float:
        """Against the best floor of all: level + burst + jitter."""
        return self.level + self.burst + self.jitter

    @property
    def per_second(self) -> float:
        return len(self.detours) / self.observed_s

    @property
    def longest_s(self) -> float:
        return float(self.detours.length_s.max()) if len(self.detours) else float("nan")

    def quantile_s(self, q: float) -> float:
        """Of the lengths of detours: 0.5, 0.99, 0.999."""
        return float(np.quantile(self.detours.length_s, q)) if len(self.detours) else float("nan")

    def by_decade(self) -> dict[int, float]:
        """Share of the observed time in detours of 10^k to 10^(k+1) seconds, by k; the values add up to burst."""
        lengths = self.detours.length_s
        # log10 of 1e-3 may come out below -3: the decade is the one whose ends, compared as numbers, hold it.
        decade = np.floor(np.log10(lengths)).astype(np.int64)
        decade += (10.0 ** (decade + 1) <= lengths).astype(np.int64) - (10.0**decade > lengths)
        return {int(k): float(lengths[decade == k].sum() / self.observed_s) for k in np.unique(decade)}


def ccdf(length_s: ArrayLike) -> tuple[Array, Array]:
    """Distinct lengths in rising order, and the share of detours at least that long: 1 at the shortest."""
    lengths, counts = np.unique(np.asarray(length_s, np.float64), return_counts=True)
    return lengths, counts[::-1].cumsum()[::-1] / max(1, counts.sum())


def floor(x: ArrayLike, bounds: ArrayLike, quantile: float = FLOOR) -> Array:
    """b [n]: the quantile of x [n] within each segment.  bounds: as of `changes.segments`, from 0 to n.

    The quantile is one of the samples, so that a floor is a time that was measured.
    """
    x, bounds = series(x), np.asarray(bounds, np.int64)
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(x) or (np.diff(bounds) <= 0).any():
        raise ValueError(f"bounds must rise from 0 to {len(x)}, found {bounds.tolist()}")
    method = "lower" if quantile < 0.5 else "higher"
    levels = [np.quantile(x[a:b], quantile, method=method) for a, b in pairwise(bounds)]
    return np.repeat(np.array(levels), np.diff(bounds))


def taken(count: ArrayLike, quantum_s: float, best: ArrayLike) -> Array:
    """What was taken from quanta of fixed time, seconds [n], by their counts [n] and the floor of these."""
    return quantum_s * np.maximum(0.0, 1 - told(count, quantum_s, best) / best)


def told(count: ArrayLike, quantum_s: float, best: ArrayLike) -> Array:
    """Counts [n], those within a chunk of their best [n] set to it where a chunk is longer than the least tau.

    Of chunks of which 4.1 fit into a quantum, 4 or 5 end in one that nothing disturbs.
    """
    count, best = np.asarray(count, np.float64), np.asarray(best, np.float64)
    return np.where((quantum_s / best > MIN_WORK_TAU_S) & (np.abs(count - best) <= 1), best, count)


def gap_threshold(g0_s: float) -> float:
    """tau of gaps between reads of a clock, to be compared with the whole gap: max(1 us, 9 g0), as in netgauge."""
    return max(MIN_GAP_TAU_S, GAP_TAU_FLOORS * g0_s)


def work_threshold(duration_s: ArrayLike, bounds: ArrayLike) -> float:
    """tau of fixed work, to be compared with T - b: max(2 us, 6 sigma), sigma = 1.4826 MAD of T within segments.

    For fixed time pass q (1 - c/b) instead of T.
    """
    x = series(duration_s, "duration_s")
    spread = np.abs(x - floor(x, bounds, 0.5))
    return max(MIN_WORK_TAU_S, WORK_TAU_SIGMA * NORMAL_MAD * float(np.median(spread)))


def find(start_s: ArrayLike, duration_s: ArrayLike, floor_s: ArrayLike, tau_s: float) -> Detours:
    """The samples [n] that took more than tau above their floor ([n] or a number), each a detour of T - b.

    Raises: ValueError on lengths that differ, or a tau that is not positive.
    """
    start_s, duration_s = series(start_s, "start_s"), series(duration_s, "duration_s")
    _check(start_s, duration_s, "duration_s", tau_s)
    excess = duration_s - floor_s
    index = np.flatnonzero(excess > tau_s)
    return Detours(start_s[index], excess[index], index)


def fixed_work(
    start_s: ArrayLike, duration_s: ArrayLike, bounds: ArrayLike, tau_s: float | None = None
) -> Noise:
    """Noise of quanta of fixed work: start_s, duration_s [n], bounds of their segments, tau by `work_threshold`.

    The observed time is sum T: where quanta follow each other at once, the whole window.  Raises: ValueError.
    """
    duration_s = series(duration_s, "duration_s")
    if duration_s.min() < 0 or duration_s.sum() <= 0:
        raise ValueError(f"duration_s must not be negative, nor all of it 0, found {duration_s.min():g}")
    b = floor(duration_s, bounds)
    tau_s = work_threshold(duration_s, bounds) if tau_s is None else tau_s
    detours = find(start_s, duration_s, b, tau_s)
    excess = np.maximum(0.0, duration_s - b)
    level = np.minimum(np.maximum(0.0, duration_s - b.min()), b - b.min())
    return _noise(level, excess, float(duration_s.sum()), tau_s, detours)


def fixed_time(
    start_s: ArrayLike, count: ArrayLike, quantum_s: float, bounds: ArrayLike, tau_s: float | None = None
) -> Noise:
    """Noise of quanta of fixed time: start_s, count of work done [n], quantum in seconds.

    Neighbouring quanta that each lost more than tau are one detour: it may have eaten whole quanta.  A quantum that
    was skipped (its start is missing) parts two.  Of chunks longer than the least tau, tau is raised to two.
    Raises: ValueError.
    """
    start_s, count = series(start_s, "start_s"), series(count, "count")
    if not quantum_s > 0 or count.min() < 0:
        raise ValueError(
            f"quantum_s must be positive and count not negative, found {quantum_s} and {count.min():g}"
        )
    b = floor(count, bounds, 1 - FLOOR)
    if b.min() <= 0:
        raise ValueError("count must be positive in more than a twentieth of each segment")
    lost = taken(count, quantum_s, b)
    if tau_s is None:
        tau_s = work_threshold(quantum_s * (1 - told(count, quantum_s, b) / b), bounds)
    _check(start_s, count, "count", tau_s)
    two_chunks_s = float((quantum_s * (1 - (b - 2) / b)).max())  # as `taken` has it, to the last bit
    if two_chunks_s > 2 * MIN_WORK_TAU_S:
        tau_s = max(tau_s, two_chunks_s)
    found = np.flatnonzero(lost > tau_s)
    starts_new = np.ones(len(found), bool)
    starts_new[1:] = (np.diff(found) > 1) | (np.diff(start_s[found]) > 1.5 * quantum_s)
    first = np.flatnonzero(starts_new)
    length = np.add.reduceat(lost[found], first) if len(first) else np.empty(0)
    level = taken(count, quantum_s, b.max()) - lost
    detours = Detours(start_s[found[first]], length, found[first])
    return _noise(np.maximum(0.0, level), lost, quantum_s * len(count), tau_s, detours)


def gaps(
    start_s: ArrayLike, gap_s: ArrayLike, g0_s: float, window_s: float, tau_s: float | None = None
) -> Noise:
    """Noise of a loop of clock reads: gaps [d] longer than tau, the shortest gap g0, and the window observed.

    Gaps that are not longer than tau are passed over; what they hide is not seen, so level and jitter are 0.
    Raises: ValueError if the gaps do not fit into the window.
    """
    start_s, gap_s = np.asarray(start_s, np.float64), np.asarray(gap_s, np.float64)
    tau_s = gap_threshold(g0_s) if tau_s is None else tau_s
    _check(start_s, gap_s, "gap_s", tau_s)
    if (
        not 0 <= g0_s <= tau_s
        or not isfinite(window_s)
        or window_s <= 0
        or gap_s.sum() > window_s * (1 + ROUNDING)
    ):
        raise ValueError(
            f"g0_s must lie in 0..tau ({tau_s:g}) and window_s hold all gaps ({gap_s.sum():g} s), found {g0_s:g} and "
            f"{window_s:g}"
        )
    index = np.flatnonzero(gap_s > tau_s)
    detours = Detours(start_s[index], gap_s[index] - g0_s, index)
    return Noise(0.0, float(detours.length_s.sum() / window_s), 0.0, window_s, tau_s, detours)


def _noise(level: Array, excess: Array, observed_s: float, tau_s: float, detours: Detours) -> Noise:
    burst = float(excess[excess > tau_s].sum())
    jitter = float(excess[excess <= tau_s].sum())
    return Noise(
        float(level.sum()) / observed_s, burst / observed_s, jitter / observed_s, observed_s, tau_s, detours
    )


def _check(start_s: Array, value: Array, name: str, tau_s: float) -> None:
    if len(start_s) != len(value):
        raise ValueError(f"{name} must have the {len(start_s)} samples of start_s, found {len(value)}")
    if not (isfinite(tau_s) and tau_s > 0):
        raise ValueError(f"tau_s must be positive, found {tau_s}")
