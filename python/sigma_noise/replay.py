"""Replay of detour traces: how long ranks take for useful work W, begun anywhere in what was measured.

The idea is LogGOPSim's (Hoefler, Schneider & Lumsdaine, SC 2010): each rank gets a place in a trace.  Here the window
grows by the noise that it absorbs, ranks draw from a pool of traces by host, the trace is a circle up to its full
length, and the seed decides every byte.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CHUNK = 1 << 20  # offsets of a batch


@dataclass(frozen=True)
class Detours:
    """One rank's detours within 0..duration_s, disjoint and in order: begin and length in seconds, [n] each."""

    start_s: Floats
    length_s: Floats
    duration_s: float

    @classmethod
    def of(cls, start_s: ArrayLike, length_s: ArrayLike, duration_s: float) -> "Detours":
        """Detours in any order; those that overlap or touch become one.

        Raises: ValueError if one is negative or not within 0..duration_s, or no time is left for work.
        """
        start, length = np.asarray(start_s, np.float64), np.asarray(length_s, np.float64)
        if start.shape != length.shape or start.ndim != 1 or not np.all(np.isfinite([start, length])):
            raise ValueError(
                f"Detours: start_s and length_s must be two rows of finite seconds, found shapes {start.shape} and "
                f"{length.shape}"
            )
        if start.size and (length.min() < 0 or start.min() < 0 or (start + length).max() > duration_s):
            raise ValueError(f"Detours: all must lie within 0..{duration_s} s and be no shorter than 0 s")
        order = np.argsort(start, kind="stable")
        start, end = start[order], np.maximum.accumulate((start + length)[order])
        first = np.flatnonzero(np.append(True, start[1:] > end[:-1])) if start.size else np.empty(0, np.int64)
        last = np.append(first[1:] - 1, start.size - 1)[: first.size]
        begin, lost = start[first], end[last] - start[first]
        if not lost.sum() < duration_s:
            raise ValueError(f"Detours: {lost.sum()} s of detours leave no time for work in {duration_s} s")
        return cls(begin, lost, float(duration_s))

    @cached_property
    def _lost(self) -> Floats:
        """Noise before each detour, and in all, [n + 1]."""
        return np.concatenate([[0.0], np.cumsum(self.length_s)])

    @cached_property
    def _work(self) -> Floats:
        """Useful work done before each detour, [n]."""
        return self.start_s - self._lost[:-1]

    @property
    def noise(self) -> float:
        """Share of time that is lost."""
        return float(self._lost[-1] / self.duration_s)

    def lost_before(self, time_s: Floats) -> Floats:
        """Noise in 0..time, seconds; time within the trace."""
        begun = np.searchsorted(self.start_s, time_s, side="right")
        last = np.maximum(begun - 1, 0)
        if not self.start_s.size:
            return np.zeros(np.shape(time_s))
        within = np.minimum(time_s - self.start_s[last], self.length_s[last])
        return np.where(begun > 0, self._lost[last] + within, 0.0)

    def window(self, offset_s: Floats, work_s: float) -> Floats:
        """Seconds from each offset within the trace until `work_s` of useful work are done, around the circle.

        W + the noise between: the work done at the offset, W more, and the time at which the trace has done that.
        """
        lost = self.lost_before(offset_s)
        a_turn = self.duration_s - self._lost[-1]
        turns, rest = np.divmod(offset_s - lost + work_s, a_turn)
        absorbed = turns * self._lost[-1] + self._lost[np.searchsorted(self._work, rest, side="left")]
        return work_s + np.maximum(absorbed - lost, 0.0)


Hosts = Sequence[Sequence[Detours]]  # the ranks of each host


def replay(
    hosts: Hosts, work_s: float, ranks: int, windows: int, *, seed: int, is_cosched: bool = False
) -> Floats:
    """How long the last of N ranks takes for useful work W, in each of so many windows: seconds [windows].

    Each window draws whole hosts with replacement, and of the last one as many ranks as are left.  The ranks of a host
    begin at one offset.  Hosts begin each at its own (`is_cosched=False`, where nothing ties the noise of hosts
    together: pessimistic) or all at one (where all that was ever simultaneous still is: optimistic).

    Raises: ValueError if hosts differ in their number of ranks, or a number is not positive.
    Cost:   two binary searches a rank and window.
    """
    size, span = _checked(hosts, work_s)
    if ranks < 1 or windows < 1:
        raise ValueError(f"replay: ranks and windows must be at least 1, found {ranks} and {windows}")
    rng = np.random.default_rng(seed)
    drawn = -(-ranks // size)
    left = ranks - (drawn - 1) * size  # ranks of the last host
    out = np.empty(windows)
    step = max(1, CHUNK // drawn)
    for first in range(0, windows, step):
        n = min(step, windows - first)
        host = rng.integers(len(hosts), size=(n, drawn))
        offset = np.broadcast_to(rng.random((n, 1 if is_cosched else drawn)) * span, host.shape)
        takes_part = np.ones((size, n, drawn), bool)
        takes_part[:, :, -1] = rng.permuted(np.arange(size)[:, None].repeat(n, 1), axis=0) < left
        out[first : first + n] = _longest(hosts, work_s, host, offset, takes_part).max(axis=1)
    return out


def _longest(
    hosts: Hosts, work_s: float, host: Ints, offset: Floats, takes_part: NDArray[np.bool_]
) -> Floats:
    """The longest window of the ranks that take part [G, n, hosts] of each host drawn, [n, hosts].

    Offsets go through a trace in order: a binary search for one far from the last costs five times as much.
    """
    out = np.zeros(host.size)
    host_of, offset = host.ravel(), offset.ravel()
    is_out = ~takes_part.reshape(len(takes_part), -1)
    for h, traces in enumerate(hosts):
        at = np.flatnonzero(host_of == h)
        at = at[np.argsort(offset[at])]
        begin = offset[at]
        longest = np.zeros(at.size)
        for r, trace in enumerate(traces):
            window = trace.window(begin, work_s)
            window[is_out[r][at]] = 0.0
            np.maximum(longest, window, out=longest)
        out[at] = longest
    return out.reshape(host.shape)


def replayed_windows(hosts: Hosts, work_s: float, offsets: Floats) -> list[Floats]:
    """Windows of useful work W begun at the same offsets by every rank: seconds [G, offsets] for each host.

    N ranks at independent offsets are N draws from these, so E[max_N] follows without drawing any.
    """
    _checked(hosts, work_s)
    return [np.stack([trace.window(offsets, work_s) for trace in traces]) for traces in hosts]


def spread_offsets(hosts: Hosts, work_s: float, rng: np.random.Generator, most: int = 1 << 16) -> Floats:
    """Offsets in order, one drawn in each of equal parts of the time that all traces cover.

    16 a window, so that what lies between two of them is little, but 4,096 at least and `most` at most.
    """
    _, span = _checked(hosts, work_s)
    parts = int(np.clip(16 * span / work_s, 4096, most))
    return (np.arange(parts) + rng.random(parts)) * (span / parts)


def covered_s(hosts: Hosts) -> float:
    """Seconds that every trace covers."""
    return min(trace.duration_s for traces in hosts for trace in traces)


def _checked(hosts: Hosts, work_s: float) -> tuple[int, float]:
    """Ranks of a host, and the seconds that every trace covers."""
    sizes = sorted({len(traces) for traces in hosts})
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(f"replay: every host must have the same number of ranks, found {sizes}")
    if not 0 < work_s < np.inf:
        raise ValueError(f"replay: work_s must be positive seconds, found {work_s}")
    return sizes[0], covered_s(hosts)
