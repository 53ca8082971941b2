"""The injector: what it logs is what it did, and nothing stays stopped whatever happens to it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sigma_noise import inject_cli, selftest
from sigma_noise.inject import Plan, Waiter, inject
from sigma_noise.selftest import Cell, injecting, judge, limits
from sigma_noise.targets import Busy, Gpu, Memory, Quota, Stop, open_target
from sigma_noise.trace import Series, read
from sigma_train.errors import Failure, WrongInput

MS = 1_000_000


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def eventually(is_so, what: str, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


@pytest.fixture
def victim():
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process.pid
        process.send_signal(signal.SIGCONT)
        process.kill()


@pytest.fixture
def injector():
    """Starts injectors as processes, and ends those that a test leaves."""
    started = []

    def start(*options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "sigma_noise.inject_cli", *options]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        assert started[-1].stderr.readline() == inject_cli.BEGINS + "\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


class Watching(Waiter):
    """Notes the state of a process whenever the injector sleeps, and may do something in one of the sleeps.

    `alternates`: sleeps are in turn between stops and within one, and it waits until the process is in that state,
    as one that has no CPU stops when it gets one.
    """

    def __init__(self, pid: int, act=None, *, alternates: bool = False) -> None:
        super().__init__()
        self.pid, self.act, self.alternates, self.seen = pid, act, alternates, []

    def until(self, deadline_ns: int) -> bool:
        if self.act is not None:
            self.act(len(self.seen))
        if self.alternates:
            wanted = "T" if len(self.seen) % 2 else "S"
            eventually(lambda: state(self.pid) == wanted, f"a process that never was in state {wanted}")
        self.seen.append(state(self.pid))
        return super().until(deadline_ns)


def test_begins_lie_on_the_grid():
    """Defends: drift of the grid, jitter out of bounds or not of the seed, a disturbance that ends too late."""
    plain = Plan(2.0, 0.025, 0.2)
    assert plain.starts_ns().tolist() == [200 * MS * k for k in range(10)]
    plan = Plan(100.0, 0.025, 0.2, jitter_s=0.03, seed=4)
    starts = plan.starts_ns()
    moved = starts - 200 * MS * np.arange(len(starts)) - 30 * MS
    assert len(starts) == 500
    assert np.abs(moved).max() <= 30 * MS
    assert np.abs(moved).max() > 29 * MS
    assert abs(moved.mean()) < 3 * 30 * MS / np.sqrt(3 * 500)
    assert starts[-1] + 25 * MS <= 100_000 * MS
    assert np.array_equal(starts, Plan(100.0, 0.025, 0.2, jitter_s=0.03, seed=4).starts_ns())
    assert not np.array_equal(starts, Plan(100.0, 0.025, 0.2, jitter_s=0.03, seed=5).starts_ns())
    assert Plan(3.0).starts_ns().tolist() == [0]
    assert Plan(3.0).each_s == 3.0
    assert len(Plan(0.01, 0.025, 0.2).starts_ns()) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0.0,), "duration_s must be seconds above 0"),
        ((float("nan"),), "duration_s must be seconds above 0"),
        ((1.0, 0.1), "must be given both"),
        ((1.0, 0.1, 0.1), "must be below period_s, found 0.1"),
        ((1.0, 0.05, 0.1, 0.025), "must be below period_s"),
        ((1.0, None, None, 0.1), "jitter_s must be 0 without period_s"),
        ((1.0, 0.1, 0.5, -0.1), "jitter_s must be seconds of 0 or more"),
    ],
)
def test_a_wrong_plan_is_refused_by_a_sentence(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plan(*arguments)


def test_the_log_is_what_was_done(victim, tmp_path):
    """Defends: stamps beside the stop they belong to, a target that was not stopped or did not go on."""
    with Watching(victim, alternates=True) as waiter:
        trace = inject(Stop(victim), Plan(0.35, 0.02, 0.1), waiter)
    # Sleeps: before and within each of four stops, and at the end.
    assert waiter.seen == ["S", "T", "S", "T", "S", "T", "S", "T", "S"]
    trace.write(tmp_path / "truth.parquet")
    back = read(tmp_path / "truth.parquet")
    stops = back.get(0, "event", "stop")
    assert len(stops) == 4
    assert stops.value.tolist() == [0.02] * 4
    assert np.all(stops.seconds >= 0.02)
    assert np.all(stops.start_ns[1:] >= stops.end_ns[:-1])
    assert back.run["ended"] == "done"
    assert back.run["cause"] == "stop"
    assert back.run["pid"] == victim
    assert back.run["period_s"] == 0.1


def test_a_late_disturbance_does_not_delay_the_next(victim):
    """Defends: a grid that is counted from the last end; a burst that makes up for what was missed."""

    def hang(sleep: int) -> None:
        if sleep == 2:
            time.sleep(0.27)

    with Watching(victim, hang) as waiter:
        trace = inject(Stop(victim), Plan(0.95, 0.01, 0.1), waiter)
    starts = trace.get(0, "event", "stop").start_ns
    steps = (starts - starts[0]) / (100 * MS)
    assert trace.run["skipped"] >= 1
    assert trace.run["longest_late_s"] < 0.05
    assert len(np.unique(np.round(steps))) == len(starts)
    assert len(starts) + trace.run["skipped"] == 10


def test_what_goes_wrong_frees_the_target(victim):
    """Defends: SIGCONT left out when something is raised between the two signals."""

    def fail(sleep: int) -> None:
        if sleep == 1:
            eventually(lambda: state(victim) == "T", "SIGSTOP had no effect")
            raise RuntimeError("in the middle")

    with Watching(victim, fail) as waiter, pytest.raises(RuntimeError, match="in the middle"):
        inject(Stop(victim), Plan(1.0, 0.1, 0.3), waiter)
    eventually(lambda: state(victim) == "S", "nobody freed the target")
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_target_that_ends(tmp_path):
    """Defends: a signal to whoever has the number next; the log of what was done, lost."""
    with subprocess.Popen(["sleep", "300"]) as process:

        def end(sleep: int) -> None:
            if sleep == 3:
                process.kill()
                process.wait()

        waiter = Waiter()
        waiter.until, until, calls = (
            (lambda ns: (end(len(calls)), calls.append(ns), until(ns))[-1]),
            waiter.until,
            [],
        )
        with waiter:
            trace = inject(Stop(process.pid), Plan(5.0, 0.01, 0.03), waiter)
    assert trace.run["ended"] == "target gone"
    assert 1 <= len(trace.get(0, "event", "stop")) <= 2


def test_killed_in_the_middle_of_a_stop(victim, injector, tmp_path):
    """Defends: a target that stays stopped for ever because its injector got SIGKILL; half a log."""
    truth = tmp_path / "truth.parquet"
    common = (
        "--target",
        "proc",
        "--pid",
        str(victim),
        "--length",
        "20s",
        "--period",
        "30s",
        "--duration",
        "90s",
    )
    process = injector(*common, "--truth", str(truth))
    eventually(lambda: state(victim) == "T", "the injector stopped nothing")
    process.kill()
    eventually(
        lambda: state(victim) == "S", "nobody freed the target", within_s=15
    )  # the stop had 20 s to go
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_in_the_middle_of_a_stop(victim, injector, tmp_path, number):
    """Defends: a signal that leaves the target stopped or loses the log; an exit code that says all went well."""
    truth = tmp_path / "truth.parquet"
    common = (
        "--target",
        "proc",
        "--pid",
        str(victim),
        "--length",
        "20s",
        "--period",
        "30s",
        "--duration",
        "90s",
    )
    process = injector(*common, "--truth", str(truth))
    eventually(lambda: state(victim) == "T", "the injector stopped nothing")
    process.send_signal(number)
    process.send_signal(signal.SIGTSTP)  # Ctrl-Z must not suspend it
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    eventually(lambda: state(victim) == "S", "nobody freed the target")
    trace = read(truth)
    assert trace.run["ended"] == number.name
    assert 0 < trace.get(0, "event", "stop").seconds[0] < 20
    assert "before the work was done" in told


def test_an_injector_that_is_itself_stopped(victim, injector, tmp_path):
    """Defends: a stop that lasts as long as somebody's debugger holds the injector."""
    common = (
        "--target",
        "proc",
        "--pid",
        str(victim),
        "--length",
        "2s",
        "--period",
        "60s",
        "--duration",
        "90s",
    )
    process = injector(*common, "--truth", str(tmp_path / "truth.parquet"))
    eventually(lambda: state(victim) == "T", "the injector stopped nothing")
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: state(victim) == "S", "nobody freed the target", within_s=30)
    assert state(process.pid) == "T"


