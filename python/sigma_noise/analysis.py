"""What a measurement says: noise, its rhythm and its causes on each rank, ranks beside one another, and many ranks.

Everything that is shown, in whatever form, is made here once: of a `Trace`, `analyze` makes an `Analysis`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sigma_noise import changes, detours, periods
from sigma_noise.attribution import Attribution, attribute_trace
from sigma_noise.changes import Change
from sigma_noise.collectives import Collectives, split
from sigma_noise.detours import Noise
from sigma_noise.intervals import Interval, intervals, ratio_interval
from sigma_noise.lost import Lost
from sigma_noise.periods import Period
from sigma_noise.project import RANKS, Projection, project
from sigma_noise.scores import LEAST_STEPS, Scores, score
from sigma_noise.trace import Series, Trace

FIXED_TIME = "_ftq"
COLLECTIVE, LOCAL = "a2a", "a2a_local"
WINDOW_S = 1e-2  # useful work between barriers, where nobody says how much there is
MOST_HZ = 60.0
MOST_SCAN = 4e5  # cycles of the highest frequency that a window is searched for
FEW_SAMPLES = 30
FEWEST_EFFECTIVE = 500  # below which intervals may be short

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class OfRank:
    """One kernel on one rank.  `median`: seconds of a quantum, of work in a quantum of fixed time."""

    rank: int
    kernel: str
    quanta: int
    median: Interval
    noise: Noise
    share: Interval
    changes: tuple[Change, ...]
    periods: tuple[Period, ...]
    causes: Attribution | None = None

    @property
    def is_fixed_time(self) -> bool:
        return self.kernel.endswith(FIXED_TIME)


@dataclass(frozen=True)
class Gaps:
    """Detours of a loop that does nothing."""

    rank: int
    noise: Noise
    periods: tuple[Period, ...]


@dataclass(frozen=True)
class Analysis:
    """`ranked`: the series by which ranks are scored; `kernel`: the one that the first screen is of."""

    run: Mapping[str, Any]
    hosts: Mapping[int, str]
    kernel: str
    series: tuple[OfRank, ...]
    gaps: tuple[Gaps, ...]
    ranked: str | None
    scores: Scores | None
    collectives: Collectives | None
    projections: tuple[Projection, ...]
    windows: tuple[Floats, ...] = field(repr=False)
    warnings: tuple[str, ...]
    digests: Mapping[str, str] = field(default_factory=dict)

    def of(self, kernel: str) -> list[OfRank]:
        return [s for s in self.series if s.kernel == kernel]

    @property
    def window_s(self) -> float:
        """Mean window between barriers, NaN without one."""
        return float(np.mean([row.mean() for row in self.windows])) if self.windows else float("nan")

    @property
    def longest(self) -> Floats:
        """Windows [n] of the slowest rank of each host at each instant, of all hosts together."""
        if len(self.windows) != len(self.hosts):
            return np.empty(0)
        by_host: dict[str, list[Floats]] = {}
        for row, host in zip(self.windows, self.hosts.values(), strict=True):
            by_host.setdefault(host, []).append(row)
        least = {host: min(map(len, rows)) for host, rows in by_host.items()}
        return np.concatenate(
            [np.max([row[: least[host]] for row in rows], axis=0) for host, rows in by_host.items()]
        )

    @property
    def worst(self) -> OfRank | None:
        """Of the kernel of the first screen, the rank with most noise."""
        return max(self.of(self.kernel), key=lambda s: s.noise.share, default=None)


def analyze(
    trace: Trace,
    *,
    kernel: str | None = None,
    tau_s: float | None = None,
    ranks: Sequence[int] = RANKS,
    window_s: float = WINDOW_S,
    alpha: float = 0.01,
    seed: int = 0,
    injected: Mapping[str, Series] | None = None,
    digests: Mapping[str, str] | None = None,
) -> Analysis:
    """All of it.

    Args:    kernel: of the first screen, the causes and the projection; else the first that was measured.
             tau_s: threshold of detours; else `detours.work_threshold` and `gap_threshold` choose one a series.
             ranks: N of S(N).  window_s: useful work between barriers, of kernels that are no collective.
             injected: the truth log of an injection, by cause.
    Raises:  ValueError for a kernel that was not measured, or a trace without quanta and detours.
    """
    names = [name for name in trace.names() if name != COLLECTIVE]
    if not names and "detour" not in trace.names("event"):
        raise ValueError("trace must have quanta or detours, found none")
    kernel = chosen(trace, names, kernel)
    own = own_periods(trace)
    series = tuple(
        of_rank(trace, rank, name, tau_s, own, seed, injected if name == kernel else None, name == kernel)
        for name in names
        for rank in trace.ranks
        if is_usable(trace.get(rank, "quantum", name), name)
    )
    gaps = tuple(
        found for rank in trace.ranks if (found := gaps_of(trace, rank, tau_s, own, seed)) is not None
    )
    collectives = collectives_of(trace)
    ranked, windows = barriers(trace, kernel, collectives, window_s)
    scores = scored(windows, alpha, seed)
    hosts = {rank: str(about.get("host", rank)) for rank, about in trace.ranks.items()}
    projections = projected(windows, [hosts[rank] for rank in trace.ranks], ranks, seed)
    return Analysis(
        trace.run, hosts, kernel, series, gaps, ranked if scores else None, scores, collectives, projections,
        tuple(windows),
        warnings(trace, series, names), digests or {},
    )  # fmt: skip


def is_usable(series: Series, name: str) -> bool:
    """Enough quanta, and of fixed time some with work done: a step may be longer than a quantum."""
    if len(series) < FEW_SAMPLES:
        return False
    return not name.endswith(FIXED_TIME) or float(np.quantile(series.value, 1 - detours.FLOOR)) >= 1


def chosen(trace: Trace, names: Sequence[str], kernel: str | None) -> str:
    if kernel is not None and kernel not in names:
        raise ValueError(f"kernel must be one of {', '.join(names) or 'none'}, found {kernel!r}")
    asked = [*trace.run.get("kernels", ()), LOCAL, *names]
    return kernel or next((name for name in asked if name in names), "")


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
    tau_s: float | None,
    own: Mapping[str, float],
    seed: int,
    injected: Mapping[str, Series] | None,
    with_causes: bool,
) -> OfRank:
    series = trace.get(rank, "quantum", kernel)
    start_s = series.since(int(series.start_ns[0]))
    if kernel.endswith(FIXED_TIME):
        return of_fixed_time(trace, rank, kernel, series, start_s, tau_s, own, seed)
    seconds = np.maximum(series.seconds, 1e-9)
    found = tuple(changes.changes(start_s, seconds, seed=seed))
    bounds = np.array([0, *(change.index for change in found), len(seconds)])
    noise = detours.fixed_work(start_s, seconds, bounds, tau_s)
    floor = detours.floor(seconds, bounds)
    rhythm = rhythm_of(noise, float(start_s[-1] + seconds[-1]), own, seed)
    period = rhythm[0].period_s / float(np.median(seconds)) if rhythm else None
    excess = np.maximum(0.0, seconds - floor)
    share = ratio_interval(excess, seconds, period=period, seed=seed)
    median = intervals(seconds, ["median"], period=period, seed=seed)["median"]
    causes = None
    if with_causes and (injected or any(True for _ in trace.of(rank, "counter"))):
        causes = attribute_trace(trace, rank, Lost.over_floor(series, floor), injected=injected, seed=seed)
    return OfRank(rank, kernel, len(series), median, noise, share, found, rhythm, causes)


def of_fixed_time(
    trace: Trace,
    rank: int,
    kernel: str,
    series: Series,
    start_s: Floats,
    tau_s: float | None,
    own: Mapping[str, float],
    seed: int,
) -> OfRank:
    quantum_s = float(np.median(series.seconds))
    count = series.value
    bounds = changes.segments(np.maximum(count, 0.5))
    if (
        detours.floor(count, bounds, 1 - detours.FLOOR).min() <= 0
    ):  # a stretch in which no work was done is no level
        bounds = np.array([0, len(count)])
    noise = detours.fixed_time(start_s, count, quantum_s, bounds, tau_s)
    best = detours.floor(count, bounds, 1 - detours.FLOOR)
    lost = quantum_s * np.maximum(0.0, 1 - count / best)
    share = ratio_interval(lost, np.full(len(lost), quantum_s), seed=seed)
    median = intervals(count, ["median"], seed=seed)["median"]
    rhythm = rhythm_of(noise, float(start_s[-1]) + quantum_s, own, seed)
    return OfRank(rank, kernel, len(series), median, noise, share, (), rhythm)


def gaps_of(trace: Trace, rank: int, tau_s: float | None, own: Mapping[str, float], seed: int) -> Gaps | None:
    about = trace.ranks[rank].get("measured", {}).get("detour")
    if about is None:
        return None
    series, g0_s = trace.get(rank, "event", "detour"), float(about["least_gap_s"])
    observed_s = float(about["observed_s"])
    first = int(series.start_ns[0]) if len(series) else 0
    start_s = series.since(first)
    least = max(tau_s or 0.0, float(about["threshold_s"]))
    noise = detours.gaps(start_s, series.seconds, g0_s, observed_s, least)
    return Gaps(
        rank, noise, rhythm_of(noise, max(observed_s, float(start_s[-1]) if len(series) else 0.0), own, seed)
    )


def rhythm_of(noise: Noise, window_s: float, own: Mapping[str, float], seed: int) -> tuple[Period, ...]:
    """Periods from three in the window up to 60 Hz, or to where a search still is cheap."""
    at = noise.detours.start_s
    low = max(1.0, 3.0 / window_s)
    high = min(MOST_HZ, MOST_SCAN / window_s)
    if len(at) < periods.FEWEST_STAMPS or low >= high:
        return ()
    inside = at <= window_s
    found = periods.find(
        at[inside],
        window_s,
        length_s=noise.detours.length_s[inside],
        low_hz=low,
        high_hz=high,
        own=dict(own),
        seed=seed,
    )
    return tuple(found)


def collectives_of(trace: Trace) -> Collectives | None:
    ranks = [rank for rank in trace.ranks if len(trace.get(rank, "quantum", COLLECTIVE))]
    if len(ranks) < 2:
        return None
    series = [trace.get(rank, "quantum", COLLECTIVE) for rank in ranks]
    offset, residual = zip(*(clock_of(trace, rank) for rank in ranks), strict=True)
    begin = (
        [int(trace.get(rank, "quantum", LOCAL).start_ns[0]) for rank in ranks]
        if LOCAL in trace.names()
        else None
    )
    return split(
        [s.start_ns for s in series],
        [s.end_ns for s in series],
        begin_ns=begin,
        offset_ns=offset,
        residual_ns=residual,
    )


def clock_of(trace: Trace, rank: int) -> tuple[int, int]:
    """Offset and residual of a rank's clock, ns: the mean of before and after, and the larger doubt."""
    found = trace.ranks[rank].get("clock", {}).get("offsets") or []
    offsets = [float(o.get("offset_ns") or 0) for o in found] or [0.0]
    doubts = [float(o.get("residual_ns") or 0) for o in found] or [0.0]
    return round(sum(offsets) / len(offsets)), round(max(doubts))


