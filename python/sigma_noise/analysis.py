"""What a measurement says: noise, its rhythm and its causes on each rank, ranks beside one another, and many ranks.

Everything that is shown, in whatever form, is made here once: of a `Trace`, `analyze` makes an `Analysis`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sigma_noise import changes, detours, periods
from sigma_noise.attribution import Attribution, attribute_trace
from sigma_noise.changes import Change
from sigma_noise.detours import Noise
from sigma_noise.intervals import Interval, intervals, ratio_interval
from sigma_noise.lost import Lost
from sigma_noise.periods import Period
from sigma_noise.project import RANKS, Projection, project
from sigma_noise.scores import LEAST_STEPS, REFERENCES, Scores, score
from sigma_noise.trace import Series, Trace
from sigma_noise.units import time_of
from sigma_noise.windows import (
    FEWEST_QUANTA,
    Exchanges,
    Windows,
    chosen,
    exchanges_of,
    host_of,
    is_fixed_time,
    kernels,
    windows_of,
)

MOST_CYCLES = 5e3  # of the highest frequency sought, in a window: a search of 60 Hz in 83 s takes some 3 s
FEWEST_CYCLES = 10  # of the lowest, as surrogates keep the number of stamps in parts of 3; in short windows 3
CLOCKS = ("cpu_khz", "sm_mhz")  # ends of the names of gauges of frequencies
FEWEST_EFFECTIVE = 500  # below which intervals may be short

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """Of an analysis.  kernel: of the first screen and the causes; windows too are of it if it is given, else of
    collectives where there are some, else of the first that was measured.  tau_s: threshold of detours; none: one a
    series, by `detours.work_threshold` and `gap_threshold`.  ranks: N of S(N).  window_s: useful work between
    barriers, where they are no collectives.  alpha: rate at which any of equal ranks is flagged.  seed: of resamples.
    reference: what a rank's location is relative to, "median" of ranks or "min", the fastest.
    """

    kernel: str | None = None
    tau_s: float | None = None
    ranks: tuple[int, ...] = RANKS
    window_s: float | None = None
    alpha: float = 0.01
    seed: int = 0
    reference: str = "median"

    def __post_init__(self) -> None:
        """Raises: ValueError for a threshold that is not positive or a reference that is none, in a trace without
        quanta too.
        """
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, found {self.reference!r}")
        if self.tau_s is not None and not 0 < self.tau_s < float("inf"):
            raise ValueError(f"tau must be more than 0 s, found {self.tau_s:g}")


@dataclass(frozen=True)
class OfRank:
    """One kernel on one rank.  `median`: seconds of a quantum, of work in a quantum of fixed time.

    `bounds`: where quanta of one level end and others begin, [0, ..., quanta].
    """

    rank: int
    kernel: str
    is_fixed_time: bool
    quanta: int
    median: Interval
    noise: Noise
    share: Interval
    changes: tuple[Change, ...]
    periods: tuple[Period, ...]
    bounds: NDArray[np.int64] = field(repr=False)
    causes: Attribution | None = None


@dataclass(frozen=True)
class Gaps:
    """Detours of a loop that does nothing."""

    rank: int
    noise: Noise
    periods: tuple[Period, ...]


@dataclass(frozen=True)
class Analysis:
    """`about`: what files say of each rank; `kernel`: of the first screen; `windows`: by which ranks are scored and
    projected, where they can be; `is_recorded`: something that tells causes was watched, on any rank.
    """

    run: Mapping[str, Any]
    about: Mapping[int, Mapping[str, Any]]
    options: Options
    hosts: Mapping[int, str]
    kernel: str
    series: tuple[OfRank, ...]
    gaps: tuple[Gaps, ...]
    windows: Windows | None
    scores: Scores | None
    exchanges: Exchanges | None
    projections: tuple[Projection, ...]
    warnings: tuple[str, ...]
    is_recorded: bool
    digests: Mapping[str, str] = field(default_factory=dict)

    def of(self, kernel: str) -> list[OfRank]:
        return [s for s in self.series if s.kernel == kernel]

    @property
    def ranked(self) -> str | None:
        """What scores are of."""
        return None if self.scores is None or self.windows is None else self.windows.what

    @property
    def window_s(self) -> float:
        """Mean window between barriers, NaN without one."""
        return float("nan") if self.windows is None else self.windows.mean_s

    def scored(self, rank: int) -> OfRank | None:
        """What a rank's score is of; None where it has too few quanta."""
        kernel = "" if self.windows is None else self.windows.kernel
        return next((s for s in self.of(kernel) if s.rank == rank), None)

    @property
    def worst(self) -> OfRank | None:
        """Of the kernel of the first screen, the rank with most noise."""
        return max(self.of(self.kernel), key=lambda s: s.noise.share, default=None)


