"""Why a rank of a training was late, and what a step would take without it.

A step takes sum_k max_r own[k, r] over its segments (`step_segments`), and what the data take, so of a cause that took
x[k, r] of it

    regained = sum_k max_r own[k, r] - max_r (own[k, r] - x[k, r]) + y[k, r]

where y is what an event took after all ranks had come and before they went on, late together: a rank that is stopped
then sends nothing.  Where some go on and some are held by it, x is of all that are held.

What a rank lost is y, and its own time beyond that of the median rank, step by step, less what other ranks have beyond
it by chance.  Events claim it first, by overlap: injections that are known, garbage collection, late wakes of the
process' heartbeat, which was stopped then.  Then what the counters of the rank's thread rose by beyond those of the
median rank, likewise: time that its group was throttled, runnable time without a CPU, time neither on a CPU nor
runnable nor waiting (`STOPPED`), and at last time on a CPU, which is more work or a slower clock (`COMPUTING`).
Counters do not say when within a step: segments of the longest excess are theirs first.

What events cost is told a second way, by steps that they touched and steps that they did not (`step_matched`), where
that can tell; the interval then has both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sigma_noise import spans
from sigma_noise.attribution import STOPPED, Attribution, circular_blocks, longest_first, summary
from sigma_noise.step_counters import LATE
from sigma_noise.step_matched import matched
from sigma_noise.step_segments import NEVER, Floats, Segments, Stamps, median_rank, over_median, over_others
from sigma_noise.steps import WARM_UP, Attempt, attempts_of, where
from sigma_noise.trace import Series, Trace

COMPUTING = "longer on a CPU"
COUNTED = {"throttled_ns": "cgroup throttle", "run_delay_ns": "run-queue wait"}
RESAMPLES = 2000
LEVEL = 0.9


@dataclass(frozen=True)
class Estimate:
    """Seconds a step, mean over steps, and its 90 % interval, by blocks of steps drawn with replacement."""

    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Regained:
    """What would be regained if a cause were gone from a rank: by segments, and by steps that it did not touch.

    The latter is None of what has no begin and end, and where its interval is wider than the events themselves.
    """

    by_segments: Estimate
    by_steps: Estimate | None

    @property
    def seconds(self) -> float:
        return self.by_segments.seconds

    @property
    def low(self) -> float:
        """Of both, so that where they differ the interval says so."""
        return min(each.low for each in (self.by_segments, self.by_steps) if each)

    @property
    def high(self) -> float:
        return max(each.high for each in (self.by_segments, self.by_steps) if each)


@dataclass(frozen=True)
class Late:
    """Of the rank that lost most, alone or with all others: what took that, and what each cause cost a step."""

    rank: int
    steps: int
    step_s: float
    causes: Attribution
    regained: Mapping[str, Regained]

    @property
    def sentence(self) -> str:
        told = f"rank {self.rank}: {self.causes.sentence}"
        if not self.causes.shares:
            return told
        first = self.causes.shares[0].cause
        gain = self.regained[first]
        return (
            f"{told}; without {first} a step of {self.step_s * 1e3:.4g} ms would take {gain.seconds * 1e3:.3g} ms less "
            f"[{gain.low * 1e3:.3g}, {gain.high * 1e3:.3g}]"
            + (f", by steps without it {gain.by_steps.seconds * 1e3:.3g}" if gain.by_steps else "")
        )


def late(
    trace: Trace,
    *,
    rank: int | None = None,
    injected: Mapping[int, Mapping[str, Series]] | None = None,
    between: Sequence[tuple[int, int]] | None = None,
    warm_up: int = WARM_UP,
    seed: int = 0,
) -> Late | None:
    """Of `rank`, else of the one that lost most; None of a single rank, which is late for nobody.

    Args:    injected: events that are known, by rank and cause, on its clock.
             between: windows, ns of the rank's clock; steps that do not lie within one are passed over.
    Raises:  ValueError as `step_noise`, if ranks met unequally often, or if no step is left.
    """
    segments = [Segments(attempt) for attempt in attempts_of(trace, warm_up) if len(attempt.ranks) > 1]
    if not segments:
        return None
    told = injected or {}
    rank = _worst(segments, told) if rank is None else rank
    known = told.get(rank, {})
    among = [(each, _among(each.attempt, rank, between)) for each in segments if rank in each.attempt.ranks]
    parts = [_of_attempt(each, rank, known, kept) for each, kept in among if kept.any()]
    if not parts:
        raise ValueError(f"late: rank {rank} must have steps with others in this time, found none")
    lost, whole = (np.concatenate([getattr(part, name) for part in parts]) for name in ("lost", "whole"))
    causes = list(dict.fromkeys(cause for part in parts for cause in part.claimed))
    credit = {cause: _joined([part.claimed.get(cause) for part in parts], parts) for cause in causes}
    rest = np.maximum(0.0, lost - sum(credit.values(), np.zeros(len(lost))))
    rng = np.random.default_rng(seed)
    unread = {name: why for part in parts for name, why in part.unread.items()}
    return Late(
        rank,
        len(lost),
        float(whole.mean()),
        summary(lost, credit, rest, unread, seed),
        {cause: _regained(cause, parts, rng) for cause in causes},
    )


def _joined(of_parts: Sequence[Floats | None], parts: Sequence["_Part"]) -> Floats:
    """Steps of all parts; of one without it, nothing."""
    each = [np.zeros(len(p.lost)) if x is None else x for x, p in zip(of_parts, parts, strict=True)]
    return np.concatenate(each)


def _regained(cause: str, parts: Sequence["_Part"], rng: np.random.Generator) -> Regained:
    by_segments = _mean(_joined([part.saved.get(cause) for part in parts], parts), rng)
    events = _joined([part.events.get(cause) for part in parts], parts)
    matches = [part.matched[cause] for part in parts if cause in part.matched]
    if not events.any() or any(x is None for x in matches):
        return Regained(by_segments, None)
    counted = _joined([part.counted.get(cause) for part in parts], parts)
    compared = _joined([part.matched.get(cause) for part in parts], parts)
    elsewhere = np.where(events > 0, 0.0, counted)  # a step that was touched is compared as a whole
    by_steps = _mean(compared + elsewhere, rng)
    tells = by_steps.high - by_steps.low < events.mean()
    return Regained(by_segments, by_steps if tells else None)


def _mean(seconds: Floats, rng: np.random.Generator) -> Estimate:
    """Of seconds [n] by step."""
    drawn = circular_blocks(len(seconds), RESAMPLES, rng)
    low, high = np.quantile(seconds[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(seconds.mean()), float(low), float(high))


def _worst(segments: list[Segments], injected: Mapping[int, Mapping[str, Series]]) -> int:
    """By own time beyond the median rank's, and by what its events made all ranks lose."""
    beyond: dict[int, float] = {}
    for each in segments:
        own = each.by_step(each.own)
        for at, rank in enumerate(each.attempt.ranks):
            events = _events(each, at, injected.get(rank, {})).values()
            together = sum(float(each.overlap(at, of)[1].sum()) for of in events)
            excess = float((own[:, at] - median_rank(own)).sum())
            beyond[rank] = beyond.get(rank, 0.0) + excess + together
    return max(beyond, key=beyond.__getitem__)


