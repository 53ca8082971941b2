"""Which cause took the lost time: shares of what was lost, with intervals, and a remainder that stays unknown.

Lost time is excess over a floor, quantum by quantum.  Causes claim it in a fixed order, each only what those before it
left, so that shares never add up to more than one:

1. *Events* (pauses of the garbage collector, a log of injections, throttle flags), by exact overlap: of a quantum
   with excess e that an event covers for o seconds, min(e, o).  Taken off is what would have been lost in that time
   anyway, at the rate of the time without the event; an event without such time to compare with claims nothing.
2. *Counters*, bin by bin, where a bin is the time between two readings (about 100 ms): min(lost, increment), in the
   order of `COUNTER_CAUSES`.  A surplus pays for the bin before or after it, as counters move late, by up to a clock
   tick or the length of a wait; a wait longer than its bin goes back as far as it lasted.

A thread that works without sleeping is on a CPU, runnable without one, or neither.  Wall time less on_cpu_ns,
run_delay_ns, throttled_ns, steal_ns and irq time is therefore time in which it was *stopped* (a signal, a debugger, a
frozen group) or asleep for a reason that counters do not tell: the cause `STOPPED`.  It claims after all others, and
steal claims no more than the hypervisor says it took, so a stop cannot be called steal.

A single cause is named only if it explains at least `NAMED_FROM` of what was lost (the rule of traceml).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sigma_noise.lost import Lost
from sigma_noise.plain import plain
from sigma_noise.spans import overlap_s, union
from sigma_noise.trace import Series, Trace

NAMED_FROM = 0.8
STOPPED = "stopped or unknown"
# In order of claiming: exact and certain first, then coarse, then estimates, then what is left over by subtraction.
COUNTER_CAUSES = (
    "cgroup throttle",
    "run-queue wait",
    "steal",
    "interrupts",
    "page faults",
    "frequency",
    STOPPED,
)
OF_ALL_CPUS = "of all CPUs, as the thread was not pinned: claims nothing"
DETOUR = "detour"  # an event that is itself lost time
NO_CAUSE = ("idle", "application clocks", "display clocks")  # states of an accelerator that take nothing away
TOLD_FROM = 0.005  # in the sentence
BIN_S = 0.1  # where there are no counters to set the bins
RESAMPLES = 1000
CONFIDENCE = 0.95

Bins = NDArray[np.float64]


@dataclass(frozen=True)
class Share:
    """Of lost time, 0..1; low and high: 95 % by a block bootstrap over bins, NaN below ten bins."""

    cause: str
    seconds: float
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Attribution:
    """Shares of all causes that claimed something, the largest first; `unknown` is the rest."""

    lost_s: float
    shares: tuple[Share, ...]
    unknown: Share
    named: str | None
    unread: Mapping[str, str]

    def share(self, cause: str) -> float:
        return next((s.share for s in self.shares if s.cause == cause), 0.0)

    @property
    def sentence(self) -> str:
        if self.lost_s == 0:
            return "nothing was lost"
        told = [s for s in self.shares[:3] if s.share >= TOLD_FROM]
        parts = ", ".join(f"{s.cause} {_percent(s)}" for s in (*told, self.unknown))
        verdict = f"cause: {self.named}" if self.named else "no single cause"
        return f"{verdict}; of {self.lost_s:.3g} s lost: {parts}"

    def to_json(self) -> dict[str, Any]:
        return {**plain(self), "sentence": self.sentence}


@dataclass(frozen=True)
class Claims:
    """What causes took of `lost`: events, quantum by quantum; all of them, by bins between `edges_ns`."""

    lost: Lost
    events: Mapping[str, Lost]
    left: Lost  # by events
    edges_ns: NDArray[np.int64]
    credit: Mapping[str, Bins]
    rest: Bins
    unread: Mapping[str, str]

    def summary(self, seed: int) -> Attribution:
        return summary(self.lost.per_bin(self.edges_ns), self.credit, self.rest, self.unread, seed)

    def of_quanta(self, cause: str) -> Bins:
        """Seconds that a cause took of each quantum [n]; a counter claims the longest excess of a bin first."""
        if cause in self.events:
            return self.events[cause].excess_s
        bins = len(self.edges_ns) - 1
        middle = self.left.start_ns + (self.left.end_ns - self.left.start_ns) // 2
        at = np.clip(np.searchsorted(self.edges_ns, middle, "right") - 1, 0, bins - 1)
        return longest_first(self.left.excess_s, at, self.credit[cause])


def longest_first(excess_s: Bins, bin_of: NDArray[np.int64], seconds: Bins) -> Bins:
    """Seconds [bins] shared out to excesses [n], of which each takes its own at most, the longest of a bin first."""
    order = np.lexsort((-excess_s, bin_of))
    sums = np.concatenate([[0.0], np.cumsum(excess_s[order])])
    first = np.searchsorted(bin_of[order], np.arange(len(seconds)))
    before = sums[:-1] - sums[first][bin_of[order]]
    taken = np.empty_like(excess_s)
    taken[order] = np.clip(seconds[bin_of[order]] - before, 0.0, excess_s[order])
    return taken


def attribute(
    lost: Lost,
    counters: Mapping[str, Series],
    events: Mapping[str, Series],
    *,
    costs: Mapping[str, float] | None = None,
    unread: Mapping[str, str] | None = None,
    is_pinned: bool = False,
    seed: int = 0,
) -> Attribution:
    """Share out `lost` among causes.

    Args:   counters, events: by name, as a Sampler wrote them; events claim in the order given.  Detours claim nothing.
            is_pinned: steal and interrupts are those of the thread's CPU.  Of all CPUs they are an upper bound, which
            claims nothing, and by which a stop is told from steal all the same.
            costs: seconds per count of minor_faults and major_faults (`fitness.fault_cost_s` measures the first).
            unread: counters that could not be read, with the reason; passed on.
    Raises: ValueError if stamps of a counter do not rise.
    """
    return claims(lost, counters, events, costs, unread, is_pinned).summary(seed)


def claims(
    lost: Lost,
    counters: Mapping[str, Series],
    events: Mapping[str, Series],
    costs: Mapping[str, float] | None = None,
    unread: Mapping[str, str] | None = None,
    is_pinned: bool = False,
) -> Claims:
    """As `attribute`."""
    for name, series in counters.items():
        if np.any(np.diff(series.start_ns) <= 0):
            raise ValueError(f"counters[{name!r}]: stamps must rise")
    left = lost
    per_cause: dict[str, Lost] = {}
    taken = union(np.empty(0, np.int64), np.empty(0, np.int64))
    for cause, series in events.items():
        if cause == DETOUR:
            continue
        own = union(series.start_ns, series.end_ns)
        both = union(np.concatenate([taken[0], own[0]]), np.concatenate([taken[1], own[1]]))
        per_cause[cause] = _claimed_by_event(left, own, taken, both)
        left = left.minus(per_cause[cause])
        taken = both
    edges = _edges(lost, counters)
    credit = {cause: claimed.per_bin(edges) for cause, claimed in per_cause.items()}
    rest = left.per_bin(edges)
    unread = dict(unread or {})
    if not is_pinned:
        unread |= {name: OF_ALL_CPUS for name in ("steal_ns", "irq_ns", "softirq_ns") if name in counters}
    for cause, claim in _counter_claims(edges, counters, costs or {}, is_pinned).items():
        if cause == "run-queue wait":  # older kernels count throttled time as waiting, too
            claim = np.maximum(claim - credit.get("cgroup throttle", 0.0), 0.0)
        credit[cause] = _settle(rest, claim)
        rest = np.maximum(rest - credit[cause], 0.0)  # rounding
    return Claims(lost, per_cause, left, edges, credit, rest, unread)


def attribute_trace(
    trace: Trace, rank: int, lost: Lost, *, injected: Mapping[str, Series] | None = None, seed: int = 0
) -> Attribution:
    """The same, with the counters and events of a rank's file, and a log of injections if there is one."""
    return claims_of_trace(trace, rank, lost, injected).summary(seed)