def test_without_its_watchdog_it_stops_nothing(victim):
    """Defends: going on unguarded after the watchdog was killed."""
    target = Stop(victim)

    def kill_it(sleep: int) -> None:
        if sleep == 2:
            target._watchdog._process.kill()
            target._watchdog._process.wait()

    with Watching(victim, kill_it, alternates=True) as waiter, pytest.raises(Failure, match="watchdog"):
        inject(target, Plan(5.0, 0.01, 0.03), waiter)
    eventually(lambda: state(victim) == "S", "nobody freed the target")
    assert waiter.seen.count("T") == 1


def test_whom_it_refuses(victim):
    """Defends: stopping init, itself, nobody, or a process that somebody else stopped and wants so."""
    for pid in (0, 1, -5, os.getpid()):
        with pytest.raises(WrongInput, match="another process"):
            open_target(pid)
    with pytest.raises(WrongInput, match="there is no process"):
        open_target(2**22 - 1)
    os.kill(victim, signal.SIGSTOP)
    eventually(lambda: state(victim) == "T", "SIGSTOP had no effect")
    with pytest.raises(WrongInput, match=f"stopped already; start it with kill -CONT {victim}"):
        Stop(victim)
    assert state(victim) == "T"


def test_a_busy_cpu():
    """Defends: a sibling that sleeps instead of working, keeps real-time priority, or leaves its CPU behind it."""
    before = os.sched_getaffinity(0)
    cpu = max(before)
    with Waiter() as waiter:
        begin_s = time.thread_time()
        trace = inject(Busy(cpu), Plan(0.3, 0.05, 0.1), waiter)
        used_s = time.thread_time() - begin_s
    events = trace.get(0, "event", "busy")
    assert len(events) >= 1
    assert np.all(events.seconds >= 0.05)
    assert used_s > 0.2 * events.seconds.sum()  # of a CPU that others may use as well
    assert os.sched_getaffinity(0) == before
    with pytest.raises(WrongInput, match="--cpu must be one of"):
        Busy(100_000)


