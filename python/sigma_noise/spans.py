"""Sets of time intervals: their union, how much of others they cover, and how found ones match true ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sigma_noise.trace import Series

Stamps = NDArray[np.int64]


def union(start_ns: Stamps, end_ns: Stamps) -> tuple[Stamps, Stamps]:
    """The same time in intervals that are apart and in order; empty ones vanish."""
    live = end_ns > start_ns
    order = np.argsort(start_ns[live], kind="stable")
    start, end = start_ns[live][order], end_ns[live][order]
    if not len(start):
        return start, end
    reach = np.maximum.accumulate(end)
    begins = np.flatnonzero(np.concatenate([[True], start[1:] > reach[:-1]]))
    return start[begins], reach[np.append(begins[1:], len(start)) - 1]


def without(of: tuple[Stamps, Stamps], other: tuple[Stamps, Stamps]) -> tuple[Stamps, Stamps]:
    """What lies in the first union and not in the second."""
    edges = np.unique(np.concatenate([*of, *other]))
    if len(edges) < 2:
        return of
    start, end = edges[:-1], edges[1:]
    is_in = (overlap_s(start, end, of) > 0) & (overlap_s(start, end, other) == 0)
    return union(start[is_in], end[is_in])


def common(of: Sequence[tuple[Stamps, Stamps]], at_least: int) -> tuple[Stamps, Stamps]:
    """What lies in so many of these unions or more."""
    edges = np.unique(
        np.concatenate([stamps for union_ in of for stamps in union_] or [np.empty(0, np.int64)])
    )
    start, end = edges[:-1], edges[1:]
    covers = sum((overlap_s(start, end, each) > 0 for each in of), np.zeros(len(start), np.int64))
    return union(start[covers >= at_least], end[covers >= at_least])


def covered(at_ns: Stamps, start_ns: Stamps, end_ns: Stamps) -> NDArray[np.float64]:
    """Length in ns of a union that lies before each of `at_ns`."""
    if not len(start_ns):
        return np.zeros(len(at_ns))
    origin = min(int(start_ns[0]), int(at_ns.min())) if len(at_ns) else 0  # stamps of years do not fit in f64
    knots = np.stack([start_ns, end_ns], axis=1).ravel() - origin
    lengths = np.cumsum(end_ns - start_ns)
    so_far = np.stack([np.append(0, lengths[:-1]), lengths], axis=1).ravel()
    return np.interp(at_ns - origin, knots, so_far)


def overlap_s(start_ns: Stamps, end_ns: Stamps, of: tuple[Stamps, Stamps]) -> NDArray[np.float64]:
    """Seconds of each interval that lie in the union `of`."""
    return (covered(end_ns, *of) - covered(start_ns, *of)) * 1e-9


@dataclass(frozen=True)
class Match:
    """How found intervals match true ones, by overlap in time and never by count.

    Both ratios are NaN where there is nothing to be right about.
    """

    is_found: NDArray[np.bool_]  # [true]
    is_true: NDArray[np.bool_]  # [found]
    length_s: NDArray[np.float64]  # [true]: of the found ones that overlap each, all together

    @property
    def recall(self) -> float:
        return float(self.is_found.mean()) if len(self.is_found) else float("nan")

    @property
    def precision(self) -> float:
        return float(self.is_true.mean()) if len(self.is_true) else float("nan")


def match(true: Series, found: Series, *, at_least: float = 0.5) -> Match:
    """A true interval is found if found ones cover `at_least` of it; a found one is true if it touches a true one."""
    truth, seen = union(true.start_ns, true.end_ns), union(found.start_ns, found.end_ns)
    share = overlap_s(true.start_ns, true.end_ns, seen) / np.maximum(true.seconds, 1e-9)
    touches = overlap_s(found.start_ns, found.end_ns, truth) > 0
    first = np.searchsorted(seen[1], true.start_ns, side="right")
    last = np.searchsorted(seen[0], true.end_ns, side="left")
    total = np.append(0.0, np.cumsum((seen[1] - seen[0]) * 1e-9))
    length = np.where(last > first, total[np.maximum(last, first)] - total[first], 0.0)
    return Match(share >= at_least, touches, length)
