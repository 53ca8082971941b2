"""Why a rank of a training was late, on simulated ranks of which every nanosecond is known."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from sigma_noise import steps_view
from sigma_noise.attribution import STOPPED
from sigma_noise.recorder import Recorder, now_ns
from sigma_noise.step_causes import COMPUTING, late
from sigma_noise.step_counters import LATE, StepCounters
from sigma_noise.steps import step_noise
from sigma_noise.trace import Series, Trace
from test_noise_steps import Simulated

MS = 1_000_000
STEPS, CALLS, RANKS, WORST = 60, 4, 4, 2


def work(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2 * MS, 2 * MS + MS // 20, (STEPS, CALLS, RANKS))


def with_counters(simulated: Simulated, **more: np.ndarray) -> Trace:
    """Read where steps begin and end.  A rank is on a CPU while it works but for `more`, ns by step of the worst."""
    trace = simulated.trace()
    rows = dict(trace.rows)
    for rank in range(RANKS):
        steps = trace.get(rank, "quantum", "step")
        stamps = np.stack([steps.start_ns, steps.end_ns], 1).ravel()
        took = {name: (ns if rank == WORST else 0 * ns) for name, ns in more.items()}
        off = sum(took.values(), np.zeros(STEPS))
        rises = {"on_cpu_ns": simulated.work[:, :, rank].sum(1) - off, "run_delay_ns": np.zeros(STEPS)}
        rises |= {"throttled_ns": np.zeros(STEPS)}
        rises |= {name: ns for name, ns in took.items() if name in rises}
        for name, rise in rises.items():
            value = np.repeat(np.concatenate([[0.0], np.cumsum(rise)]), 2)[1:-1]
            rows[rank, "counter", name] = Series(stamps, stamps, value.astype(np.float64))
    return Trace(trace.run, trace.ranks, rows)


def delayed(ns: int, call: int = 1, every: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Work of all with the worst rank's `call` longer in every so many steps, and by how much, [steps]."""
    by_step = np.where(np.arange(STEPS) % every == 0, ns, 0)
    of_all = work()
    of_all[:, call, WORST] += by_step
    return of_all, by_step