def test_memory_that_is_moved():
    with Waiter() as waiter:
        trace = inject(Memory(mib=64), Plan(0.05), waiter)
    assert len(trace.get(0, "event", "memory")) == 1
    assert trace.run["gb_per_s"] > 0.01
    with pytest.raises(WrongInput, match="--mib"):
        Memory(mib=0)


def test_a_quota_is_lifted_again(victim):
    """Defends: a control group that is left behind, and a process in it."""
    home = Path(f"/proc/{victim}/cgroup").read_text()
    during = []
    try:
        target = Quota(victim, length_s=0.05, period_s=0.1)
        with Watching(victim, lambda _: during.append(Path(f"/proc/{victim}/cgroup").read_text())) as waiter:
            trace = inject(target, Plan(0.1), waiter)
    except WrongInput as reason:
        pytest.skip(str(reason))
    assert any("sigma-noise" in text for text in during)
    assert Path(f"/proc/{victim}/cgroup").read_text() == home
    assert not target._made.exists()
    assert trace.run["quota_us"] == 50_000
    with pytest.raises(WrongInput, match="--period must lie"):
        Quota(victim, length_s=0.1, period_s=0.1)


def test_a_gpu_spins_as_long_as_asked(monkeypatch):
    """Defends: cycles of a wrong clock rate, against a made-up GPU of 2 GHz."""
    spins = []

    def sleep(cycles):
        spins.append(cycles)
        end = time.monotonic_ns() + cycles / 2
        while time.monotonic_ns() < end:
            pass

    class Nothing:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def synchronize(self):
            pass

    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        device=Nothing,
        stream=Nothing,
        Stream=Nothing,
        _sleep=sleep,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    with Waiter() as waiter:
        trace = inject(Gpu(0), Plan(0.2, 0.02, 0.1), waiter)
    # What was calibrated on a disturbed CPU is slower than 2 GHz, never faster.
    assert len(trace.get(0, "event", "gpu spin")) >= 1
    assert 0.02 * trace.run["cycles_per_s"] == pytest.approx(spins[2], rel=1e-6)
    assert trace.run["cycles_per_s"] < 2.01e9
    with pytest.raises(WrongInput, match="--device"):
        Gpu(1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"target": "proc"}, "--target proc: --pid is missing"),
        ({"target": "cpu", "pid": 7}, "--pid is of proc and quota alone"),
        ({"target": "proc", "pid": 7}, "--length and --period are missing"),
        ({"target": "quota", "pid": 7, "length": 0.01}, "--length .* and --period are missing"),
        ({"target": "cpu", "length": 0.2, "period": 0.1}, "--length .* must be below period"),
        ({"target": "cpu", "truth": Path("/nowhere/at/all")}, "--truth: cannot write in /nowhere/at"),
    ],
)
def test_wrong_options_are_refused_by_a_sentence(options, message, tmp_path):
    wanted = {"truth": tmp_path / "t.parquet", "duration": 0.2} | options
    wanted["target"] = inject_cli.TargetName(wanted["target"])
    with pytest.raises(WrongInput, match=message):
        inject_cli.inject(**wanted)


