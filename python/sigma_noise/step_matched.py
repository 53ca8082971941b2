"""What events cost a step, by its steps alone: those that an event touched against those that none did.

    regained = mean_i (t_i - u),        u = sum_j t_j / q(t_j) / sum_j 1 / q(t_j)     over untouched steps j nearby

An event finds a long step more often than a short one, so that untouched steps are shorter than steps would be without
events.  Hence each weighs by the chance it had to stay untouched (Horvitz and Thompson 1952,
doi 10.1080/01621459.1952.10483446): that a time of length t, begun anywhere between events, has none,

    q(t) = sum_g max(0, g - t) / sum_g g,        g the times between events.

It knows nothing of segments and has all that follows an event, as caches that are cold; but it takes events for
independent of where in a step they begin, and has the scatter of whole steps.
"""

import numpy as np
from numpy.typing import NDArray

from sigma_noise import spans

Floats = NDArray[np.float64]
Stamps = NDArray[np.int64]
NEARBY = 32  # untouched steps to compare with
LEAST_CHANCE = 0.05  # below it an untouched step stands for more than twenty


def matched(start_ns: Stamps, end_ns: Stamps, events: tuple[Stamps, Stamps]) -> Floats | None:
    """Seconds [n] whose mean is what steps lost to `events`, and whose scatter is that of this mean.

    None if fewer than NEARBY steps are untouched, or one of them had next to no chance to be.
    """
    seconds = (end_ns - start_ns) * 1e-9
    is_free = spans.overlap_s(start_ns, end_ns, events) == 0
    if is_free.all():
        return np.zeros(len(seconds))
    if is_free.sum() < NEARBY:
        return None
    chance = _chance(seconds, _between(start_ns, end_ns, events))
    if chance[is_free].min() < LEAST_CHANCE:
        return None
    weight = np.where(is_free, 1 / np.maximum(chance, LEAST_CHANCE), 0.0)
    found = np.empty(len(seconds))
    for part in _nearby(is_free):
        w = weight[part] / weight[part].mean()
        usual = float(np.average(seconds[part], weights=w))
        found[part] = (1 - w) * (seconds[part] - usual)  # of which those with w have a mean of 0
    return found


def _nearby(is_free: NDArray[np.bool_]) -> list[slice]:
    """Neighbours with NEARBY untouched steps or more, and fewer than twice that."""
    parts = int(is_free.sum()) // NEARBY
    at = np.flatnonzero(is_free)[np.arange(1, parts) * NEARBY]
    return [slice(a, b) for a, b in zip([0, *at], [*at, len(is_free)], strict=True)]


def _between(start_ns: Stamps, end_ns: Stamps, events: tuple[Stamps, Stamps]) -> Floats:
    """Seconds of each time without an event in which steps follow each other."""
    is_left_out = start_ns[1:] - end_ns[:-1] > (end_ns - start_ns).min()  # a step between these two
    breaks = np.flatnonzero(is_left_out)
    runs = start_ns[np.r_[0, breaks + 1]], end_ns[np.r_[breaks, len(end_ns) - 1]]
    begin, end = spans.without(runs, events)
    return (end - begin) * 1e-9


def _chance(seconds: Floats, between: Floats) -> Floats:
    """q of each length."""
    gaps = np.sort(between)
    longer = np.searchsorted(gaps, seconds)  # the first gap that long
    above = np.append(np.cumsum(gaps[::-1])[::-1], 0.0)
    chance: Floats = (above[longer] - (len(gaps) - longer) * seconds) / gaps.sum()
    return chance
