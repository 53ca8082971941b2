"""Why a rank of a training was late, and what a step would take without it.

Ranks meet at collectives.  Between two that all of them take part in, segment k, where rank r began to wait at w and
went on at e,

    own[k, r] = w[k, r] - e[k-1, r] + late[k, r],        late[k, r] = max(0, e[k, r] - median_r e[k, r])

less what it waited for some ranks only: a rank that is stopped while it waits goes on later than others do (seen where
ranks share a clock).  A step takes sum_k max_r own[k, r], and what the data take, so of a cause that took x[k, r] of it

    regained = sum_k max_r own[k, r] - max_r (own[k, r] - x[k, r]) + y[k, r]

where y is what an event took after all ranks had come and before they went on, late together: a rank that is stopped
then sends nothing.

What a rank lost is y, and its own time beyond that of the median rank, step by step.  Events claim it first, by
overlap: injections that are known, garbage collection, late wakes of the process' heartbeat, which was stopped then.
Then what the counters of the rank's thread rose by beyond those of the median rank: time that its group was throttled,
runnable time without a CPU, time neither on a CPU nor runnable nor waiting (`STOPPED`), and at last time on a CPU,
which is more work or a slower clock (`COMPUTING`).  Counters do not say when within a step: segments of the longest
excess are theirs first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sigma_noise import spans
from sigma_noise.attribution import STOPPED, Attribution, longest_first, summary
from sigma_noise.step_counters import LATE
from sigma_noise.steps import WARM_UP, Attempt, attempts_of, where
from sigma_noise.trace import Series, Trace

COMPUTING = "longer on a CPU"
COUNTED = {"throttled_ns": "cgroup throttle", "run_delay_ns": "run-queue wait"}
RESAMPLES = 2000
LEVEL = 0.9

Floats = NDArray[np.float64]
Stamps = NDArray[np.int64]


@dataclass(frozen=True)
class Regained:
    """Seconds a step that would be regained if a cause were gone from a rank, mean over steps, and its 90 % interval,
    by blocks of steps drawn with replacement.
    """

    seconds: float
    low: float
    high: float


@dataclass(frozen=True)
class Late:
    """Of the rank whose own time was the longest beyond the median: what took that, and what each cause cost a step."""

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
    """Of `rank`, else of the one with most own time beyond the median; None of a single rank, late for nobody.

    Args:    injected: events that are known, by rank and cause, on its clock.
             between: windows, ns of the rank's clock; steps that do not lie within one are passed over.
    Raises:  ValueError as `step_noise`, if ranks met unequally often, or if no step is left.
    """
    segments = [_Segments(attempt) for attempt in attempts_of(trace, warm_up) if len(attempt.ranks) > 1]
    if not segments:
        return None
    rank = _worst(segments) if rank is None else rank
    known = (injected or {}).get(rank, {})
    parts = [_of_attempt(each, rank, known, between) for each in segments if rank in each.attempt.ranks]
    parts = [part for part in parts if len(part.lost)]
    if not parts:
        raise ValueError(f"late: rank {rank} must have steps with others in this time, found none")
    lost, whole = (np.concatenate([getattr(part, name) for part in parts]) for name in ("lost", "whole"))
    causes = list(dict.fromkeys(cause for part in parts for cause in part.claimed))
    credit, saved = (
        {
            cause: np.concatenate(
                [getattr(part, name).get(cause, np.zeros(len(part.lost))) for part in parts]
            )
            for cause in causes
        }
        for name in ("claimed", "saved")
    )
    rest = np.maximum(0.0, lost - sum(credit.values(), np.zeros(len(lost))))
    rng = np.random.default_rng(seed)
    unread = {name: "not recorded" for part in parts for name in part.unread}
    return Late(
        rank,
        len(lost),
        float(whole.mean()),
        summary(lost, credit, rest, unread, seed),
        {cause: regained(seconds, rng) for cause, seconds in saved.items()},
    )


def _worst(segments: "list[_Segments]") -> int:
    beyond: dict[int, float] = {}
    for each in segments:
        own = each.by_step(each.own)
        excess = (own - np.median(own, 1, keepdims=True)).sum(0)
        for rank, seconds in zip(each.attempt.ranks, excess.tolist(), strict=True):
            beyond[rank] = beyond.get(rank, 0.0) + seconds
    return max(beyond, key=beyond.__getitem__)


def regained(seconds: Floats, rng: np.random.Generator) -> Regained:
    """Mean of seconds [n] by step, with circular blocks of about n^(1/3) steps (Politis and Romano 1992)."""
    n = len(seconds)
    block = max(1, round(n ** (1 / 3)))
    begins = rng.integers(0, n, (RESAMPLES, -(-n // block)))
    drawn = ((begins[:, :, None] + np.arange(block)) % n).reshape(RESAMPLES, -1)[:, :n]
    low, high = np.quantile(seconds[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Regained(float(seconds.mean()), float(low), float(high))


@dataclass(frozen=True)
class _Part:
    """Of one attempt, seconds by step [n]: lost by the rank, and by cause claimed of it, and saved of the step."""

    lost: Floats
    whole: Floats
    claimed: Mapping[str, Floats]
    saved: Mapping[str, Floats]
    unread: tuple[str, ...]


def _of_attempt(
    segments: "_Segments",
    rank: int,
    injected: Mapping[str, Series],
    between: Sequence[tuple[int, int]] | None,
) -> _Part:
    attempt, at = segments.attempt, segments.attempt.ranks.index(rank)
    steps = attempt.steps[rank]
    kept = np.ones(attempt.n, bool)
    if between is not None:
        begin, end = steps.start_ns[: attempt.n], steps.end_ns[: attempt.n]
        kept = np.any([(begin >= a) & (end <= b) for a, b in between], axis=0)
    rest = _over_median(segments.by_step(segments.own), at)
    room = _over_median(segments.own, at)
    claimed: dict[str, Floats] = {}
    saved: dict[str, Floats] = {}
    together = np.zeros(attempt.n)  # lost by all ranks alike
    known = np.zeros(attempt.n)  # by events, of the rank's own time
    counted, unread = _counted(segments, at)
    for cause, spans_of in _events(segments, at, injected, counted).items():
        before, after = segments.overlap(at, *spans_of)
        mine, of_all = np.minimum(room, before), segments.by_step(after)
        seconds = np.minimum(rest, segments.by_step(mine))
        claimed[cause], saved[cause] = seconds + of_all, segments.saved(at, mine) + of_all
        rest, room, together, known = rest - seconds, room - mine, together + of_all, known + seconds
    lost = rest + known + together
    for cause, seconds in _without(counted, known).items():
        mine = longest_first(room, segments.step, seconds)
        claimed[cause] = claimed.get(cause, 0.0) + np.minimum(rest, seconds)
        saved[cause] = saved.get(cause, 0.0) + segments.saved(at, mine)
        rest, room = rest - np.minimum(rest, seconds), room - mine
    told = [cause for cause, seconds in claimed.items() if seconds.any()]
    return _Part(
        lost[kept],
        steps.seconds[: attempt.n][kept],
        {cause: claimed[cause][kept] for cause in told},
        {cause: saved[cause][kept] for cause in told},
        unread,
    )


def _events(
    segments: "_Segments", at: int, injected: Mapping[str, Series], counted: Mapping[str, Floats]
) -> dict[str, tuple[Stamps, Stamps]]:
    """Begin and end of what is known to the ns, by cause, each time named once.

    A late wake of the heartbeat is a stop, unless it was runnable for most of it, or is a throttle where the group's
    counter rose by half of it or more in the same step.
    """
    attempt, rank = segments.attempt, segments.attempt.ranks[at]
    late = attempt.rows(rank, "event", LATE)
    late = where(late, late.value * 1e-9 < late.seconds / 2)
    step = np.searchsorted(
        attempt.steps[rank].end_ns[: attempt.n], late.start_ns
    )  # which ends after it began
    by_step = np.bincount(step, late.seconds, attempt.n + 1)[: attempt.n]
    throttled = counted.get(COUNTED["throttled_ns"], np.zeros(attempt.n))
    is_throttle = np.append((by_step > 0) & (throttled >= by_step / 2), False)[step]
    series = {
        **injected,
        "gc": attempt.rows(rank, "event", "gc"),
        COUNTED["throttled_ns"]: where(late, is_throttle),
        STOPPED: where(late, ~is_throttle),
    }
    found, taken = {}, spans.union(np.empty(0, np.int64), np.empty(0, np.int64))
    for cause, each in series.items():
        found[cause] = spans.without(spans.union(each.start_ns, each.end_ns), taken)
        taken = spans.union(*(np.concatenate([a, b]) for a, b in zip(taken, found[cause], strict=True)))
    return found


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


def _over_median(by_rank: Floats, at: int) -> Floats:
    """[n, R] to [n]: of the rank at `at`, what is beyond the median rank's."""
    over: Floats = np.maximum(0.0, by_rank[:, at] - np.median(by_rank, 1))
    return over


