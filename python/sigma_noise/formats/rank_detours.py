"""The detours of one rank, for formats that hold nothing else, with the floors and thresholds that `analyze` takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sigma_train.errors import WrongInput

from sigma_noise import changes, detours
from sigma_noise.detours import Noise
from sigma_noise.trace import EMPTY, Series, Trace
from sigma_noise.windows import is_fixed_time

DETOUR = "detour"  # events of a loop of clock readings: stamps are of the gap, their value is what it lost
HALF_NS = 0.5e-9


@dataclass(frozen=True)
class Detours:
    """start_ns, length_ns [n] int64, lengths positive; window_ns, begin and end of what was watched.

    What was called a detour took more than `threshold_s`, the least gap of a loop included.
    """

    rank: int
    name: str
    start_ns: NDArray[np.int64]
    length_ns: NDArray[np.int64]
    window_ns: tuple[int, int]
    threshold_s: float
    least_gap_s: float = 0.0

    def __len__(self) -> int:
        return len(self.start_ns)


def facts(
    window_ns: tuple[int, int],
    gaps: Series = EMPTY,
    threshold_s: float | None = None,
    least_gap_s: float = 0.0,
) -> dict[str, Any]:
    """What a rank's `measured` says of detours that another tool found.

    The threshold is the one that its file tells, else the usual one; but a detour that the file has is one, so it lies
    below the shortest.
    """
    threshold_s = detours.gap_threshold(least_gap_s) if threshold_s is None else threshold_s
    if len(gaps):
        threshold_s = min(threshold_s, float(gaps.seconds.min()) - HALF_NS)
    return {
        "mode": "detours",
        "threshold_s": max(threshold_s, least_gap_s, HALF_NS),
        "least_gap_s": least_gap_s,
        "observed_s": (window_ns[1] - window_ns[0]) / 1e9,
        "window_ns": list(window_ns),
    }


def of(
    trace: Trace, rank: int | None = None, name: str | None = None, threshold_s: float | None = None
) -> Detours:
    """Those that a loop measured if no other name is asked for, else those of quanta.

    A detour begins with its quantum, since where in it it was is unknown.

    Raises: WrongInput if ranks or names are several and none is chosen, or there are no figures to be had.
    """
    rank = _the_only("rank", rank, sorted({r for r, _, _ in trace.rows} | set(trace.ranks)))
    told = trace.ranks.get(rank, {}).get("measured", {})
    is_of_a_loop = name in (None, DETOUR) and DETOUR in told
    quanta = [each for each, _ in trace.of(rank, "quantum")]
    name = DETOUR if is_of_a_loop else _the_only("name", name, quanta)
    try:
        if is_of_a_loop:
            return _measured(trace, rank, told[DETOUR], threshold_s)
        return _of_quanta(trace, rank, name, threshold_s)
    except ValueError as error:
        raise WrongInput(f"{name} of rank {rank}: {error}") from None


def noise_of(quanta: Series, is_fixed_time: bool, tau_s: float | None = None) -> Noise:
    """Against the floor of each stretch of constant level, as `analyze` has it.  Raises: ValueError."""
    start_s = quanta.since(int(quanta.start_ns[0]))
    if not is_fixed_time:
        seconds = np.maximum(quanta.seconds, 1e-9)
        return detours.fixed_work(start_s, seconds, changes.segments(seconds), tau_s)
    count, quantum_s = quanta.value, float(np.median(quanta.seconds))
    bounds = changes.segments_of_counts(count)
    return detours.fixed_time(start_s, count, quantum_s, bounds, tau_s)


def _the_only(what: str, wanted: Any, there: list[Any]) -> Any:
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted is None or wanted not in there:
        found = ", ".join(map(str, there[:10])) + (", ..." if len(there) > 10 else "")
        raise WrongInput(f"--{what} wants one of {found or 'none: nothing was measured'}, found {wanted}")
    return wanted


def _measured(trace: Trace, rank: int, told: Mapping[str, Any], tau_s: float | None) -> Detours:
    """The window is as told; where its length alone is known, it begins with the first detour, as in netgauge."""
    series = trace.get(rank, "event", DETOUR)
    begin = int(series.start_ns[0]) if len(series) else 0
    last = int(series.end_ns.max()) if len(series) else 0
    window = told.get("window_ns", (begin, max(last, begin + round(told["observed_s"] * 1e9))))
    tau_s = told["threshold_s"] if tau_s is None else max(tau_s, told["threshold_s"])
    noise = detours.gaps(series.since(begin), series.seconds, told["least_gap_s"], told["observed_s"], tau_s)
    return _detours(rank, DETOUR, series, noise, (window[0], window[1]), told["least_gap_s"])


def _of_quanta(trace: Trace, rank: int, name: str, tau_s: float | None) -> Detours:
    quanta = trace.get(rank, "quantum", name)
    window = int(quanta.start_ns[0]), int(quanta.end_ns.max())
    noise = noise_of(quanta, is_fixed_time(trace, name), tau_s)
    return _detours(rank, name, quanta, noise, window, 0.0)


def _detours(
    rank: int, name: str, series: Series, noise: Noise, window_ns: tuple[int, int], least_gap_s: float
) -> Detours:
    length_ns = np.rint(noise.detours.length_s * 1e9).astype(np.int64)
    return Detours(
        rank, name, series.start_ns[noise.detours.index], length_ns, window_ns, noise.tau_s, least_gap_s
    )
