"""What noise cost a training, from the stamps of its steps on every rank.

A rank is *blocked* from when it has nothing to do but wait for a collective until it goes on; the rest of its step is
*local*.  All ranks leave a collective together, so the wall time of a step is the same on all of them, and the rank
that is late is the one that waits least: ranks are told apart by local time.  In a collective, with A the arrival of
the last rank, a blocked rank's time is *wait* before A and *transfer* after it.

With l[s, r] the local time of step s on rank r (Hoefler et al. 2010, doi 10.1109/SC.2010.12: noise costs its maximum):

    cost     = sum_s (max_r l[s, r] - median_r l[s, r])       what even ranks would have saved
    excess[r] = sum_s (l[s, r] - median_r l[s, r])             by which ranks are told apart
    blame[r] = sum_s [r is the slowest] * (max - second max)   what r alone has cost

One of R like ranks computes longest by chance, and longer than the median rank where noise is skewed.  So it is told
beside the mean of the others, with an interval that holds for whichever rank is picked (`intervals.picked_of`).

An uneven load is in these, too: a rank whose experts have more tokens is slower, and that is no noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sigma_noise.intervals import Interval, intervals, picked_of
from sigma_noise.trace import Series, Trace

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
WARM_UP = 1  # step
PAUSES = ("checkpoint", "validation", "check", "restart", "record")


@dataclass(frozen=True)
class StepNoise:
    """Sums over steps, seconds; arrays [R] are in the order of `ranks`."""

    ranks: list[int]
    steps: int
    steps_s: float  # time in steps, mean over ranks
    slowest_s: float  # sum over steps of the largest local time
    mean_s: float  # and of the mean over ranks
    cost_s: float
    local_s: Floats
    wait_s: Floats
    transfer_s: Floats
    blocked_s: Floats  # wait + transfer, and collectives of which not every rank is known
    gc_s: Floats
    blame_s: Floats
    excess_s: Floats
    slowest: Counts  # steps
    last: Counts  # collectives that this rank came to after all others
    collectives: int
    phases_s: Mapping[str, Floats]
    pauses_s: Mapping[str, Floats]  # outside of steps
    beyond_others_s: Interval | None  # by which the worst computed longer than the others' mean; None: alone

    @property
    def cost_share(self) -> float:
        """Of the time in steps."""
        return self.cost_s / self.steps_s if self.steps_s else 0.0

    @property
    def worst(self) -> int:
        """The rank that computed longest beyond the median: rare long detours count for what they took."""
        return self.ranks[int(np.argmax(self.excess_s))]

    @property
    def is_uneven(self) -> bool:
        """Whether the worst computed longer than like ranks do by chance."""
        return self.beyond_others_s is not None and self.beyond_others_s.low > 0


def step_noise(trace: Trace, warm_up: int = WARM_UP) -> StepNoise:
    """From what `sigma train --noise` records.

    Left out are the first `warm_up` steps of each start of the ranks, which import and touch memory for the first time,
    and steps that only some ranks have, as those after the last checkpoint of a rank that was killed.
    Raises: ValueError if no step is left, or ranks do not have the same ones.
    """
    if not has_steps(trace, warm_up):
        raise ValueError(
            f"step_noise: all ranks of the trace must have a step after the first {warm_up}, found none"
        )
    attempts = attempts_of(trace, warm_up)
    ranks = sorted({rank for attempt in attempts for rank in attempt.ranks})
    place = {rank: i for i, rank in enumerate(ranks)}
    sums: dict[str, Any] = {name: np.zeros(len(ranks)) for name in _BY_RANK}
    for name in ("slowest", "last"):
        sums[name] = np.zeros(len(ranks), np.int64)
    totals = dict.fromkeys(("steps_s", "slowest_s", "mean_s", "cost_s"), 0.0)
    phases = {name: np.zeros(len(ranks)) for attempt in attempts for name in attempt.phases_s}
    for attempt in attempts:
        at = [place[rank] for rank in attempt.ranks]
        for name in sums:
            sums[name][at] += getattr(attempt, name)
        for name in totals:
            totals[name] += getattr(attempt, name)
        for name, seconds in attempt.phases_s.items():
            phases[name][at] += seconds
    pauses = {
        name: np.array([trace.get(rank, "quantum", name).seconds.sum() for rank in ranks]) for name in PAUSES
    }
    worst = ranks[int(np.argmax(sums["excess_s"]))]
    return StepNoise(
        ranks=ranks,
        steps=sum(attempt.n for attempt in attempts),
        collectives=sum(attempt.collectives for attempt in attempts),
        phases_s=phases,
        pauses_s={name: seconds for name, seconds in pauses.items() if seconds.any()},
        beyond_others_s=_beyond_others(worst, attempts, len(ranks)),
        **totals,
        **sums,
    )


def _beyond_others(rank: int, attempts: "list[Attempt]", count: int) -> Interval | None:
    """Over all steps of a rank that was picked of `count`."""
    parts = []
    for attempt in attempts:
        if rank in attempt.ranks and len(attempt.ranks) > 1:
            own = attempt.local[:, attempt.ranks.index(rank)]
            others = (attempt.local.sum(1) - own) / (len(attempt.ranks) - 1)
            parts.append(own - others)
    if not parts:
        return None
    seconds = np.concatenate(parts)
    mean, n = picked_of(intervals(seconds, ["mean"])["mean"], count), len(seconds)
    return replace(mean, estimate=mean.estimate * n, low=mean.low * n, high=mean.high * n)


_BY_RANK = ("local_s", "wait_s", "transfer_s", "blocked_s", "gc_s", "blame_s", "excess_s")
Window = tuple[float, float]  # ns, the end not included


def has_steps(trace: Trace, warm_up: int = WARM_UP) -> bool:
    """Whether all ranks of some attempt have a step after the first.

    Of a training: steps that another tool measured say how, and are quanta.
    """
    if any("step" in about.get("measured", {}) for about in trace.ranks.values()):
        return False
    return any(
        all(
            len(_within(trace.get(rank, "quantum", "step"), window)) > warm_up
            for rank, window in windows.items()
        )
        for windows in windows_of(trace).values()
    )


def attempts_of(trace: Trace, warm_up: int = WARM_UP) -> "list[Attempt]":
    """Those that have a step on every rank."""
    found = [Attempt(trace, number, windows, warm_up) for number, windows in windows_of(trace).items()]
    return [attempt for attempt in found if attempt.n]


def windows_of(trace: Trace) -> dict[int, dict[int, Window]]:
    """Of each start of the ranks, whose number all of them have, when it was on each rank's clock."""
    found: dict[int, dict[int, Window]] = {}
    for rank in trace.ranks:
        starts = trace.get(rank, "counter", "attempt")
        if not len(starts):
            found.setdefault(0, {})[rank] = (-np.inf, np.inf)
            continue
        ends = [*starts.start_ns[1:].tolist(), np.inf]
        for number, begin, end in zip(starts.value.tolist(), starts.start_ns.tolist(), ends, strict=True):
            found.setdefault(int(number), {})[rank] = (begin, end)
    return dict(sorted(found.items()))