def test_without_a_gpu_there_is_a_sentence():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(WrongInput, match="torch sees no GPU"):
        Gpu(0)


def test_a_failed_injector_is_told(tmp_path):
    """Defends: a self-test whose injector did nothing, and that says the machine sees nothing."""
    with pytest.raises(Failure, match=r"the injector failed: .*--pid is missing"):  # noqa: SIM117
        with injecting(tmp_path / "t", "--target", "proc", "--duration", "1s"):
            pytest.fail("nothing was injected")


def stamps(pairs) -> Series:
    start, end = np.array(pairs, np.int64).reshape(-1, 2).T * MS
    return Series(start.copy(), end.copy(), np.ones(len(start)))


def test_a_cell_is_judged_by_overlap():
    stops = stamps([(0, 20), (100, 120), (200, 220), (300, 320)])
    found = stamps([(0, 20), (50, 65), (101, 121), (200, 209), (240, 241), (301, 322)])
    cell = judge(stops, found, 0.02, 10.0)
    assert cell.recall == 0.75  # the third was seen for 9 of 20 ms
    assert cell.found == 4
    assert cell.precision == 0.75
    assert cell.mean_length_s == pytest.approx((20 + 20 + 21) / 3 * 1e-3)
    assert cell.recall_low < 0.75 < cell.recall_high
    assert selftest.to_json([judge(stamps([]), stamps([]), 0.02, 10.0)])["cells"][0]["recall"] is None


def test_the_limit_is_where_all_longer_ones_are_good():
    """Defends: a limit taken from one lucky short cell."""

    def cell(length_s, recall, precision=1.0):
        return Cell(length_s, 5.0, 20, recall, 0.0, 1.0, 20, precision, length_s)

    assert limits([cell(1e-3, 1.0), cell(5e-3, 0.9), cell(20e-3, 1.0)]) == {5.0: 20e-3}
    assert limits([cell(1e-3, 0.96), cell(5e-3, 0.97), cell(20e-3, 1.0)]) == {5.0: 1e-3}
    assert limits([cell(1e-3, 1.0), cell(20e-3, 1.0, precision=0.5)]) == {5.0: None}