def _counted(segments: "_Segments", at: int) -> tuple[dict[str, Floats], tuple[str, ...]]:
    """Seconds a step by which the rank's counters rose beyond the median rank's; and those that some rank has not."""
    attempt = segments.attempt
    rose, unread = {}, []
    for name in (*COUNTED, "on_cpu_ns"):
        series = [attempt.rows(r, "counter", name) for r in attempt.ranks]
        if all(len(s) > 1 for s in series):
            rose[name] = np.stack(
                [_rise(attempt, r, s) for r, s in zip(attempt.ranks, series, strict=True)], 1
            )
        else:
            unread.append(name)
    found = {cause: rose[name] for name, cause in COUNTED.items() if name in rose}
    if {"run_delay_ns", "on_cpu_ns"} <= rose.keys():
        waited = np.maximum(
            rose["run_delay_ns"], rose.get("throttled_ns", 0.0)
        )  # old kernels count it as waiting
        found[STOPPED] = segments.by_step(segments.own) - rose["on_cpu_ns"] - waited
        found[COMPUTING] = rose["on_cpu_ns"]
    return {cause: _over_median(seconds, at) for cause, seconds in found.items()}, tuple(unread)


def _rise(attempt: Attempt, rank: int, counter: Series) -> Floats:
    """Seconds [n] in each step of a counter in ns, which is read where steps begin and end."""
    steps, origin = attempt.steps[rank], int(counter.start_ns[0])
    begin, end = (
        np.interp(at[: attempt.n] - origin, counter.start_ns - origin, counter.value)
        for at in (steps.start_ns, steps.end_ns)
    )
    return (end - begin) * 1e-9