def analyze(
    trace: Trace,
    options: Options = Options(),
    *,
    truth: Trace | None = None,
    digests: Mapping[str, str] | None = None,
) -> Analysis:
    """All of it.

    Args:    truth: the log of an injection, whose spans are causes on the ranks of its host.
             digests: of the files, by name.
    Raises:  ValueError for a kernel that was not measured, a window that is longer than the measurement, a truth of
             another host or time, or a trace without quanta and detours.
    """
    names = kernels(trace)
    if not names and "detour" not in trace.names("event"):
        raise ValueError("quanta or detours are wanted, found none")
    kernel = chosen(trace, options.kernel)
    injected = {} if truth is None else injections(trace, truth)
    own = own_periods(trace)
    exchanges, impossible = exchanges_of(trace)
    windows = windows_of(trace, kernel, None if options.kernel else exchanges, options.window_s)
    explained = {kernel} if windows is None else {kernel, windows.kernel}
    series = tuple(
        of_fixed_time(trace, rank, name, options, own)
        if is_fixed_time(trace, name)
        else of_rank(trace, rank, name, options, own, injected.get(rank, {}), name in explained)
        for name in names
        for rank in trace.ranks
        if is_usable(trace, trace.get(rank, "quantum", name), name)
    )
    gaps = tuple(
        gaps_of(trace, rank, options, own)
        for rank in trace.ranks
        if "detour" in trace.ranks[rank].get("measured", {})
    )
    told = [*warnings(trace, series, names), *([impossible] if impossible else [])]
    return Analysis(
        trace.run, trace.ranks, options, {rank: host_of(trace, rank) for rank in trace.ranks}, kernel, series, gaps,
        windows,
        None if windows is None else scored(windows, options), exchanges,
        () if windows is None else projected(windows, options),
        tuple(told), bool(injected or trace.names("counter")), digests or {},
    )  # fmt: skip


def is_usable(trace: Trace, series: Series, name: str) -> bool:
    """Enough quanta, and of fixed time some with work done: a step may be longer than a quantum."""
    if len(series) < FEWEST_QUANTA:
        return False
    return not is_fixed_time(trace, name) or float(np.quantile(series.value, 1 - detours.FLOOR)) >= 1


def injections(trace: Trace, truth: Trace) -> dict[int, dict[str, Series]]:
    """Events of a log by rank: stamps of a host's clock say nothing of another's."""
    if truth.names():
        raise ValueError(f"truth must be a log of injections, found quanta of {truth.names()[0]}")
    found: dict[int, dict[str, Series]] = {}
    for logged in truth.ranks:
        events = {name: series for name, series in truth.of(logged, "event") if len(series)}
        for rank in trace.ranks:
            if events and host_of(trace, rank) == host_of(truth, logged):
                found.setdefault(rank, {}).update(events)
    if not found:
        hosts = sorted({host_of(truth, rank) for rank in truth.ranks})
        raise ValueError(
            f"truth must log injections on a host that was measured, found none of {', '.join(hosts)}"
        )
    begin = trace.origin_ns
    end = max(int(s.end_ns.max()) for s in trace.rows.values() if len(s))
    if not any(
        np.any((series.end_ns > begin) & (series.start_ns < end))
        for of in found.values()
        for series in of.values()
    ):
        raise ValueError("truth must log injections while ranks were measured, found all before or after")
    return found