def claims_of_trace(
    trace: Trace, rank: int, lost: Lost, injected: Mapping[str, Series] | None = None
) -> Claims:
    events = dict(injected or {})
    events |= {n: s for n, s in trace.of(rank, "event") if not is_state(n) and n not in events}
    about = trace.ranks.get(rank, {})
    sampler = about.get("sampler", {})
    # Of the host's thread, which waits while a GPU works: they say nothing of its quanta.
    counters = {} if trace.run.get("backend") == "cuda" else dict(trace.of(rank, "counter"))
    is_pinned = sampler.get("cpu") is not None
    return claims(lost, counters, events, about.get("fault_cost_s"), sampler.get("unread"), is_pinned)


def is_state(event: str) -> bool:
    device, _, state = event.partition(" ")
    return bool(device) and state in NO_CAUSE


def _claimed_by_event(
    left: Lost, own: tuple[Any, Any], taken: tuple[Any, Any], both: tuple[Any, Any]
) -> Lost:
    """Excess of each quantum that the event explains, less what would be lost in that time without it."""

    def fresh_s(
        start: NDArray[np.int64], end: NDArray[np.int64]
    ) -> NDArray[np.float64]:  # in `own`, not in `taken`
        return overlap_s(start, end, both) - overlap_s(start, end, taken)

    claim = np.minimum(left.excess_s, fresh_s(left.start_ns, left.end_ns))
    begin, end = np.array(left.window_ns, np.int64)[:, None]
    event_s = float(fresh_s(begin, end)[0])
    any_own = overlap_s(left.start_ns, left.end_ns, own) > 0
    outside_s = float((end - begin)[0] * 1e-9 - overlap_s(begin, end, own)[0])
    total = float(claim.sum())
    if total == 0.0:
        return left.with_excess(claim)
    if outside_s <= 0.0:
        return left.with_excess(np.zeros_like(claim))
    usual = float(left.excess_s[~any_own].sum()) / outside_s  # seconds lost in a second without the event
    return left.with_excess(claim * max(0.0, 1.0 - usual * event_s / total))


