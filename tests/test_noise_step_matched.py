"""What a step would take without its stops, told by segments and by steps, against the same ranks without a stop.

SIGMA_FRESH_SEED gives statistics other random numbers, and the limits that as many repetitions explain.
"""

import os
from functools import cache

import numpy as np
import pytest
from scipy.stats import binom
from sigma_noise import spans, steps_view
from sigma_noise.attribution import STOPPED
from sigma_noise.step_causes import Estimate, Late, Regained, late
from sigma_noise.step_counters import LATE
from sigma_noise.step_matched import _chance, matched
from sigma_noise.step_segments import over_others
from sigma_noise.trace import Series, Trace
from test_noise_steps import Simulated

FRESH = int(os.environ.get("SIGMA_FRESH_SEED", "0"))
MS = 1_000_000
RANKS, WORST, HELD = 4, 2, 3
STEPS, CALLS = 400, 6


class Stopped(Simulated):
    """Steps of 40 to 90 ms; ranks leave each collective at their own random moment, and one is stopped at times.

    A stop of work makes it longer.  One within an exchange holds all ranks, or only the one that waits for the data of
    the stopped one.
    """

    def __init__(
        self, seed: int, stops: np.ndarray, length_ns: int = 30 * MS, scatter_ns: int = MS // 2
    ) -> None:
        rng = np.random.default_rng(seed)
        self.stops, self.length_ns = stops, length_ns
        share = rng.uniform(0.7, 1.5, (STEPS, 1, 1))
        work = (share * rng.integers(5 * MS, 7 * MS, (STEPS, CALLS, RANKS))).astype(np.int64)
        self.leaves = rng.exponential(scatter_ns, (STEPS, CALLS, RANKS)).astype(np.int64)
        self.holds_all = rng.random((STEPS, CALLS)) < 0.5
        super().__init__(work, (share[:, :, 0] * 3 * MS).astype(np.int64) * np.ones((1, CALLS), np.int64))

    def _run(self) -> None:
        now = np.zeros(RANKS, np.int64)
        for s in range(STEPS):
            begins = now.copy()
            for k in range(CALLS):
                arrivals = now + self.work[s, k]
                arrivals[WORST] += self._stopped(now[WORST], arrivals[WORST])
                came = arrivals.max()
                now = came + self.transfer[s, k] + self.leaves[s, k]
                of = slice(None) if self.holds_all[s, k] else [WORST, HELD]
                now[of] += self._stopped(came, now[WORST])
                for r in range(RANKS):
                    self.add(r, "quantum", "sum", int(arrivals[r]), int(now[r]))
                    self.add(r, "quantum", "blocked", int(arrivals[r]), int(now[r]))
            for r in range(RANKS):
                self.add(r, "quantum", "step", int(begins[r]), int(now[r]))
                self.add(r, "counter", "step", int(begins[r]), int(begins[r]), s + 1)
            now = now + 50
        self.ended = now

    def _stopped(self, begin: int, end: int) -> int:
        """ns by which what would last from begin to end lasts longer."""
        longer = 0
        for stop in self.stops[self.stops > begin - self.length_ns]:
            if stop >= end + longer:
                break
            longer += stop + self.length_ns - max(begin, stop)
        return int(longer)


def recorded(ran: Stopped) -> Trace:
    """With a heartbeat that is late in each stop, and counters of a thread that sleeps in each collective."""
    trace = ran.trace()
    rows = dict(trace.rows)
    for rank in range(RANKS):
        steps = trace.get(rank, "quantum", "step")
        stamps = np.stack([steps.start_ns, steps.end_ns], 1).ravel()
        for name, rise in {"on_cpu_ns": ran.work[:, :, rank].sum(1), "run_delay_ns": np.zeros(STEPS)}.items():
            value = np.repeat(np.concatenate([[0.0], np.cumsum(rise)]), 2)[1:-1]
            rows[rank, "counter", name] = Series(stamps, stamps, value.astype(np.float64))
    rows[WORST, "event", LATE] = Series(ran.stops, ran.stops + ran.length_ns, np.zeros(len(ran.stops)))
    return Trace(trace.run, trace.ranks, rows)


def random_stops(seed: int) -> np.ndarray:
    gaps = 60 * MS + np.random.default_rng(seed).exponential(150 * MS, 400)
    return np.cumsum(gaps).astype(np.int64)


@cache
def simulated(seed: int, seen_ns: int = 30 * MS) -> tuple[Late, float]:
    """What is found where the heartbeat sees so much of a stop, and what a step takes less without any, seconds."""
    stops = random_stops(seed)
    ran, undisturbed = Stopped(seed, stops), Stopped(seed, stops[:0])
    ran.stops = stops[stops + ran.length_ns < ran.ended.max()]
    trace = recorded(ran)
    beats = Series(ran.stops, ran.stops + seen_ns, np.zeros(len(ran.stops)))
    found = late(Trace(trace.run, trace.ranks, {**trace.rows, (WORST, "event", LATE): beats}), warm_up=0)
    return found, float(ran.ended.max() - undisturbed.ended.max()) * 1e-9 / STEPS


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stops_cost_what_the_same_ranks_take_less_without_them(seed):
    """Defends: ranks that a stopped one holds, taken for as slow as it (16 % too little); chance, in which each rank is
    the last now and then, taken for a cause.  Of 48 seeds the estimate is 0.6 % too much in the mean, scatter 0.4 %.
    """
    found, truth = simulated(seed + FRESH)
    assert found.rank == WORST
    assert found.causes.named == STOPPED
    gain = found.regained[STOPPED]
    assert gain.by_segments.seconds == pytest.approx(truth, rel=0.02)
    assert gain.low == min(gain.by_segments.low, gain.by_steps.low)
    assert gain.high == max(gain.by_segments.high, gain.by_steps.high)
    by_steps = gain.by_steps.seconds * 1e3
    assert found.sentence.endswith(f"by steps without it {by_steps:.3g}")
    assert f" to {gain.high * 1e3:.2f}<td>{by_steps:.2f}<tr>" in steps_view._causes(found)