@dataclass(frozen=True)
class _Part:
    """Of one attempt, seconds by step [n]: lost by the rank, and by cause claimed of it, saved of the step, of that by
    counters alone, of events, and what steps lost to those by comparison (None where that cannot be told).
    """

    lost: Floats
    whole: Floats
    claimed: Mapping[str, Floats]
    saved: Mapping[str, Floats]
    counted: Mapping[str, Floats]
    events: Mapping[str, Floats]
    matched: Mapping[str, Floats | None]
    unread: Mapping[str, str]


def _among(attempt: Attempt, rank: int, between: Sequence[tuple[int, int]] | None) -> NDArray[np.bool_]:
    """[n]: steps that lie within one of these windows."""
    steps = attempt.steps[rank]
    begin, end = steps.start_ns[: attempt.n], steps.end_ns[: attempt.n]
    inside = [(begin >= a) & (end <= b) for a, b in ([(0, NEVER)] if between is None else between)]
    found: NDArray[np.bool_] = np.any(inside, axis=0)
    return found


def _of_attempt(
    segments: Segments,
    rank: int,
    injected: Mapping[str, Series],
    kept: NDArray[np.bool_],
) -> _Part:
    attempt, at = segments.attempt, segments.attempt.ranks.index(rank)
    steps = attempt.steps[rank]
    begin, end = steps.start_ns[: attempt.n], steps.end_ns[: attempt.n]
    own = segments.by_step(segments.own)
    room = over_median(segments.own, at)
    claimed: dict[str, Floats] = {}
    saved: dict[str, Floats] = {}
    lasted: dict[str, Floats] = {}
    compared: dict[str, Floats | None] = {}
    together = np.zeros(attempt.n)  # lost by all ranks alike
    known = np.zeros(attempt.n)  # by events, of the rank's own time
    for cause, of in _events(segments, at, injected).items():
        before, after = segments.overlap(at, of)
        mine, of_all = np.minimum(room, before), segments.by_step(after)
        seconds = np.minimum(over_median(own, at) - known, segments.by_step(mine))
        claimed[cause] = seconds + of_all
        saved[cause] = segments.saved(at, mine, segments.held(at, of)) + of_all
        lasted[cause] = spans.overlap_s(begin, end, of)
        compared[cause] = matched(begin[kept], end[kept], of)
        room, together, known = room - mine, together + of_all, known + seconds
    rest = over_others(own, at, kept, known)
    lost = rest + known + together
    by_counters, unread = _counted(segments, at, kept)
    counted: dict[str, Floats] = {}
    for cause, seconds in _without(by_counters, known).items():
        mine = longest_first(room, segments.step, seconds)
        counted[cause] = segments.saved(at, mine)
        claimed[cause] = claimed.get(cause, 0.0) + np.minimum(rest, seconds)
        saved[cause] = saved.get(cause, 0.0) + counted[cause]
        rest, room = rest - np.minimum(rest, seconds), room - mine
    told = [cause for cause, seconds in claimed.items() if seconds.any()]

    def of_kept(by_cause: Mapping[str, Floats]) -> dict[str, Floats]:
        return {cause: by_cause[cause][kept] for cause in told if cause in by_cause}

    return _Part(
        lost[kept],
        steps.seconds[: attempt.n][kept],
        of_kept(claimed),
        of_kept(saved),
        of_kept(counted),
        of_kept(lasted),
        {cause: compared[cause] for cause in told if cause in compared},
        unread,
    )