def _edges(lost: Lost, counters: Mapping[str, Series]) -> NDArray[np.int64]:
    """Bins between readings, so that increments need no interpolation; the window's ends complete them."""
    begin, end = lost.window_ns
    best = next((counters[n] for n in ("run_delay_ns", "on_cpu_ns", "steal_ns") if n in counters), None)
    if best is None:
        best = next(iter(counters.values()), None)
    if best is None:
        return np.linspace(begin, end, max(2, round((end - begin) * 1e-9 / BIN_S) + 1)).astype(np.int64)
    inner = best.start_ns[(best.start_ns > begin) & (best.start_ns < end)]
    return np.concatenate([[begin], inner, [end]]).astype(np.int64)


def _counter_claims(
    edges: NDArray[np.int64], counters: Mapping[str, Series], costs: Mapping[str, float], is_pinned: bool
) -> dict[str, Bins]:
    """Seconds that each cause says it took, per bin, in the order of claiming."""
    wall = np.diff(edges) * 1e-9

    def rise(name: str, scale: float) -> Bins:
        if name not in counters:
            return np.zeros(len(wall))
        series = counters[name]
        said = np.maximum.accumulate(series.value)  # steal is known to step back when a guest migrates
        return np.diff(np.interp(edges - edges[0], series.start_ns - edges[0], said)) * scale

    steal = rise("steal_ns", 1e-9)
    irq = rise("irq_ns", 1e-9) + rise("softirq_ns", 1e-9)
    on_cpu = rise("on_cpu_ns", 1e-9)
    # In the same way, so that of what an old kernel counts in both nothing is left of the second.
    off_cpu = np.maximum(wall - on_cpu, 0.0)
    throttled, waited = (_pushed_back(rise(name, 1e-9), off_cpu) for name in ("throttled_ns", "run_delay_ns"))
    faults = sum(
        (rise(name, costs[name]) for name in ("minor_faults", "major_faults") if name in costs),
        start=np.zeros(len(wall)),
    )
    claims = {
        "cgroup throttle": throttled,
        "run-queue wait": waited,
        "steal": steal if is_pinned else np.zeros(len(wall)),
        "interrupts": irq if is_pinned else np.zeros(len(wall)),
        "page faults": faults,
        "frequency": _slow_clock(edges, on_cpu, counters),
        STOPPED: np.zeros(len(wall)),
    }
    if {"on_cpu_ns", "run_delay_ns"} <= counters.keys():
        neither = wall - on_cpu - waited - throttled - steal - irq
        # Outside of the readings counters stand still, which is no sign of a stop.
        known = counters["on_cpu_ns"].start_ns
        was_read = (edges[1:] <= known[-1]) & (edges[:-1] >= known[0])
        claims[STOPPED] = np.where(was_read, np.maximum(neither, 0.0), 0.0)
    return {cause: claims[cause] for cause in COUNTER_CAUSES}


