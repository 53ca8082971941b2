"""What the events of a ledger come to, by hand: every moment has one cause, and all of them add up."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sigma_train.account import CAUSES, Account, Totals
from sigma_train.events import Back, Begin, End, Event, Peak, Spent, to_line
from test_train_learning import SMALL  # noqa: F401 - of make_trainer

NS = 10**9
DAY = 86400


def at(seconds: float) -> int:
    return round(seconds * NS)


def begin(began: float, written: float, **more) -> Begin:
    """Of an attempt with a step of 100 tokens, 50 FLOPs each, on ranks that make 10,000 FLOP/s together."""
    return Begin(
        at=at(written), began=at(began), **({"ranks": 1, "tokens": 100, "flops": 50, "peak": 1e4} | more)
    )


def spent(when: float, was: str, step: int | None = None) -> Spent:
    return Spent(at=at(when), was=was, step=step)


def steps(when: float, numbers: range, each: float = 1.0) -> list[Event]:
    """A second each, the first one beginning then."""
    return [spent(when + each * (i + 1), "step", number) for i, number in enumerate(numbers)]


def end(when: float, how: str | None = "finished", **more) -> End:
    return End(at=at(when), how=how, **more)


def account(*parts: Event | list[Event]) -> Account:
    """All figures add up at every moment."""
    result = Account()
    for part in parts:
        for event in part if isinstance(part, list) else [part]:
            result.add(event)
            check(result.totals())
    return result


def check(totals: Totals) -> None:
    assert set(totals.spent) <= set(CAUSES)
    assert all(ns >= 0 for ns in totals.spent.values())
    assert sum(totals.spent.values()) == totals.allocated
    assert min(totals.idle, totals.tokens, totals.recovery, totals.lost_steps, totals.elapsed) >= 0
    assert 0 <= totals.utilisation <= 1


def seconds(totals: Totals) -> dict[str, float]:
    return {cause: ns / NS for cause, ns in totals.spent.items() if ns}


def test_a_run_that_nothing_disturbed():
    """Each cause by hand; 5 useful steps are 25,000 FLOPs, over 5 s and over 10 s of 10,000 FLOP/s."""
    got = account(
        begin(100, 101),
        Peak(at=at(101.5), flops_per_s=1e4),
        spent(102, "start"),
        steps(102, range(1, 4)),
        spent(105.5, "check"),
        spent(105.75, "checkpoint"),
        steps(105.75, range(4, 6)),
        spent(108.75, "validation"),
        spent(109.5, "report"),
        end(110),
    )
    totals = got.totals()
    want = {"start": 2, "useful": 5, "check": 0.5, "checkpoint": 0.25, "validation": 1, "report": 0.75}
    assert seconds(totals) == want | {"unknown": 0.5}
    assert (totals.utilisation, totals.mfu_allocated, totals.mfu_useful) == (0.5, 0.25, 0.5)
    assert (totals.tokens, totals.tokens_per_s, totals.idle, totals.interruptions) == (500, 50, 0, 0)
    assert totals.mean_recovery_s is None


def test_killed_and_resumed_days_later_by_the_user():
    """Nobody wrote the end down: the days are idle, and no part of the time to recovery.

    Steps 3 and 4 are computed twice: the first time is lost.  From step 4's end to that of step 5 are 1 s of start and
    three steps.
    """
    got = account(
        begin(0, 1),
        spent(1, "start"),
        steps(1, range(1, 3)),
        spent(3.5, "checkpoint"),
        steps(3.5, range(3, 5)),
        begin(2 * DAY, 2 * DAY + 1, resumed=2),
        steps(2 * DAY + 1, range(3, 6)),
    )
    totals = got.totals()
    assert seconds(totals) == {"start": 2, "useful": 5, "checkpoint": 0.5, "lost": 2}
    assert totals.idle == at(2 * DAY - 5.5)
    assert (totals.interruptions, totals.lost_steps, totals.mean_recovery_s) == (1, 2, 4)
    assert totals.tokens == 500


def test_stopped_and_resumed_is_no_interruption():
    got = account(
        begin(0, 1), steps(1, range(1, 3)), end(3, "budget"), begin(50, 51, resumed=2), steps(51, range(3, 4))
    )
    totals = got.totals()
    assert seconds(totals) == {"start": 2, "useful": 3}
    assert (totals.idle, totals.interruptions, totals.lost_steps) == (at(47), 0, 0)


def test_a_rank_that_is_killed():
    """Two ranks, so each second counts twice; the first one sees the other gone, then their parent does."""
    got = account(
        begin(0, 2, ranks=2, launch="a"),
        steps(2, range(1, 4)),
        end(5.5, "failed", why="connection closed"),
        end(6, "failed", why="rank 1", launch="a", began=at(0), ranks=2),
        begin(7, 9, ranks=2, launch="b", restarted=True, resumed=2),
        steps(9, range(3, 5)),
    )
    totals = got.totals()
    assert seconds(totals) == {"start": 8, "useful": 8, "lost": 2, "detection": 2, "restart": 2}
    assert (totals.elapsed, totals.idle, totals.interruptions, totals.lost_steps) == (at(11), 0, 1, 1)
    assert totals.mean_recovery_s == 6
    assert [i.why for i in got.interruptions] == ["connection closed"]
    assert (totals.tokens, totals.mfu_useful) == (400, 0.5)


def test_a_rank_that_hangs():
    """The others wait for rank_timeout_s; what the step that hung had begun is lost."""
    got = account(
        begin(0, 1, launch="a"),
        steps(1, range(1, 2)),
        spent(2.25, "step"),
        end(602, "failed", launch="a", began=0, ranks=1),
        begin(603, 604, launch="b", restarted=True),
        steps(604, range(1, 3)),
    )
    totals = got.totals()
    assert seconds(totals) == {"start": 2, "lost": 1.25, "detection": 599.75, "restart": 1, "useful": 2}
    assert totals.mean_recovery_s == 604


def test_back_twice():
    """Steps 3 and 4, then 4 once more, are lost; the two that were not fit are left out; loading is a restart's."""
    got = account(
        begin(0, 1),
        steps(1, range(1, 5)),
        spent(6, "step"),
        spent(6.5, "restart"),
        Back(at=at(6.5), step=2),
        steps(6.5, range(3, 5)),
        spent(9, "left_out", 5),
        steps(9, range(6, 7)),
        spent(10.5, "restart"),
        Back(at=at(10.5), step=3),
        steps(10.5, range(4, 5)),
    )
    totals = got.totals()
    # Of the steps 1 to 4 two are lost, then 4 and 6 of the second time.
    assert seconds(totals) == {"start": 1, "useful": 4, "lost": 4, "left_out": 1.5, "restart": 1}
    assert (totals.rollbacks, totals.lost_steps, totals.interruptions, got.reached) == (2, 4, 0, 6)