class _Segments:
    """K parts of steps between collectives of all ranks, and what follows the last: own time of each rank [K, R]."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        met = [_met(attempt, r) for r in attempt.ranks]
        if not all(np.array_equal(step, met[0][0]) for step, _, _ in met):
            raise ValueError("late: ranks must have met as often in each step")
        met_in = met[0][0]
        left = np.stack([end for _, _, end in met], 1)  # [collectives, R]
        late = np.zeros(left.shape)
        arrived = np.full(len(left), np.iinfo(np.int64).max)  # the last of all, where their clock tells
        if len(left) and attempt.share_a_clock(tuple(attempt.ranks)):
            late = np.maximum(0.0, (left - np.median(left, 1, keepdims=True)) * 1e-9)
            arrived = np.stack([came for _, came, _ in met], 1).max(1)
        # A step is its collectives and its end.
        self.step = np.concatenate([met_in, np.arange(attempt.n)])
        order = np.argsort(self.step, kind="stable")
        self.step = self.step[order]
        own, self.spans, self._late = [], [], []
        self._arrived = np.concatenate([arrived, np.full(attempt.n, np.iinfo(np.int64).max)])[order]
        for i, r in enumerate(attempt.ranks):
            steps, blocked = attempt.steps[r], attempt.blocked[r]
            end = np.concatenate([left[:, i], steps.end_ns[: attempt.n]])[order]
            begin = np.concatenate([[0], end[:-1]])
            is_first = np.concatenate([[True], self.step[1:] != self.step[:-1]])
            begin[is_first] = steps.start_ns[: attempt.n]
            waited = spans.overlap_s(begin, end, spans.union(blocked.start_ns, blocked.end_ns))
            too_late = np.concatenate([late[:, i], np.zeros(attempt.n)])[order]
            too_late = np.minimum(too_late, waited)
            own.append((end - begin) * 1e-9 - waited + too_late)
            self._late.append(too_late)
            self.spans.append((begin, end))
        self.own = np.stack(own, 1)

    def by_step(self, seconds: Floats) -> Floats:
        """[K] or [K, R] to [n] or [n, R]."""
        found = np.zeros((self.attempt.n, *seconds.shape[1:]))
        np.add.at(found, self.step, seconds)
        return found

    def overlap(self, at: int, start: Stamps, end: Stamps) -> tuple[Floats, Floats]:
        """Seconds [K] of a union of time in each segment of a rank: in its own part, and while all go on late."""
        begins, ends = self.spans[at]
        came = np.clip(self._arrived, begins, ends)
        before = spans.overlap_s(begins, came, (start, end))
        after = spans.overlap_s(came, ends, (start, end))
        alone = np.minimum(after, self._late[at])
        return before + alone, after - alone

    def saved(self, at: int, taken: Floats) -> Floats:
        """[n]: by how much steps would be shorter without what was taken of a rank's segments [K]."""
        others = np.delete(self.own, at, axis=1).max(1)
        mine = self.own[:, at]
        return self.by_step(np.maximum(mine, others) - np.maximum(mine - taken, others))


def _met(attempt: Attempt, rank: int) -> tuple[Stamps, Stamps, Stamps]:
    """Collectives of all ranks, by time: in which step, and when this rank came and went on, ns."""
    steps, comes, ends = ([np.empty(0, np.int64)] for _ in range(3))
    for name, peers in attempt.peers():
        if set(peers) == set(attempt.ranks):
            series = attempt.rows(rank, "quantum", name)
            step = attempt.step_of(rank, series)
            steps.append(step[step >= 0])
            comes.append(series.start_ns[step >= 0])
            ends.append(series.end_ns[step >= 0])
    order = np.argsort(np.concatenate(ends), kind="stable")
    return np.concatenate(steps)[order], np.concatenate(comes)[order], np.concatenate(ends)[order]