@pytest.mark.parametrize(
    ("counter", "cause"),
    [
        ("throttled_ns", "cgroup throttle"),
        ("run_delay_ns", "run-queue wait"),
        ("stopped", STOPPED),
        (None, COMPUTING),
    ],
)
def test_the_cause_is_what_the_counters_of_the_late_rank_say(counter, cause):
    of_all, by_step = delayed(30 * MS)
    transfer = np.full((STEPS, CALLS), MS // 10)
    found = late(
        with_counters(Simulated(of_all, transfer), **({counter: by_step} if counter else {})), warm_up=0
    )
    assert found.rank == WORST
    assert found.causes.named == cause
    assert found.causes.share(cause) == pytest.approx(1, abs=0.01)
    assert found.causes.lost_s == pytest.approx(20 * 0.03, rel=0.01)
    gain = found.regained[cause]
    plain = Simulated(work(), transfer).ended[0] - Simulated(of_all, transfer).ended[0]
    assert gain.seconds == pytest.approx(-plain * 1e-9 / STEPS, rel=0.01)
    assert gain.low < gain.seconds < gain.high
    assert f"rank {WORST}: cause: {cause}" in found.sentence


def test_what_another_rank_covers_is_not_regained():
    """Defends: a loss of a step as the sum of what its ranks lost."""
    of_all, by_step = delayed(30 * MS)
    of_all[:, 1, 0] += np.where(by_step > 0, 20 * MS, 0)  # rank 0 in the same segments
    found = late(
        with_counters(Simulated(of_all, np.ones((STEPS, CALLS), np.int64)), run_delay_ns=by_step), warm_up=0
    )
    assert found.rank == WORST
    assert found.regained["run-queue wait"].seconds == pytest.approx(0.01 / 3, rel=0.02)
    of_all, by_step = delayed(30 * MS)
    of_all[:, 3, 0] += np.where(by_step > 0, 20 * MS, 0)  # and in others: a step is as late as both
    found = late(
        with_counters(Simulated(of_all, np.ones((STEPS, CALLS), np.int64)), run_delay_ns=by_step), warm_up=0
    )
    assert found.regained["run-queue wait"].seconds == pytest.approx(0.03 / 3, rel=0.02)


def test_a_log_of_injections_comes_first():
    of_all, by_step = delayed(30 * MS)
    simulated = Simulated(of_all, np.full((STEPS, CALLS), MS // 10))
    trace = with_counters(simulated, run_delay_ns=by_step)
    ends = trace.get(WORST, "quantum", "sum").start_ns.reshape(STEPS, CALLS)[by_step > 0, 1]
    log = {WORST: {"stops": Series(ends - 30 * MS, ends, np.ones(len(ends)))}}
    found = late(trace, injected=log, warm_up=0)
    assert found.causes.named == "stops"
    assert found.regained["stops"].seconds == pytest.approx(0.01, rel=0.02)
    steps = trace.get(WORST, "quantum", "step")
    some = late(trace, injected=log, between=[(int(steps.start_ns[30]), int(steps.end_ns[-1]))], warm_up=0)
    assert some.steps == 30
    with pytest.raises(ValueError, match="must have steps with others in this time, found none"):
        late(trace, between=[(0, 1)], warm_up=0)


class LeavesLate(Simulated):
    """The worst rank is stopped while it waits: it goes on 30 ms after all others, in the first call of each step."""

    def add(self, rank, kind, name, start, end, value=1.0):
        if rank == WORST and name in ("sum", "blocked") and self._calls_of(start) == 0:
            end += 30 * MS
        super().add(rank, kind, name, start, end, value)

    def _calls_of(self, start: int) -> int:
        return len(self.rows.get((WORST, "quantum", "blocked"), ())) % CALLS


def test_a_rank_that_is_stopped_while_it_waits_goes_on_late():
    """Defends: a stop within a collective that is seen as transfer, and by nobody's name."""
    of_all = work()
    simulated = Simulated.__new__(LeavesLate)
    # Its own work after the call begins 30 ms late, which the others wait for in the next.
    of_all[:, 1, WORST] += 30 * MS
    Simulated.__init__(simulated, of_all, np.full((STEPS, CALLS), MS // 10))
    found = late(with_counters(simulated, stopped=np.full(STEPS, 30 * MS)), warm_up=0)
    assert found.rank == WORST
    assert found.causes.named == STOPPED
    assert found.causes.lost_s == pytest.approx(STEPS * 0.03, rel=0.02)
    assert found.regained[STOPPED].seconds == pytest.approx(0.03, rel=0.02)


def test_without_counters_nothing_is_made_up():
    of_all, _ = delayed(30 * MS)
    found = late(Simulated(of_all, np.ones((STEPS, CALLS), np.int64)).trace(), warm_up=0)
    assert found.rank == WORST
    assert found.causes.named is None
    assert found.causes.unknown.share == 1.0
    why = "rank 0: not recorded"
    assert found.causes.unread == dict.fromkeys(("throttled_ns", "run_delay_ns", "on_cpu_ns"), why)


def test_one_rank_is_late_for_nobody():
    alone = Simulated(work()[:, :, :1], np.ones((STEPS, CALLS), np.int64))
    assert late(alone.trace(), warm_up=0) is None


def test_the_report_has_causes_and_what_they_cost():
    of_all, by_step = delayed(30 * MS)
    trace = with_counters(Simulated(of_all, np.ones((STEPS, CALLS), np.int64)), run_delay_ns=by_step)
    noise, why = step_noise(trace, warm_up=0), late(trace, warm_up=0)
    assert steps_view.lines(noise, why)[1].startswith(f"rank {WORST}: cause: run-queue wait")
    page = steps_view.page(noise, why)
    assert f"what rank {WORST} lost, by cause" in page
    assert "<td>run-queue wait<td>0.6" in page
    gain = why.regained["run-queue wait"]
    assert gain.seconds == pytest.approx(0.01, rel=0.02)
    assert f"<td>{gain.seconds * 1e3:.2f}<td>{gain.low * 1e3:.2f} to {gain.high * 1e3:.2f}" in page
    assert steps_view.lines(noise, None) == [steps_view.sentence(noise)]


def stopped_at(trace: Trace, start_ns: np.ndarray, waited_ns: int = 0) -> Trace:
    """With late wakes of the worst rank's heartbeat, of 30 ms from these stamps."""
    late_wakes = Series(start_ns, start_ns + 30 * MS, np.full(len(start_ns), float(waited_ns)))
    return Trace(trace.run, trace.ranks, {**trace.rows, (WORST, "event", LATE): late_wakes})


def test_a_stop_that_delays_all_alike_is_known_by_the_heartbeat():
    """Defends: 30 ms of transfer that are nobody's fault; a heart that was runnable, taken for a stop."""
    transfer = np.full((STEPS, CALLS), MS // 10)
    transfer[::3, 1] += 30 * MS
    trace = with_counters(Simulated(work(), transfer))
    came = trace.get(WORST, "quantum", "sum").end_ns.reshape(STEPS, CALLS)[::3, 1] - 30 * MS
    found = late(stopped_at(trace, came), rank=WORST, warm_up=0)
    assert found.causes.named == STOPPED
    assert found.causes.lost_s == pytest.approx(20 * 0.03, rel=0.02)
    assert found.regained[STOPPED].seconds == pytest.approx(0.01, rel=0.02)
    runnable = late(stopped_at(trace, came, waited_ns=25 * MS), rank=WORST, warm_up=0)
    assert runnable.causes.lost_s < 0.01
    throttled = with_counters(
        Simulated(work(), transfer), throttled_ns=np.where(np.arange(STEPS) % 3 == 0, 28 * MS, 0)
    )
    assert late(stopped_at(throttled, came), rank=WORST, warm_up=0).causes.named == "cgroup throttle"


def test_the_heartbeat_sees_a_stop_of_the_process():
    """Of this one, by a child; without it a process cannot tell."""
    recorder = Recorder(0)
    counters = StepCounters(recorder)
    counters.begin()
    counters.read()
    script = (
        "import os, signal, time; p = os.getppid(); "
        "os.kill(p, signal.SIGSTOP); time.sleep(0.08); os.kill(p, signal.SIGCONT)"
    )
    began = now_ns()
    subprocess.run([sys.executable, "-P", "-c", script], check=True)
    time.sleep(0.02)
    counters.end()
    rows = recorder.taken()
    found = rows[0, "event", LATE]
    longest = int(np.argmax(found.seconds))
    assert found.seconds[longest] > 0.07
    assert found.start_ns[longest] >= began
    assert len(rows[0, "counter", "on_cpu_ns"]) == 1
    assert len(rows[0, "counter", "run_delay_ns"]) == 1


def test_a_reading_opens_no_file_anew(monkeypatch):
    """Defends: three files opened and closed in every step of a training, four fifths of what its counters cost."""
    recorder = Recorder(0)
    counters = StepCounters(recorder)
    counters.begin()
    counters.read()
    fds = set(os.listdir("/proc/self/fd"))
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda *args, **more: opened.append(args) or real(*args, **more))
    for _ in range(3):
        counters.read()
    assert opened == []
    counters.end()
    assert len(os.listdir("/proc/self/fd")) < len(fds)
    of_delay = recorder.taken()[0, "counter", "run_delay_ns"]
    assert len(of_delay) == 4
    assert (np.diff(of_delay.value) >= 0).all()


def test_of_two_ranks_one_is_the_usual_one():
    """Defends: a median that is the mean of both, by which half of everything is lost."""
    of_all, by_step = delayed(30 * MS)
    two = Simulated(of_all[:, :, 1:3], np.full((STEPS, CALLS), MS // 10))
    rows = dict(two.trace().rows)
    for rank in range(2):
        steps = rows[rank, "quantum", "step"]
        stamps = np.stack([steps.start_ns, steps.end_ns], 1).ravel()
        waited = by_step * (rank == 1)
        for name, rise in (("on_cpu_ns", two.work[:, :, rank].sum(1) - waited), ("run_delay_ns", waited)):
            value = np.repeat(np.concatenate([[0.0], np.cumsum(rise)]), 2)[1:-1]
            rows[rank, "counter", name] = Series(stamps, stamps, value.astype(np.float64))
    found = late(Trace(two.trace().run, two.trace().ranks, rows), warm_up=0)
    assert found.rank == 1
    assert found.causes.named == "run-queue wait"
    assert found.causes.lost_s == pytest.approx(20 * 0.03, rel=0.01)
    assert found.regained["run-queue wait"].seconds == pytest.approx(0.01, rel=0.02)


def together(transfer_ns: int) -> tuple[Trace, np.ndarray]:
    """Every third step the data of a call take 30 ms longer; and when they began to."""
    transfer = np.full((STEPS, CALLS), transfer_ns)
    transfer[::3, 1] += 30 * MS
    trace = with_counters(Simulated(work(), transfer))
    return trace, trace.get(WORST, "quantum", "sum").end_ns.reshape(STEPS, CALLS)[::3, 1] - 30 * MS


def test_the_rank_whose_heart_was_late_is_named():
    """Defends: a rank that is chosen by its own time, where a stop made all wait alike."""
    trace, came = together(MS // 10)
    found = late(stopped_at(trace, came), warm_up=0)
    assert found.rank == WORST
    assert found.causes.named == STOPPED


def test_a_stop_of_all_is_no_ranks_fault():
    """Defends: a container's quota that is blamed on the rank which happened to be worst."""
    trace, came = together(MS // 10)
    rows = {(r, "event", LATE): Series(came, came + 30 * MS, np.zeros(len(came))) for r in range(RANKS)}
    found = late(Trace(trace.run, trace.ranks, {**trace.rows, **rows}), warm_up=0)
    assert found.causes.named != STOPPED
    assert found.causes.lost_s < 0.01


def test_a_stop_that_changed_no_stamp_cost_nothing():
    """Defends: data that take 40 ms in every step, of which 30 are regained if a heart was late in some."""
    transfer = np.full((STEPS, CALLS), 40 * MS)
    trace = with_counters(Simulated(work(), transfer))
    came = trace.get(WORST, "quantum", "sum").end_ns.reshape(STEPS, CALLS)[::3, 1] - 35 * MS
    found = late(stopped_at(trace, came), rank=WORST, warm_up=0)
    assert found.causes.lost_s < 0.01


def test_a_counter_that_ends_early_is_unread():
    """Defends: a wait in the run queue that becomes a stop, as its counter is taken to stand still."""
    of_all, by_step = delayed(30 * MS)
    trace = with_counters(Simulated(of_all, np.ones((STEPS, CALLS), np.int64)), run_delay_ns=by_step)
    whole = trace.get(WORST, "counter", "run_delay_ns")
    cut = Series(whole.start_ns[:40], whole.end_ns[:40], whole.value[:40])
    found = late(
        Trace(trace.run, trace.ranks, {**trace.rows, (WORST, "counter", "run_delay_ns"): cut}), warm_up=0
    )
    assert found.causes.unread["run_delay_ns"] == f"rank {WORST}: not read in all steps"
    assert found.causes.named is None
    assert found.causes.unknown.share == pytest.approx(1.0)
