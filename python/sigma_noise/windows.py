"""Series of a trace as windows: what each rank takes, by its own clock, from one barrier to the next."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sigma_noise.collectives import Collectives, split
from sigma_noise.detours import FLOOR
from sigma_noise.trace import Series, Trace
from sigma_noise.units import time_of

COLLECTIVE, LOCAL = "a2a", "a2a_local"
FIXED_TIME = "ftq"
PROCESSOR = re.compile(r"_mp\d+(?=(_ftq)?$)")  # after a kernel's name: of one multiprocessor of a GPU
WINDOW_S = 1e-2  # useful work of a step, where nobody says how much there is
FEWEST_QUANTA = 30

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Exchanges:
    """The collectives that `ranks` made, in the order of the rows of `parts`."""

    ranks: tuple[int, ...]
    parts: Collectives


@dataclass(frozen=True)
class Windows:
    """Seconds [n] by rank, and the host of each.

    They are sums of `width` quanta of `kernel`, the first of each by `first`, and hold `work_s` seconds of useful work.
    """

    what: str
    kernel: str
    work_s: float
    rows: Mapping[int, Floats]
    hosts: Mapping[int, str]
    first: Mapping[int, NDArray[np.int64]]
    width: int = 1

    def sums(self, rank: int, of_quanta: Floats) -> Floats:
        """[n] of each window, of values of all quanta of a rank.  Raises: ValueError if they are too few."""
        if len(self.first[rank]) and self.first[rank][-1] + self.width > len(of_quanta):
            raise ValueError(
                f"rank {rank} has {len(of_quanta)} quanta of {self.kernel}, fewer than its windows hold"
            )
        so_far = np.concatenate([[0.0], np.cumsum(of_quanta)])
        found: Floats = so_far[self.first[rank] + self.width] - so_far[self.first[rank]]
        return found

    @property
    def mean_s(self) -> float:
        return float(np.mean([row.mean() for row in self.rows.values()]))

    @property
    def host_names(self) -> list[str]:
        """By rank, for `project`: where hosts have different numbers of ranks, each rank counts as a host."""
        names = list(self.hosts.values())
        is_even = len({names.count(name) for name in names}) == 1
        return names if is_even else [f"rank {rank}" for rank in self.hosts]

    @cached_property
    def longest_s(self) -> Floats:
        """Of the slowest rank of each host at each instant, of all hosts together [n]."""
        by_host: dict[str, list[Floats]] = {}
        for rank, row in self.rows.items():
            by_host.setdefault(self.hosts[rank], []).append(row)
        return np.concatenate(
            [np.max([row[: min(map(len, rows))] for row in rows], axis=0) for rows in by_host.values()]
        )


def host_of(trace: Trace, rank: int) -> str:
    """A rank that does not say where it was is a host of its own."""
    return str(trace.ranks[rank].get("host", f"of rank {rank}"))


def mode_of(trace: Trace, name: str) -> str:
    """How a series was measured: "fwq" where its file does not say."""
    for about in trace.ranks.values():
        measured = about.get("measured", {})
        how = measured.get(name) or measured.get(PROCESSOR.sub("", name)) or {}
        if "mode" in how:
            return str(how["mode"])
    return FIXED_TIME if name.endswith("_ftq") else "fwq"


def is_fixed_time(trace: Trace, name: str) -> bool:
    return mode_of(trace, name) == FIXED_TIME


def kernels(trace: Trace) -> list[str]:
    """All that ranks measured by themselves."""
    return [name for name in trace.names() if name != COLLECTIVE]


def chosen(trace: Trace, kernel: str | None) -> str:
    """The kernel asked for; else the first of the plan, the local part of collectives, the first of all; "" of none.

    A kernel that was measured on each multiprocessor stands for the first of them.
    Raises: ValueError for a kernel that was not measured.
    """
    names = kernels(trace)
    asked = [kernel] if kernel is not None else [*trace.run.get("kernels", ()), LOCAL, *names]
    for want in asked:
        if found := [name for name in names if want in (name, PROCESSOR.sub("", name))]:
            return found[0]
    if kernel is not None:
        raise ValueError(f"kernel must be one of {', '.join(names) or 'none'}, found {kernel!r}")
    return ""


def clock_of(trace: Trace, rank: int) -> tuple[int, int]:
    """What a rank's clock shows beyond the first rank's, and how far that may be off, ns.

    Files have what is to be added to the rank's stamps (`sigma_noise.offset`), before and after: the opposite.
    """
    found = trace.ranks[rank].get("clock", {}).get("offsets") or []
    offsets = [float(o.get("offset_ns") or 0) for o in found] or [0.0]
    doubts = [float(o.get("residual_ns") or 0) for o in found] or [0.0]
    return -round(sum(offsets) / len(offsets)), round(max(doubts))


def exchanges_of(trace: Trace) -> tuple[Exchanges | None, str]:
    """Collectives of two ranks or more; else None, and the reason if there are some that cannot be taken apart."""
    ranks = tuple(rank for rank in trace.ranks if len(trace.get(rank, "quantum", COLLECTIVE)))
    if len(ranks) < 2:
        return None, ""
    series = [trace.get(rank, "quantum", COLLECTIVE) for rank in ranks]
    local = [trace.get(rank, "quantum", LOCAL) for rank in ranks]
    beyond, residual = zip(*(clock_of(trace, rank) for rank in ranks), strict=True)
    try:
        parts = split(
            [s.start_ns for s in series],
            [s.end_ns for s in series],
            begin_ns=[int(s.start_ns[0]) for s in local] if all(map(len, local)) else None,
            offset_ns=beyond,
            residual_ns=residual,
        )
    except ValueError as error:
        return None, f"collectives were left out: {str(error).removeprefix('split: ')}"
    return Exchanges(ranks, parts), ""


def windows_of(
    trace: Trace, kernel: str, exchanges: Exchanges | None, window_s: float | None, barriers: int = 1
) -> Windows | None:
    """Local times before collectives where there are some, else quanta of fixed work summed to `window_s` (10 ms where
    nobody says) over the `barriers` that cut it into equal parts; None of fixed time, which has no work from barrier to
    barrier, or of less than these 10 ms.

    Raises: ValueError for a window that is not positive or longer than what was measured, or for parts of it that are
            shorter than half a quantum.
    """
    if window_s is not None and not 0 < window_s < float("inf"):
        raise ValueError(f"window must be more than 0 s, found {window_s:g}")
    if exchanges is not None and window_s is not None:
        raise ValueError(
            "window is of quanta; between collectives there is what there is (--kernel names quanta)"
        )
    if exchanges is not None:
        rows = dict(zip(exchanges.ranks, exchanges.parts.local_s, strict=True))
        kernel, what, width = LOCAL, f"local time before {COLLECTIVE}", 1
        first = dict.fromkeys(rows, exchanges.parts.step)
    elif not kernel or is_fixed_time(trace, kernel):
        return None
    else:
        quanta = {rank: trace.get(rank, "quantum", kernel) for rank in trace.ranks}
        enough = {rank: s for rank, s in quanta.items() if len(s) >= FEWEST_QUANTA}
        whole_s = WINDOW_S if window_s is None else window_s
        if window_s is not None or barriers > 1:
            must_hold_a_quantum(enough, whole_s, barriers)
        rows, width = summed(enough, whole_s / barriers)
        if not rows and enough and window_s is not None:
            longest = time_of(max(float(s.seconds.sum()) for s in enough.values()))
            raise ValueError(
                f"window must be shorter than the {longest} that were measured, found {time_of(window_s)}"
            )
        first, what = {rank: width * np.arange(len(row)) for rank, row in rows.items()}, kernel
    if not rows:
        return None
    work_s = float(np.quantile(np.concatenate(list(rows.values())), FLOOR))
    return Windows(what, kernel, work_s, rows, {rank: host_of(trace, rank) for rank in rows}, first, width)


def must_hold_a_quantum(quanta: Mapping[int, Series], window_s: float, barriers: int) -> None:
    """Raises: ValueError where barriers are so near that windows of a quantum would stand for shorter ones."""
    if quanta and 2 * window_s < barriers * (quantum_s := median_s(quanta)):
        cut = f", cut by {barriers} barriers" if barriers > 1 else ""
        raise ValueError(
            f"window must hold half a quantum of {time_of(quantum_s)} between barriers, found {time_of(window_s)}{cut}"
        )


def median_s(quanta: Mapping[int, Series]) -> float:
    return max(1e-9, float(np.median(np.concatenate([series.seconds for series in quanta.values()]))))


def summed(quanta: Mapping[int, Series], window_s: float) -> tuple[dict[int, Floats], int]:
    """As many quanta a window as take `window_s` together, by the median of all; the same number on every rank."""
    if not quanta:
        return {}, 1
    seconds: Sequence[Floats] = [series.seconds for series in quanta.values()]
    width = max(1, round(window_s / median_s(quanta)))
    rows = {
        rank: np.add.reduceat(
            row[: len(row) // width * width], np.arange(0, len(row) // width * width, width)
        )
        for rank, row in zip(quanta, seconds, strict=True)
        if len(row) >= width
    }
    return rows, width