@pytest.mark.parametrize("n", [3, pytest.param(24, marks=pytest.mark.acceptance)])
def test_intervals_of_90_per_cent_hold_the_truth(n):
    """Defends: an interval that is too short, or beside what a step takes less.  Of 48 seeds all are held."""
    held = 0
    for seed in range(n):
        found, truth = simulated(seed + FRESH)
        gain = found.regained[STOPPED].by_steps
        held += gain.low < truth < gain.high
    assert held >= (binom.ppf(1e-3, n, 0.9) if FRESH else n)


def test_what_counters_add_to_an_event_is_in_its_step_already():
    """Defends: the rest of stops of which the heartbeat saw two thirds, counted once by step and once by counter."""
    found, truth = simulated(1, seen_ns=20 * MS)
    gain = found.regained[STOPPED].by_steps
    assert gain.low < truth < gain.high
    whole, _ = simulated(1)
    assert gain.seconds == pytest.approx(whole.regained[STOPPED].by_steps.seconds, rel=0.05)


def test_ranks_that_take_turns_at_being_last_have_lost_nothing():
    """Defends: positive parts of what is zero in the mean: each rank is beyond the median by 0.8 ms a step here."""
    found = late(recorded(Stopped(3, random_stops(3)[:0])), warm_up=0)
    assert found.causes.lost_s < 0.1e-3 * STEPS
    assert sum(gain.seconds for gain in found.regained.values()) < 0.1e-3


def test_what_others_have_by_chance_is_taken_off_where_there_is_least():
    """Of 0, 0, 1, 7 over the median rank; of others 0, 2 and 2 in all, half a second a step."""
    by_rank = np.array([[0.0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 2], [0, 1, 1, 8]])  # medians: 0, 0, 1, 1
    assert over_others(by_rank, 3, np.ones(4, bool)).tolist() == [0, 0, 0, 6]
    some = np.array([True, False, True, True])
    assert over_others(by_rank, 3, some).tolist() == [0, 0, 0.5, 6.5]  # of others 0, 1 and 1 in these
    assert over_others(by_rank, 3, np.ones(4, bool), less=np.full(4, 7.0)).tolist() == [0, 0, 0, 0]


def test_an_event_finds_long_steps_more_often_than_short_ones():
    """Defends: steps with an event less those without one, which are shorter from the start: 17 % too much here."""
    errors, plain = [], []
    for seed in range(30):
        rng = np.random.default_rng(seed + FRESH)
        own = rng.uniform(0.04, 0.16, 400)
        begins = np.cumsum(0.1 + rng.exponential(0.15, 400))  # by the clock of undisturbed work
        begins = begins[begins < own.sum()]
        count = np.histogram(begins, np.r_[0, np.cumsum(own)])[0]
        ends = np.cumsum(own + 0.03 * count)
        start = begins + 0.03 * np.arange(len(begins))
        stamps, events = ((1e9 * x).astype(np.int64) for x in (np.r_[0, ends], start))
        seconds = np.diff(stamps) * 1e-9
        found = matched(stamps[:-1], stamps[1:], (events, events + 30_000_000))
        truth = 0.03 * count.mean()
        errors.append(found.mean() / truth - 1)
        plain.append((seconds.mean() - seconds[count == 0].mean()) / truth - 1)
    assert abs(np.mean(errors)) < (4 if FRESH else 3) * np.std(errors) / np.sqrt(30)
    assert np.mean(plain) > 0.1


def test_chance_of_a_step_by_hand():
    """Times of 1 and 3 s between events: 2 s from anywhere stay clear from 1 s in 4."""
    assert _chance(np.array([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([3.0, 1.0])).tolist() == [1, 0.5, 0.25, 0, 0]


def test_steps_that_cannot_be_compared_are_not():
    start = np.arange(100) * 1_000_000
    end = start + 900_000
    nothing = np.empty(0, np.int64)
    assert matched(start, end, (nothing, nothing)).tolist() == [0.0] * 100
    assert matched(start, end, (start[:80], end[:80])) is None  # 20 are untouched
    assert matched(start, end, (start[:30], end[:30])) is not None
    between = np.r_[start[:10], end + 10_000], np.r_[end[:10], end + 90_000]  # a step hardly fits
    assert matched(start, end, spans.union(*between)) is None


def test_short_events_say_nothing_by_whole_steps():
    """Defends: pauses of 0.1 ms with an interval of a millisecond, as their steps differ by more."""
    ran = Stopped(4, random_stops(4), length_ns=MS // 10)
    ran.stops = ran.stops[ran.stops + ran.length_ns < ran.ended.max()]
    trace = recorded(ran)
    pauses = {WORST: {"pause": trace.get(WORST, "event", LATE)}}
    rows = {key: row for key, row in trace.rows.items() if key[2] != LATE}
    found = late(Trace(trace.run, trace.ranks, rows), injected=pauses, rank=WORST, warm_up=0)
    gain = found.regained["pause"]
    assert gain.by_steps is None
    assert (gain.low, gain.high) == (gain.by_segments.low, gain.by_segments.high)
    assert "by steps" not in found.sentence


def test_where_both_differ_the_interval_has_both():
    gain = Regained(Estimate(2.0, 1.5, 2.5), Estimate(4.0, 3.0, 5.0))
    assert (gain.seconds, gain.low, gain.high) == (2.0, 1.5, 5.0)