def own_periods(trace: Trace) -> dict[str, float]:
    """What the profiler itself does periodically, seconds."""
    found = {}
    for about in trace.ranks.values():
        sampler = about.get("sampler") or {}
        if (period := sampler.get("period_s")) is not None:
            found["reading counters"] = float(period)
    return found


def of_rank(
    trace: Trace,
    rank: int,
    kernel: str,
    options: Options,
    own: Mapping[str, float],
    injected: Mapping[str, Series],
    with_causes: bool,
) -> OfRank:
    """Of fixed work."""
    series, seed = trace.get(rank, "quantum", kernel), options.seed
    start_s = series.since(int(series.start_ns[0]))
    seconds = np.maximum(series.seconds, 1e-9)
    end_s = float(start_s[-1] + seconds[-1])
    clocks = clocks_of(trace, rank, series)
    found = tuple(changes.changes(start_s, seconds, clocks=clocks, end_s=end_s, seed=seed))
    bounds = np.array([0, *(change.index for change in found), len(seconds)])
    noise = detours.fixed_work(start_s, seconds, bounds, options.tau_s)
    floor = detours.floor(seconds, bounds)
    rhythm = rhythm_of(noise, end_s, own, seed)
    period = rhythm[0].period_s / float(np.median(seconds)) if rhythm else None
    share = ratio_interval(np.maximum(0.0, seconds - floor), seconds, period=period, seed=seed)
    median = intervals(seconds, ["median"], period=period, seed=seed)["median"]
    causes = None
    if with_causes and (injected or any(True for _ in trace.of(rank, "counter"))):
        causes = attribute_trace(trace, rank, Lost.over_floor(series, floor), injected=injected, seed=seed)
    return OfRank(rank, kernel, False, len(series), median, noise, share, found, rhythm, bounds, causes)


def clocks_of(trace: Trace, rank: int, series: Series) -> dict[str, tuple[Floats, Floats]]:
    """What frequencies of processors were read at, in seconds since the first quantum, and what they were."""
    return {
        name: (gauge.since(int(series.start_ns[0])), gauge.value)
        for name, gauge in trace.of(rank, "counter")
        if name.endswith(CLOCKS)
    }


def of_fixed_time(trace: Trace, rank: int, kernel: str, options: Options, own: Mapping[str, float]) -> OfRank:
    series, seed = trace.get(rank, "quantum", kernel), options.seed
    start_s = series.since(int(series.start_ns[0]))
    quantum_s = float(np.median(series.seconds))
    count, end_s = series.value, float(start_s[-1]) + quantum_s
    clocks = clocks_of(trace, rank, series)
    found = tuple(changes.changes_of_counts(start_s, count, clocks=clocks, end_s=end_s, seed=seed))
    bounds = np.array([0, *(change.index for change in found), len(count)])
    noise = detours.fixed_time(start_s, count, quantum_s, bounds, options.tau_s)
    best = detours.floor(count, bounds, 1 - detours.FLOOR)
    lost = detours.taken(count, quantum_s, best)
    share = ratio_interval(lost, np.full(len(lost), quantum_s), seed=seed)
    median = intervals(count, ["median"], seed=seed)["median"]
    rhythm = rhythm_of(noise, end_s, own, seed)
    return OfRank(rank, kernel, True, len(series), median, noise, share, found, rhythm, bounds)


def gaps_of(trace: Trace, rank: int, options: Options, own: Mapping[str, float]) -> Gaps:
    """Files of others may not say what the least gap was: their lengths are then the detours' own."""
    about = trace.ranks[rank]["measured"]["detour"]
    series = trace.get(rank, "event", "detour")
    start_s = series.since(int(series.start_ns[0]) if len(series) else 0)
    observed_s = float(about.get("observed_s") or (start_s[-1] + series.seconds[-1] if len(series) else 1.0))
    least_s = float(about.get("least_gap_s") or 0.0)
    seen_from_s = float(about.get("threshold_s") or (series.seconds.min() / 2 if len(series) else least_s))
    tau_s = max(options.tau_s or 0.0, seen_from_s, least_s, 1e-9)
    noise = detours.gaps(start_s, series.seconds, least_s, observed_s, tau_s)
    return Gaps(rank, noise, rhythm_of(noise, observed_s, own, options.seed))