class Attempt:
    """Sums over the steps of one start of the ranks."""

    def __init__(self, trace: Trace, number: int, windows: Mapping[int, Window], warm_up: int) -> None:
        self.trace, self.number, self.windows, self.ranks = trace, number, windows, sorted(windows)
        self.warm_up = warm_up
        self.steps = {rank: _after(self.rows(rank, "quantum", "step"), warm_up) for rank in self.ranks}
        self.n = min(len(steps) for steps in self.steps.values())
        if not self.n:
            return
        self._check_numbers()
        self.blocked = {rank: self.rows(rank, "quantum", "blocked") for rank in self.ranks}
        whole = np.stack([self.steps[rank].seconds[: self.n] for rank in self.ranks], 1)
        blocked = np.stack([self._by_step(rank, self.blocked[rank]) for rank in self.ranks], 1)
        self.blocked_s = blocked.sum(0)
        self.steps_s = float(whole.mean(1).sum())
        self.local = whole - blocked  # [n, R]
        self._compare(self.local)
        self.gc_s = np.array([self._by_step(r, self.rows(r, "event", "gc")).sum() for r in self.ranks])
        self.phases_s = {
            name: np.array([self._by_step(r, self.rows(r, "quantum", name)).sum() for r in self.ranks])
            for name in trace.run.get("phases", ())
        }
        self._split_blocked()

    def rows(self, rank: int, kind: str, name: str) -> Series:
        return _within(self.trace.get(rank, kind, name), self.windows[rank])

    def _check_numbers(self) -> None:
        numbers = [
            _after(self.rows(rank, "counter", "step"), self.warm_up).value[: self.n] for rank in self.ranks
        ]
        for rank, own in zip(self.ranks, numbers, strict=True):
            if not np.array_equal(own, numbers[0]):
                raise ValueError(
                    f"step_noise: ranks must have the same steps in the same order, "
                    f"rank {rank} has others than rank {self.ranks[0]}"
                )

    def step_of(self, rank: int, series: Series) -> Counts:
        """In which of the n steps each row begins and ends; -1: in none."""
        steps = self.steps[rank]
        step = np.searchsorted(steps.start_ns, series.start_ns, "right") - 1
        inside = (step >= 0) & (step < self.n) & (series.end_ns <= steps.end_ns[step])
        return np.where(inside, step, -1)

    def _by_step(self, rank: int, series: Series) -> Floats:
        """[n], the seconds of these rows in each step."""
        step = self.step_of(rank, series)
        return np.bincount(step[step >= 0], series.seconds[step >= 0], self.n)

    def _compare(self, local: Floats) -> None:
        """The sums of local [n, R]."""
        ordered, median = np.sort(local, 1), np.median(local, 1)
        largest = ordered[:, -1]
        self.local_s = local.sum(0)
        self.slowest_s, self.mean_s = float(largest.sum()), float(local.mean(1).sum())
        self.cost_s = float((largest - median).sum())
        self.excess_s = (local - median[:, None]).sum(0)
        self.slowest, self.blame_s = np.zeros(len(self.ranks), np.int64), np.zeros(len(self.ranks))
        if len(self.ranks) > 1:
            who = local.argmax(1)
            self.slowest = np.bincount(who, minlength=len(self.ranks))
            self.blame_s = np.bincount(who, largest - ordered[:, -2], len(self.ranks))

    def _split_blocked(self) -> None:
        """Wait and transfer of each rank, and who came last, over all collectives of whose ranks all are known."""
        self.wait_s, self.transfer_s = np.zeros(len(self.ranks)), np.zeros(len(self.ranks))
        self.last, self.collectives = np.zeros(len(self.ranks), np.int64), 0
        for name, peers in self.peers():
            if set(peers) <= set(self.ranks) and len(peers) > 1:
                self._split(name, peers)

    def peers(self) -> list[tuple[str, tuple[int, ...]]]:
        """Collectives, and the ranks that take part in each."""
        found = set()
        for about in (self.trace.ranks[rank] for rank in self.ranks):
            groups = about.get("groups", {}).get(str(self.number), {})
            named = about.get("collectives", {}).items()
            found |= {(name, tuple(groups[group])) for name, group in named if group in groups}
        return sorted(found)

    def _split(self, name: str, peers: tuple[int, ...]) -> None:
        """Of one collective, whose k-th call is the same on all of its ranks."""
        rows, steps = [], []
        for rank in peers:
            series = self.rows(rank, "quantum", name)
            step = self.step_of(rank, series)
            rows.append(where(series, step >= 0))
            steps.append(step[step >= 0])
        if not all(np.array_equal(step, steps[0]) for step in steps):
            raise ValueError(
                f"step_noise: ranks {list(peers)} must have the same calls of {name} in each step"
            )
        if not len(steps[0]):
            return
        waits = np.stack([self.waits_ns(rank, own, name) for rank, own in zip(peers, rows, strict=True)])
        ends = np.stack([own.end_ns for own in rows])
        blocked = ends - waits
        if self.share_a_clock(peers):
            arrivals = np.stack([own.start_ns for own in rows])
            wait = np.clip(np.minimum(ends, arrivals.max(0)) - waits, 0, None)
            last = arrivals.argmax(0)
        else:  # the last waits least, and for nobody
            wait = blocked - blocked.min(0)
            last = blocked.argmin(0)
        at = [self.ranks.index(rank) for rank in peers]
        self.wait_s[at] += wait.sum(1) * 1e-9
        self.transfer_s[at] += (blocked - wait).sum(1) * 1e-9
        self.last[at] += np.bincount(last, minlength=len(peers))
        self.collectives += len(last)

    def waits_ns(self, rank: int, rows: Series, name: str) -> Counts:
        """When the rank began to wait for each of these: the begin of the time blocked that ends with it."""
        blocked = self.blocked[rank]
        at = np.minimum(np.searchsorted(blocked.end_ns, rows.end_ns), len(blocked) - 1)
        if not len(blocked) or not np.array_equal(blocked.end_ns[at], rows.end_ns):
            raise ValueError(f"step_noise: each {name} of rank {rank} must end with a row of blocked")
        return blocked.start_ns[at]

    def share_a_clock(self, peers: tuple[int, ...]) -> bool:
        boots = {self.trace.ranks[rank].get("boot") for rank in peers}
        return len(boots) == 1 and None not in boots


def _within(series: Series, window: Window) -> Series:
    """Those that begin in the window."""
    return where(series, (series.start_ns >= window[0]) & (series.start_ns < window[1]))


def _after(series: Series, n: int) -> Series:
    """Without the first n."""
    return Series(series.start_ns[n:], series.end_ns[n:], series.value[n:])


def where(series: Series, mask: NDArray[np.bool_]) -> Series:
    return Series(series.start_ns[mask], series.end_ns[mask], series.value[mask])