def _pushed_back(waited: Bins, off_cpu: Bins) -> Bins:
    """A wait or a throttle is counted when it ends: what a bin has no room for was spent in the bins before."""
    waited = waited.copy()
    for b in range(len(waited) - 1, 0, -1):
        over = max(0.0, waited[b] - off_cpu[b])
        waited[b] -= over
        waited[b - 1] += over
    return waited


def _slow_clock(edges: NDArray[np.int64], on_cpu: Bins, counters: Mapping[str, Series]) -> Bins:
    """On a CPU at f instead of the best f seen, work that needs t seconds takes t f_best / f."""
    if "cpu_khz" not in counters:
        return np.zeros(len(on_cpu))
    khz = counters["cpu_khz"]
    at = np.interp(edges - edges[0], khz.start_ns - edges[0], khz.value)
    return on_cpu * (1.0 - (at[1:] + at[:-1]) / 2 / khz.value.max())


def _settle(rest: Bins, claim: Bins) -> Bins:
    """min(rest, claim) of each bin; what a claim has left over pays for its neighbours, the one before first."""
    paid = np.minimum(rest, claim)
    over = claim - paid
    earlier = np.zeros_like(paid)
    earlier[:-1] = np.minimum((rest - paid)[:-1], over[1:])
    over[1:] -= earlier[:-1]
    paid = paid + earlier
    later = np.zeros_like(paid)
    later[1:] = np.minimum((rest - paid)[1:], over[:-1])
    return paid + later


def summary(
    lost: Bins, credit: Mapping[str, Bins], rest: Bins, unread: Mapping[str, str], seed: int
) -> Attribution:
    """Of seconds lost in each bin: what each cause took, and what none did."""
    total = float(lost.sum())
    if total == 0.0:
        nothing = Share("unknown", 0.0, 0.0, 0.0, 0.0)
        return Attribution(0.0, (), nothing, None, unread)
    names = [cause for cause, bins in credit.items() if bins.sum() > 0]
    table = np.array([*(credit[cause] for cause in names), rest])  # [causes + 1, bins]
    low, high = _bootstrap(table, lost, seed)
    shares = [
        Share(cause, float(row.sum()), float(row.sum()) / total, float(a), float(b))
        for cause, row, a, b in zip([*names, "unknown"], table, low, high, strict=True)
    ]
    known = sorted(shares[:-1], key=lambda s: -s.share)
    named = known[0].cause if known and known[0].share >= NAMED_FROM else None
    return Attribution(total, tuple(known), shares[-1], named, unread)


def circular_blocks(n: int, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[resamples, n] indices, drawn in circular blocks of about n^(1/3) (Politis and Romano 1992)."""
    block = max(1, round(n ** (1 / 3)))
    begins = rng.integers(0, n, (resamples, -(-n // block)))
    drawn: NDArray[np.int64] = (begins[:, :, None] + np.arange(block)) % n
    return drawn.reshape(resamples, -1)[:, :n]


def _bootstrap(table: Bins, lost: Bins, seed: int) -> tuple[Bins, Bins]:
    """Percentiles of ratios of sums over bins that were drawn."""
    n = len(lost)
    if n < 10:
        nan = np.full(len(table), np.nan)
        return nan, nan
    rng = np.random.default_rng(seed)
    drawn = circular_blocks(n, RESAMPLES, rng)
    of_sample = n * np.arange(RESAMPLES)[:, None]
    weights = np.bincount((drawn + of_sample).ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n)
    of = weights @ lost
    ratios = (weights @ table.T)[of > 0] / of[of > 0, None]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail], axis=0)
    return np.clip(low, 0.0, 1.0), np.clip(high, 0.0, 1.0)


def _percent(share: Share) -> str:
    interval = "" if share.low != share.low else f" [{share.low:.0%}, {share.high:.0%}]"
    return f"{share.share:.0%}{interval}"