def rhythm_of(noise: Noise, window_s: float, own: Mapping[str, float], seed: int) -> tuple[Period, ...]:
    """Periods from ten in the window (three, where it is short) to 60 Hz.

    A search costs its highest frequency times its window: of a long measurement, fast trains are sought in a stretch in
    the middle, slow ones in all of it.
    """
    low = max(periods.BLOCK_PERIODS / window_s, min(1.0, FEWEST_CYCLES / window_s))
    high = MOST_CYCLES / window_s
    if high >= periods.MOST_HZ:
        return periods_in(noise, 0.0, window_s, low, periods.MOST_HZ, own, seed)
    stretch_s = MOST_CYCLES / periods.MOST_HZ
    slow = periods_in(noise, 0.0, window_s, low, high, own, seed)
    fast = periods_in(
        noise, (window_s - stretch_s) / 2, stretch_s, max(low, high / 2), periods.MOST_HZ, own, seed
    )
    seen = [p.frequency_hz for p in slow]
    return slow + tuple(p for p in fast if all(abs(p.frequency_hz / f - 1) > 1 / MOST_CYCLES for f in seen))


def periods_in(
    noise: Noise,
    begin_s: float,
    window_s: float,
    low: float,
    high: float,
    own: Mapping[str, float],
    seed: int,
) -> tuple[Period, ...]:
    at = noise.detours.start_s - begin_s
    inside = (at >= 0) & (at <= window_s)
    if inside.sum() < periods.FEWEST_STAMPS or low >= high:
        return ()
    length_s = noise.detours.length_s[inside]
    found = periods.find(
        at[inside], window_s, length_s=length_s, low_hz=low, high_hz=high, own=dict(own), seed=seed
    )
    return tuple(replace(p, phase_s=(p.phase_s + begin_s) % p.period_s) for p in found)


def scored(windows: Windows, options: Options) -> Scores | None:
    """By the ranks' own numbers; None of a single rank, or few windows."""
    rows = list(windows.rows.values())
    if len(rows) < 2 or min(map(len, rows)) < LEAST_STEPS:
        return None
    numbers = list(windows.rows)
    durations = [np.maximum(row, 1e-9) for row in rows]
    found = score(durations, alpha=options.alpha, reference=options.reference, seed=options.seed)
    return replace(found, ranks=tuple(replace(r, rank=numbers[r.rank]) for r in found.ranks))


def projected(windows: Windows, options: Options) -> tuple[Projection, ...]:
    """What was seen, and with a tail beyond it."""
    rows = [np.maximum(row, 1e-9) for row in windows.rows.values()]
    return tuple(
        project(rows, options.ranks, hosts=windows.host_names, model=model, seed=options.seed)
        for model in ("ecdf", "gpd")
    )


def warnings(trace: Trace, series: Sequence[OfRank], names: Sequence[str]) -> tuple[str, ...]:
    """Each with its remedy."""
    found = [
        f"rank {rank}: {text}" for rank, about in trace.ranks.items() for text in about.get("warnings", ())
    ]
    seen = {(s.rank, s.kernel) for s in series}
    for rank in trace.ranks:
        heat = trace.get(rank, "counter", "core_throttled_ns").value * 1e-9
        if len(heat) and heat[-1] > heat[0]:
            found.append(
                f"rank {rank}: its core was slowed down for heat for {time_of(heat[-1] - heat[0])} of the measurement; "
                "let it cool, and measure again"
            )
    found += [
        f"rank {rank}: fewer than {FEWEST_QUANTA} quanta of {name}, or most without work done; measure longer"
        for name in names
        for rank in trace.ranks
        if (rank, name) not in seen
    ]
    short = [s for s in series if s.median.n_eff < FEWEST_EFFECTIVE]
    if short:
        least = min(short, key=lambda s: s.median.n_eff)
        found.append(
            f"rank {least.rank}, {least.kernel}: {least.quanta} quanta are worth {least.median.n_eff:.0f} independent "
            f"ones, so intervals may be short; measure longer"
        )
    return tuple(found)