def test_restarts_that_come_to_nothing():
    """One attempt ends before it can write anything, one before its first step; recovery is over with the fourth."""
    got = account(
        begin(0, 1, launch="a"),
        steps(1, range(1, 3)),
        end(4, "failed", launch="a", began=0, ranks=1),
        end(7, "failed", why="rank 0 ended first", launch="b", began=at(5), ranks=1, restarted=True),
        begin(8, 9, launch="c", restarted=True, resumed=1),
        end(10, "failed", launch="c", began=at(7), ranks=1, restarted=True),
        begin(11, 12, launch="d", restarted=True, resumed=1),
        steps(12, range(2, 4)),
    )
    totals = got.totals()
    assert seconds(totals) == {"start": 1 + 2 + 2 + 1, "useful": 3, "lost": 1, "detection": 1, "restart": 3}
    assert (totals.attempts, totals.interruptions, totals.lost_steps) == (4, 3, 1)
    assert [i.recovery for i in got.interruptions] == [at(11)] * 3


def test_a_first_start_that_comes_to_nothing():
    got = account(end(3, "failed", launch="a", began=at(1), ranks=2))
    assert seconds(got.totals()) == {"start": 4}
    assert (got.totals().interruptions, got.totals().mfu_allocated) == (1, None)


@pytest.mark.parametrize("count", [20, 1500])
def test_a_step_that_takes_far_longer(count):
    """Its excess over the median, once ten steps are known; the others differ by less than five deviations."""
    durations = [1.0 + 0.01 * (i % 5) for i in range(count)]
    durations[7] = 9.0
    events, now = [], 1.0
    for number, duration in enumerate(durations, 1):
        now += duration
        events.append(spent(now, "step", number))
    got = Account([begin(0, 1), *events]).totals()
    assert seconds(got)["stall"] == pytest.approx(9 - 1.02)
    check(got)
    few = Account([begin(0, 1), *events[:9]]).totals()
    assert "stall" not in seconds(few)