def _events(segments: Segments, at: int, injected: Mapping[str, Series]) -> dict[str, tuple[Stamps, Stamps]]:
    """Begin and end of what is known to the ns, by cause, each time named once.

    A late wake of the heartbeat is a stop, or a throttle where the group's counter rose by half of it or more in the
    same step.  It is neither if the heart was runnable for half of it, or while half of the other ranks' hearts were
    late as well: that is the host's, and no rank's fault.
    """
    attempt, rank = segments.attempt, segments.attempt.ranks[at]
    late = _late_wakes(attempt, rank)
    others = [_late_wakes(attempt, r) for r in attempt.ranks if r != rank]
    if attempt.share_a_clock(tuple(attempt.ranks)):
        late = spans.without(late, spans.common(others, (len(others) + 1) // 2))
    ends = attempt.steps[rank].end_ns[: attempt.n]
    step = np.searchsorted(ends, late[0])  # which ends after it began
    by_step = np.bincount(step, (late[1] - late[0]) * 1e-9, attempt.n + 1)[: attempt.n]
    throttled, _ = _rise(attempt, rank, "throttled_ns")
    rose = np.zeros(attempt.n) if throttled is None else throttled
    is_throttle = np.append((by_step > 0) & (rose >= by_step / 2), False)[step]
    known = {cause: spans.union(s.start_ns, s.end_ns) for cause, s in injected.items()}
    gc = attempt.rows(rank, "event", "gc")
    known["gc"] = spans.union(gc.start_ns, gc.end_ns)
    known[COUNTED["throttled_ns"]] = late[0][is_throttle], late[1][is_throttle]
    known[STOPPED] = late[0][~is_throttle], late[1][~is_throttle]
    found, taken = {}, spans.union(np.empty(0, np.int64), np.empty(0, np.int64))
    for cause, of in known.items():
        found[cause] = spans.without(of, taken)
        taken = spans.union(*(np.concatenate([a, b]) for a, b in zip(taken, found[cause], strict=True)))
    return found


def _late_wakes(attempt: Attempt, rank: int) -> tuple[Stamps, Stamps]:
    late = attempt.rows(rank, "event", LATE)
    late = where(late, late.value * 1e-9 < late.seconds / 2)
    return spans.union(late.start_ns, late.end_ns)


def _without(counted: Mapping[str, Floats], known: Floats) -> dict[str, Floats]:
    """Counters less what events took already, step by step: of the one that rose most, then of the next."""
    if not counted:
        return {}
    table = np.stack(list(counted.values()), 1)
    rest = known.copy()
    rows = np.arange(len(table))
    for column in np.argsort(-table, axis=1).T:
        less = np.minimum(rest, table[rows, column])
        table[rows, column] -= less
        rest -= less
    return dict(zip(counted, table.T, strict=True))


def _counted(
    segments: Segments, at: int, kept: NDArray[np.bool_]
) -> tuple[dict[str, Floats], dict[str, str]]:
    """Seconds a step by which the rank's counters rose beyond those of others; and why some cannot be told."""
    attempt = segments.attempt
    rose, unread = {}, {}
    for name in (*COUNTED, "on_cpu_ns"):
        of_ranks, why = zip(*(_rise(attempt, r, name) for r in attempt.ranks), strict=True)
        if reasons := [f"rank {r}: {w}" for r, w in zip(attempt.ranks, why, strict=True) if w]:
            unread[name] = reasons[0]
        else:
            rose[name] = np.stack(of_ranks, 1)
    found = {cause: rose[name] for name, cause in COUNTED.items() if name in rose}
    if {"run_delay_ns", "on_cpu_ns"} <= rose.keys():
        throttled = rose.get("throttled_ns", np.zeros(1))
        waited = np.maximum(rose["run_delay_ns"], throttled)  # old kernels count that as waiting, too
        found[STOPPED] = segments.by_step(segments.own) - rose["on_cpu_ns"] - waited
        found[COMPUTING] = rose["on_cpu_ns"]
    return {cause: over_others(seconds, at, kept) for cause, seconds in found.items()}, unread


def _rise(attempt: Attempt, rank: int, name: str) -> tuple[Floats | None, str]:
    """Seconds [n] in each step of a counter in ns, which is read where steps begin and end; or None, and why."""
    counter, steps = attempt.rows(rank, "counter", name), attempt.steps[rank]
    if not len(counter):
        return None, "not recorded"
    if counter.start_ns[0] > steps.start_ns[0] or counter.start_ns[-1] < steps.end_ns[attempt.n - 1]:
        return None, "not read in all steps"
    origin = int(counter.start_ns[0])
    begin, end = (
        np.interp(at[: attempt.n] - origin, counter.start_ns - origin, counter.value)
        for at in (steps.start_ns, steps.end_ns)
    )
    return (end - begin) * 1e-9, ""
