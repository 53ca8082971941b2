"""The detours of one rank, for formats that hold nothing else: measured ones, or what quanta tell of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sigma_train.errors import WrongInput

from sigma_noise.trace import Series, Trace

DETOUR = (
    "detour"  # the name of the events of a loop that measured detours; their value is the length in seconds
)
MAD_TO_SIGMA = 1.4826
FLOOR = 0.05  # the quantile of durations that counts as free of noise
LEAST_NS = 2_000
MOST_S = 2**33  # 272 years: what 64 bits of ns hold


@dataclass(frozen=True)
class Detours:
    """start_ns, length_ns [n] int64, lengths positive; window_ns, begin and end of what was watched."""

    rank: int
    name: str
    start_ns: NDArray[np.int64]
    length_ns: NDArray[np.int64]
    window_ns: tuple[int, int]
    threshold_s: float | None

    def __len__(self) -> int:
        return len(self.start_ns)


def facts(window_ns: tuple[int, int], threshold_s: float | None) -> dict[str, Any]:
    """What a rank's `measured` says of its detours."""
    observed_s = (window_ns[1] - window_ns[0]) / 1e9
    return {
        "mode": "detours",
        "threshold_s": threshold_s,
        "observed_s": observed_s,
        "window_ns": list(window_ns),
    }


def of(
    trace: Trace, rank: int | None = None, name: str | None = None, threshold_s: float | None = None
) -> Detours:
    """The events called `detour` if there are any and no other name is asked for, else those of quanta of fixed work.

    Quanta: d_i = T_i - b with b the 5th percentile of T, where d_i exceeds the threshold, max(2 us, 6 * 1.4826 *
    MAD(T)) unless given.  A detour begins with its quantum here, since where in it it was is unknown.

    Raises: WrongInput if ranks or names are several and none is chosen, or the quanta are of fixed time.
    """
    rank = _the_only("rank", rank, sorted({r for r, _, _ in trace.rows} | set(trace.ranks)))
    told = trace.ranks.get(rank, {}).get("measured", {}).get(DETOUR, {})
    if name in (None, DETOUR) and ((rank, "event", DETOUR) in trace.rows or told):
        return _measured(trace.get(rank, "event", DETOUR), rank, told, threshold_s)
    name = _the_only("name", name, [each for each, _ in trace.of(rank, "quantum")])
    quanta = trace.get(rank, "quantum", name)
    if not is_fixed_work(quanta):
        raise WrongInput(
            f"quanta {name!r} of rank {rank} are of fixed time; lengths of detours want fixed work"
        )
    return _over_floor(quanta, rank, name, threshold_s)


def lengths_ns(detours: Series) -> NDArray[np.int64]:
    """What their values say in seconds: a gap between two readings of a clock is longer by the least gap of all."""
    if not np.all((detours.value >= 0) & (detours.value < MOST_S)):
        raise WrongInput(
            f"a detour must last 0 s or more, found {detours.value[~(detours.value >= 0)][:1]} s"
        )
    return np.rint(detours.value * 1e9).astype(np.int64)


def is_fixed_work(quanta: Series) -> bool:
    return bool(np.all(quanta.value == 1))


def floor_ns(took_ns: NDArray[np.int64]) -> int:
    """One of the durations, so that a quantum at the floor has no noise."""
    return int(np.quantile(took_ns, FLOOR, method="lower"))


def _the_only(what: str, wanted: Any, there: list[Any]) -> Any:
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted is None or wanted not in there:
        found = ", ".join(map(str, there[:10])) + (", ..." if len(there) > 10 else "")
        raise WrongInput(f"--{what} wants one of {found or 'none: nothing was measured'}, found {wanted}")
    return wanted


def _measured(series: Series, rank: int, told: Mapping[str, Any], threshold_s: float | None) -> Detours:
    """The window is as told; where its length alone is known, it begins with the first detour, as in netgauge."""
    length_ns = lengths_ns(series)
    begin = int(series.start_ns[0]) if len(series) else 0
    last = int(series.end_ns.max()) if len(series) else 0
    end = max(last, begin + round(told.get("observed_s", 0) * 1e9))
    window = tuple(told["window_ns"]) if "window_ns" in told else (begin, end)
    kept = length_ns > (threshold_s or 0) * 1e9
    used = told.get("threshold_s") if threshold_s is None else threshold_s
    return Detours(rank, DETOUR, series.start_ns[kept], length_ns[kept], window, used)


def _over_floor(quanta: Series, rank: int, name: str, threshold_s: float | None) -> Detours:
    took = quanta.end_ns - quanta.start_ns
    over = took - floor_ns(took)
    if threshold_s is None:
        spread = MAD_TO_SIGMA * float(np.median(np.abs(took - np.median(took))))
        threshold_s = max(LEAST_NS, 6 * spread) / 1e9
    kept = over > threshold_s * 1e9
    window = int(quanta.start_ns[0]), int(quanta.end_ns.max())
    return Detours(rank, name, quanta.start_ns[kept], over[kept], window, threshold_s)
