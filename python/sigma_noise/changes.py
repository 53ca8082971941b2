"""When the level of a series changed, with all of it at hand; `online` finds changes while samples come in.

On log medians y of `blocks` of samples (a ratio is a difference there, and a detour no outlier), the
segmentation that minimises

    sum over segments of sum (y - mean)^2  +  PENALTY sigma^2 tau log(m)   a change,

m blocks, sigma^2 tau their variance times autocorrelation time (Killick, Fearnhead & Eckley 2012).  Both are taken
of what is left beside a running median: taken of the series, the change that is sought would pass for
autocorrelation.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, log, sqrt
from typing import NamedTuple
from zlib import crc32

import numpy as np
import ruptures
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import median_filter
from scipy.signal import lfilter

from sigma_noise.detours import floor
from sigma_noise.intervals import NORMAL_MAD, Array, Interval, initial_positive_sum, median_shift, series

SAMPLES_A_BLOCK = 8
MOST_BLOCKS = 1000
LEAST_BLOCKS = 30  # in a segment
WINDOWS = 10
MOST_PHI = 0.97
CLIP_SIGMA = 2.0  # of a block's distance from the running median, so that a block full of detours is no level
# `for n in 1000 2000 4000 8000; do python -m sigma_noise.changes $n; done` prints penalties with which 5 % of series
# without a change show one: 1.18 to 1.69.
PENALTY = 1.7


class Sides(NamedTuple):
    """Median of a gauge in the segments before and after a change, NaN where it was not read."""

    before: float
    after: float


@dataclass(frozen=True)
class Change:
    """A new level from sample `index`, at `time_s`, on.  `shift` is after / before - 1 of the medians, which are of
    seconds or, in fixed time, of chunks; `clocks` are of the processors that were watched, by gauge.
    """

    time_s: float
    index: int
    before: float
    after: float
    shift: Interval
    clocks: Mapping[str, Sides] = field(default_factory=dict)


def block_medians(x: Array) -> tuple[Array, int]:
    """Medians of runs of w samples, [n // w], and w: 8, fewer where n < 480, more where n > 8,000."""
    n = len(x)
    width = max(1, min(SAMPLES_A_BLOCK, n // (2 * LEAST_BLOCKS)), ceil(n / MOST_BLOCKS))
    whole = n // width * width
    return np.median(x[:whole].reshape(-1, width), axis=1), width


def running_median(y: Array) -> Array:
    """Of the 2 * 30 + 1 blocks about each, [m]: follows steps, and neither detours nor noise."""
    return median_filter(y, 2 * LEAST_BLOCKS + 1, mode="reflect")


def long_run_variance(residual: Array) -> float:
    """sigma^2 tau of y - running_median(y), [m]: the median over windows, lag by lag.

    A window of w blocks loses (sigma^2 tau) / w of each autocovariance to its own mean, which is given back.  The
    larger of two: tau from the initial positive sequence, and (1 + phi)/(1 - phi) of the first lag, which windows
    that are short against tau do not cut off (phi with Kendall's 1954 correction for w).
    """
    size = max(LEAST_BLOCKS, len(residual) // WINDOWS)
    windows = np.lib.stride_tricks.sliding_window_view(residual, size)[:: size // 2]
    power = np.abs(np.fft.rfft(windows - windows.mean(axis=1, keepdims=True), 2 * size, axis=1)) ** 2
    lags = np.arange(size // 2)
    gamma = np.median(np.fft.irfft(power, axis=1)[:, lags] / (size - lags), axis=0)
    if gamma[0] <= 0:
        return 0.0
    phi = gamma[1] / gamma[0]
    phi = min(phi + (1 + 3 * phi) / size, MOST_PHI)
    tau = max(initial_positive_sum(gamma), (1 + phi) / (1 - phi))
    gamma += gamma[0] * tau / size
    return float(gamma[0] * max(initial_positive_sum(gamma), (1 + phi) / (1 - phi)))


def _prepared(x: Array) -> tuple[Array, float, int]:
    """Log block medians with none further than CLIP_SIGMA from the running one, their sigma^2 tau log m, and w."""
    medians, width = block_medians(x)
    y = np.log(medians)
    level = running_median(y)
    residual = y - level
    reach = CLIP_SIGMA * NORMAL_MAD * float(np.median(np.abs(residual)))
    residual = np.clip(residual, -reach, reach)
    return level + residual, long_run_variance(residual) * log(len(y)), width


def segments(x: ArrayLike, penalty: float = PENALTY) -> NDArray[np.int64]:
    """Where segments of x [n] begin, and n: int64 [segments + 1].  x > 0, in order of time.

    Raises: ValueError on values that are not positive and finite.
    """
    x = series(x)
    if x.min() <= 0:
        raise ValueError(f"x must be positive, found {x.min():g} at {int(x.argmin())}")
    if len(x) < 2 * LEAST_BLOCKS or np.ptp(x) == 0:
        return np.array([0, len(x)])
    y, unit, width = _prepared(x)
    if np.ptp(y) == 0:  # detours alone leave every block's median where it is
        return np.array([0, len(x)])
    least = np.finfo(float).eps * np.ptp(y) ** 2  # of two exact levels, which have no variance
    found = _pelt(y, max(penalty * unit, least))
    return _refined(np.log(x), np.array([0, *(width * k for k in found), len(x)]), width)


def spread_out(count: ArrayLike) -> Array:
    """Counts [n], each moved evenly within its chunk, by up to half of one either way; none below half a chunk.

    Where 4 or 5 chunks end in a quantum, medians of counts know nothing between: they stay where the level moves, and
    jump where it does not.  Those of counts so moved follow it, to a tenth of a chunk (Machado & Santos Silva 2005).
    """
    x = series(count, "count")
    rng = np.random.default_rng(crc32(x))  # by its own counts: ranks moved alike would alarm alike
    return np.maximum(x + rng.uniform(-0.5, 0.5, len(x)), 0.5)


def segments_of_counts(count: ArrayLike) -> NDArray[np.int64]:
    """The same of work done in quanta of fixed time; one segment where most quanta of a stretch did none: that was
    stopped, which is no level.
    """
    x = series(count, "count")
    whole = np.array([0, len(x)])
    if np.ptp(x) == 0:
        return whole
    bounds = segments(spread_out(x))
    return bounds if floor(x, bounds, 0.5).min() > 0 else whole


def _pelt(y: Array, penalty: float) -> list[int]:
    """Where y changes, in blocks.  A linear kernel is the squared error, and this search of ruptures' is in C."""
    search = ruptures.KernelCPD(kernel="linear", min_size=LEAST_BLOCKS, jump=1)
    return [int(k) for k in search.fit(y - y.mean()).predict(pen=penalty)[:-1]]


def _refined(z: Array, bounds: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Each inner bound moved within two blocks to where absolute distances to both sides' medians are least."""
    refined = bounds.copy()
    for i in range(1, len(bounds) - 1):
        before, after = np.median(z[bounds[i - 1] : bounds[i]]), np.median(z[bounds[i] : bounds[i + 1]])
        first = bounds[i] - 2 * width
        near = z[first : bounds[i] + 2 * width]
        gain = np.abs(near - before) - np.abs(near - after)  # of calling a sample "after"
        refined[i] = first + int(np.argmin(np.concatenate([[0.0], np.cumsum(gain)])))
    return refined


def changes(
    time_s: ArrayLike,
    x: ArrayLike,
    *,
    clocks: Mapping[str, tuple[Array, Array]] | None = None,
    end_s: float = np.inf,
    penalty: float = PENALTY,
    seed: int = 0,
) -> list[Change]:
    """The changes of level of x [n], whose samples began at time_s [n].

    Args:   clocks: gauges by name, when each was read, by the clock of time_s, and what it said.
            end_s: of the last sample, beyond which clocks are of other work.
    Raises: ValueError as `segments`, or if time_s is not of x's length.
    """
    x, time_s = series(x), series(time_s, "time_s")
    if len(time_s) != len(x):
        raise ValueError(f"time_s must have the {len(x)} samples of x, found {len(time_s)}")
    return _told(time_s, x, segments(x, penalty), clocks or {}, end_s, seed)


def changes_of_counts(
    time_s: ArrayLike,
    count: ArrayLike,
    *,
    clocks: Mapping[str, tuple[Array, Array]] | None = None,
    end_s: float = np.inf,
    seed: int = 0,
) -> list[Change]:
    """The same of work done in quanta of fixed time, whose medians are of counts `spread_out`: less is slower."""
    count, time_s = series(count, "count"), series(time_s, "time_s")
    if len(time_s) != len(count):
        raise ValueError(f"time_s must have the {len(count)} samples of count, found {len(time_s)}")
    bounds = segments_of_counts(count)
    return _told(time_s, spread_out(count), bounds, clocks or {}, end_s, seed)


def _told(
    time_s: Array,
    x: Array,
    bounds: NDArray[np.int64],
    clocks: Mapping[str, tuple[Array, Array]],
    end_s: float,
    seed: int,
) -> list[Change]:
    found = []
    for i, at in enumerate(bounds[1:-1], 1):
        before, after = x[bounds[i - 1] : at], x[at : bounds[i + 1]]
        shift = median_shift(before, after, seed=seed)
        until_s = time_s[bounds[i + 1]] if bounds[i + 1] < len(x) else end_s
        edges = (time_s[bounds[i - 1]], time_s[at], until_s)
        sides = {name: _sides(*gauge, edges) for name, gauge in clocks.items()}
        medians = float(np.median(before)), float(np.median(after))
        found.append(Change(float(time_s[at]), int(at), *medians, shift, sides))
    return found


def _sides(at_s: Array, value: Array, edges_s: tuple[float, float, float]) -> Sides:
    is_read = np.isfinite(value)
    parts = (value[is_read & (at_s >= begin) & (at_s < end)] for begin, end in pairwise(edges_s))
    return Sides(*(float(np.median(part)) if len(part) else float("nan") for part in parts))


def critical_penalty(x: Array) -> float:
    """The least `penalty` with which x has no change, to 1 %."""
    y, unit, _ = _prepared(x)
    low, high = 0.1, 100.0
    while high > 1.01 * low:
        middle = sqrt(low * high)
        low, high = (middle, high) if _pelt(y, middle * unit) else (low, middle)
    return high


def calibrate(
    n: int,
    repetitions: int,
    seed: int,
    share: float = 0.05,
    phis: tuple[float, ...] = (0.0, 0.5, 0.9, 0.97),
) -> Iterator[tuple[float, float]]:
    """(phi, penalty) for series of n samples without a change: exp(AR(1) of phi and standard deviation 2 %).

    The penalty is the one with which `share` of the series show a change all the same.
    """
    rng = np.random.default_rng(seed)
    for phi in phis:
        shocks = rng.normal(size=(repetitions, n + 500)) * 0.02 * sqrt(1 - phi * phi)
        x = np.exp(lfilter([1], [1, -phi], shocks, axis=1)[:, 500:])
        yield phi, float(np.quantile([critical_penalty(row) for row in x], 1 - share))


if __name__ == "__main__":
    for phi, penalty in calibrate(int(sys.argv[1]), repetitions=400, seed=0):
        print(f"n = {sys.argv[1]}, phi = {phi}: {penalty:.2f}", flush=True)