def barriers(
    trace: Trace, kernel: str, collectives: Collectives | None, window_s: float
) -> tuple[str, list[Floats]]:
    """Seconds that each rank takes from barrier to barrier, [P][n]: local time before collectives, else sums of
    quanta of fixed work of `window_s` together; none of fixed time.
    """
    if collectives is not None:
        return f"local time before {COLLECTIVE}", list(collectives.local_s)
    if not kernel or kernel.endswith(FIXED_TIME):
        return kernel, []
    rows = [trace.get(rank, "quantum", kernel).seconds for rank in trace.ranks]
    rows = [row for row in rows if len(row) >= FEW_SAMPLES]
    if not rows:
        return kernel, []
    width = max(1, round(window_s / float(np.median(np.concatenate(rows)))))
    return kernel, [np.add.reduceat(row[: len(row) // width * width], np.arange(0, len(row) // width * width, width))
                    for row in rows if len(row) >= width]  # fmt: skip


def scored(windows: Sequence[Floats], alpha: float, seed: int) -> Scores | None:
    if len(windows) < 2 or min(map(len, windows)) < LEAST_STEPS:
        return None
    return score([np.maximum(row, 1e-9) for row in windows], alpha=alpha, seed=seed)


def projected(
    windows: Sequence[Floats], hosts: Sequence[str], ranks: Sequence[int], seed: int
) -> tuple[Projection, ...]:
    """What was seen, and with a tail beyond it."""
    if not windows or len(windows) != len(hosts):
        return ()
    rows = [np.maximum(row, 1e-9) for row in windows]
    sizes = {hosts.count(host) for host in hosts}
    names = list(hosts) if len(sizes) == 1 else None  # else each rank is a host of its own
    return tuple(project(rows, ranks, hosts=names, model=model, seed=seed) for model in ("ecdf", "gpd"))


def warnings(trace: Trace, series: Sequence[OfRank], names: Sequence[str]) -> tuple[str, ...]:
    """Each with its remedy."""
    found = [
        f"rank {rank}: {text}" for rank, about in trace.ranks.items() for text in about.get("warnings", ())
    ]
    seen = {(s.rank, s.kernel) for s in series}
    found += [
        f"rank {rank}: fewer than {FEW_SAMPLES} quanta of {name}, or most without work done; measure longer"
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