def test_a_stall_of_a_step_that_is_lost_stays_a_stall():
    events = [spent(1 + i + (8 if i > 15 else 0), "step", i) for i in range(1, 21)]
    totals = account(begin(0, 1), events, end(29, "failed"), begin(30, 31, resumed=10)).totals()
    assert seconds(totals) == {"start": 2, "useful": 10, "lost": 10, "stall": 8}


def test_runs_together_are_weighted_by_time():
    one = account(begin(0, 1), steps(1, range(1, 2)), end(2)).totals()
    two = account(begin(0, 1, ranks=2, peak=None), steps(1, range(1, 4)), end(4)).totals()
    both = one + two
    check(both)
    assert both.utilisation == (1 + 6) / (2 + 8)
    assert (both.tokens_per_s, both.attempts) == (400 / 6, 2)


def test_a_clock_that_is_set_back():
    """Defends: negative seconds."""
    got = account(
        begin(1000, 1001), steps(1001, range(1, 3)), end(1003, "failed"), begin(500, 501, restarted=True, resumed=1),
        steps(501, range(2, 4)), end(504, "failed", launch="x", began=at(503), ranks=3),
    )  # fmt: skip
    assert got.totals().allocated == at(3)


TIMES = st.integers(0, 100 * NS)
EVENTS = st.one_of(
    st.builds(
        Begin, at=TIMES, began=TIMES, ranks=st.integers(1, 4), resumed=st.integers(0, 9), restarted=st.booleans(),
        launch=st.sampled_from([None, "a", "b"]), tokens=st.integers(0, 9), flops=st.integers(0, 9),
        peak=st.sampled_from([None, 1.0, 1e9]),
    ),
    st.builds(Spent, at=TIMES, was=st.sampled_from(["step", "left_out"]), step=st.integers(1, 12)),
    st.builds(Spent, at=TIMES, was=st.sampled_from(["start", "step", "checkpoint", "report", "unknown"])),
    st.builds(Back, at=TIMES, step=st.integers(0, 9)),
    st.builds(Peak, at=TIMES, flops_per_s=st.just(1e9)),
    st.builds(
        End, at=TIMES, how=st.sampled_from([None, "finished", "signal", "failed"]),
        launch=st.sampled_from([None, "a", "b"]), began=st.none() | TIMES, ranks=st.integers(1, 4),
        restarted=st.booleans(),
    ),
)  # fmt: skip


LATE = [end(0, began=0, ranks=2), spent(1, "step"), begin(0, 0)]  # a step after an end, of more ranks


@settings(max_examples=200, deadline=None)
@example(LATE, False)
@given(st.lists(EVENTS, max_size=40), st.booleans())
def test_whatever_happens_nothing_is_negative_and_all_adds_up(events, is_in_order):
    """Defends: time counted twice or not at all, in any order of events, of clocks that agree or not."""
    if is_in_order:
        events = [
            e.model_copy(update={"at": when})
            for e, when in zip(events, sorted(e.at for e in events), strict=True)
        ]
    got = account(events)
    text = b"".join(map(to_line, events))
    assert [to_line(e) for e in events] == text.splitlines(keepends=True)
    assert math.isfinite(got.totals().mfu_allocated or 0)
