"""The injector: what it logs is what it did, and nothing stays stopped whatever happens to it."""

import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import noise_victims
import numpy as np
import pytest
import torch
from noise_victims import Watching, eventually, state
from sigma_noise import inject_cli
from sigma_noise.inject import Plan, Waiter, inject
from sigma_noise.targets import STALL_NS, Busy, Gpu, Memory, Stop, open_target
from sigma_noise.trace import read
from sigma_train.errors import Failure, WrongInput

MS = 1_000_000


@pytest.fixture
def victim():
    with noise_victims.sleeping() as pid:
        yield pid


@pytest.fixture
def injector():
    with noise_victims.injectors() as start:
        yield start


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
            (lambda *args: (end(len(calls)), calls.append(args), until(*args))[-1]),
            waiter.until,
            [],
        )
        with waiter:
            trace = inject(Stop(process.pid), Plan(5.0, 0.01, 0.03), waiter)
    assert trace.run["ended"] == "target gone"
    assert len(trace.get(0, "event", "stop")) == 2  # the second until the target ended


def test_a_target_that_ends_and_is_not_asked_for(tmp_path):
    """Defends: signals to a zombie, which takes them all, logged as stops of a process that is no more."""
    with subprocess.Popen(["sleep", "300"]) as process:

        def end(sleep: int) -> None:
            if sleep == 1:
                process.kill()
                eventually(lambda: state(process.pid) == "Z", "it did not end")

        with Watching(process.pid, end) as waiter:
            trace = inject(Stop(process.pid), Plan(90.0, 20.0, 30.0), waiter)
        stops = trace.get(0, "event", "stop")
        assert trace.run["ended"] == "target gone"
        assert len(stops) == 1
        assert stops.seconds[0] < 20  # it was over when the target was
        with pytest.raises(WrongInput, match=f"process {process.pid} has ended"):
            open_target(process.pid)


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
    """Defends: a stop that lasts as long as somebody's debugger holds the injector, or that is logged as such."""
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
    truth = tmp_path / "truth.parquet"
    process = injector(*common, "--truth", str(truth))
    eventually(lambda: state(victim) == "T", "the injector stopped nothing")
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: state(victim) == "S", "nobody freed the target", within_s=30)
    freed_ns = time.monotonic_ns()
    assert state(process.pid) == "T"
    time.sleep(1)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    stops = read(truth).get(0, "event", "stop")
    assert len(stops) == 1
    assert stops.end_ns[0] < freed_ns + 0.5e9, "the log has a stop that the watchdog had ended"


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
    with pytest.raises(WrongInput, match=f"stopped already; start it with kill -CONT {victim}"), Stop(victim):
        pytest.fail("it was taken")
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
    assert (
        used_s > 0.05 * events.seconds.sum()
    )  # of a CPU that others use as well; one that sleeps has none of it
    assert os.sched_getaffinity(0) == before
    with pytest.raises(WrongInput, match="--cpu must be one of"):
        Busy(100_000)


@pytest.mark.parametrize("cause", ["busy", "memory"])
def test_a_hog_that_was_stopped_disturbed_nothing_meanwhile(cause, monkeypatch):
    """Defends: a log of a busy CPU through the time in which somebody's debugger held the injector."""
    target = Busy() if cause == "busy" else Memory(mib=1)
    clock, step = [0], iter([1000, 1000, 2 * STALL_NS] + [1000] * 10)
    monkeypatch.setattr(target, "_piece", lambda: clock.__setitem__(0, clock[0] + next(step)))
    monkeypatch.setattr(time, "monotonic_ns", lambda: clock[0])
    with Waiter() as waiter:
        assert target.disturb(3 * STALL_NS, waiter) == (0, 2000)


def test_memory_that_is_moved():
    """Defends: a hog that holds a part of what was asked for, which a cache may hold as well."""
    with Waiter() as waiter:
        target = Memory(mib=64)
        trace = inject(target, Plan(0.05), waiter)
    assert len(trace.get(0, "event", "memory")) == 1
    assert trace.run["gb_per_s"] > 0.01
    assert trace.run["bytes"] == target._half.nbytes + target._other.nbytes == 64 << 20
    with pytest.raises(WrongInput, match="--mib"):
        Memory(mib=0)


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
        ({"target": "proc", "cpu": 1}, "--cpu is of --target cpu, memory; proc has no use for it"),
        ({"target": "cpu", "mib": 64}, "--mib is of --target memory; cpu has no use for it"),
        ({"target": "memory", "device": 0}, "--device is of --target gpu; memory has no use for it"),
        (
            {"target": "quota", "jitter": 0.1},
            "--jitter is of --target proc, cpu, memory, gpu; quota has no use",
        ),
        ({"target": "cpu", "seed": 3}, "--seed is of --jitter"),
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
