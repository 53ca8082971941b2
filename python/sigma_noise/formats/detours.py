"""The detours of one rank: where and how long its work was kept from it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sigma_train.errors import WrongInput

from sigma_noise.trace import Series, Trace

DETOUR = "detour"  # the name of the events of a tool that measured detours, not quanta
MAD_TO_SIGMA = 1.4826
FLOOR = 0.05  # the quantile of durations that counts as free of noise
LEAST_NS = 2_000


@dataclass(frozen=True)
class Detours:
    """start_ns, duration_ns [n] int64, durations positive; window_ns, begin and end of what was watched."""

    rank: int
    name: str
    start_ns: NDArray[np.int64]
    duration_ns: NDArray[np.int64]
    window_ns: tuple[int, int]
    threshold_ns: float | None

    def __len__(self) -> int:
        return len(self.start_ns)


def of(
    trace: Trace, rank: int | None = None, name: str | None = None, threshold_s: float | None = None
) -> Detours:
    """The events called `detour`, or what quanta of fixed work took over their floor.

    Quanta: d_i = T_i - b with b the 5th percentile of T, where T_i exceeds the threshold: max(2 us, b + 6 * 1.4826 *
    MAD(T)) unless given.  A detour is written at the begin of its quantum, since where in it it was is unknown.

    Raises: WrongInput if ranks or names are several and none is chosen, or the quanta are of fixed time.
    """
    rank = _the_only("rank", rank, sorted({r for r, _, _ in trace.rows} | set(trace.ranks)))
    measured = (rank, "event", DETOUR) in trace.rows or "window_ns" in trace.ranks.get(rank, {})
    if name in (None, DETOUR) and measured:
        return _measured(trace, rank, threshold_s)
    names = [each for each, _ in trace.of(rank, "quantum")]
    name = _the_only("name", name, names)
    quanta = trace.get(rank, "quantum", name)
    if np.any(quanta.value != 1):
        raise WrongInput(
            f"quanta {name!r} of rank {rank} are of fixed time; lengths of detours want fixed work"
        )
    return _over_floor(quanta, rank, name, threshold_s)


def _the_only(what: str, wanted: int | str | None, there: list) -> int | str:
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted is None or wanted not in there:
        found = ", ".join(map(str, there[:10])) + (", ..." if len(there) > 10 else "")
        raise WrongInput(f"--{what} wants one of {found or 'none: nothing was measured'}, found {wanted}")
    return wanted


def _measured(trace: Trace, rank: int, threshold_s: float | None) -> Detours:
    series = trace.get(rank, "event", DETOUR)
    told = trace.ranks.get(rank, {})
    took = series.end_ns - series.start_ns
    threshold_ns = told.get("threshold_ns") if threshold_s is None else threshold_s * 1e9
    kept = took > (0 if threshold_s is None else threshold_ns)
    own = [s for (r, _, _), s in trace.rows.items() if r == rank and len(s)]
    window = told.get("window_ns") or (
        min(int(s.start_ns[0]) for s in own),
        max(int(s.end_ns.max()) for s in own),
    )
    return Detours(
        rank, DETOUR, series.start_ns[kept], took[kept], (int(window[0]), int(window[1])), threshold_ns
    )


def _over_floor(quanta: Series, rank: int, name: str, threshold_s: float | None) -> Detours:
    took = quanta.end_ns - quanta.start_ns
    floor = round(float(np.quantile(took, FLOOR)))
    if threshold_s is None:
        spread = MAD_TO_SIGMA * float(np.median(np.abs(took - np.median(took))))
        threshold_ns = max(LEAST_NS, floor + 6 * spread)
    else:
        threshold_ns = threshold_s * 1e9
    kept = (took > threshold_ns) & (took > floor)
    window = int(quanta.start_ns[0]), int(quanta.end_ns.max())
    return Detours(rank, name, quanta.start_ns[kept], took[kept] - floor, window, threshold_ns)
