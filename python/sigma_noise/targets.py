"""What an injector can disturb: a process, a CPU, the memory bus, a CPU quota, a GPU."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sigma_train.errors import Failure, WrongInput

from sigma_noise import watchdog
from sigma_noise.counters import group_of
from sigma_noise.inject import TargetGone, Waiter

GRACE_S = 1.0  # that a stop may outlive its time before the watchdog ends it
MOST_SHARES, MOST_WEIGHT = "262144", "10000"  # of version 1 and 2 of control groups
SPIN_CHECK = 2000  # rounds of a busy loop between two looks at the clock, some 50 us


class Stop:
    """SIGSTOP and SIGCONT to a process, which is never left stopped.

    SIGCONT is sent in `finally`; a watchdog process sends it if this one is killed, or is itself stopped in between.
    Signals go through a pidfd, so they cannot reach a process that was given the number later.
    Raises: WrongInput for a process that does not exist, is not ours, is this one or the first, or is stopped already.
    """

    cause = "stop"

    def __init__(self, pid: int) -> None:
        self.pid, self._pidfd = pid, open_target(pid)

    def __enter__(self) -> "Stop":
        self._watchdog = Watchdog(self._pidfd)
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
        finally:
            self._watchdog.dismiss()
            os.close(self._pidfd)

    def disturb(self, length_ns: int, waiter: Waiter) -> tuple[int, int]:
        self._watchdog.expect_end(time.monotonic_ns() + length_ns + round(GRACE_S * 1e9))
        start = time.monotonic_ns()
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
            waiter.until(start + length_ns)
            signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
            end = time.monotonic_ns()
        except ProcessLookupError:
            raise TargetGone from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
        self._watchdog.ended()
        return start, end

    def about(self) -> dict[str, Any]:
        return {"pid": self.pid}


class Busy:
    """Spins on a CPU, beside whatever runs there: the scheduler shares it out."""

    cause = "busy"

    def __init__(self, cpu: int | None = None) -> None:
        self.cpu = check_cpu(cpu)

    def __enter__(self) -> "Busy":
        self._affinity = os.sched_getaffinity(0)
        if self.cpu is not None:
            os.sched_setaffinity(0, {self.cpu})
        return self

    def __exit__(self, *_: Any) -> None:
        os.sched_setaffinity(0, self._affinity)

    def disturb(self, length_ns: int, waiter: Waiter) -> tuple[int, int]:
        start = time.monotonic_ns()
        with ordinarily():
            while time.monotonic_ns() - start < length_ns and not waiter.ended_by:
                for _ in range(SPIN_CHECK):
                    pass
        return start, time.monotonic_ns()

    def about(self) -> dict[str, Any]:
        return {"cpu": self.cpu}


class Memory(Busy):
    """Copies memory that no cache holds, so that others wait for the bus."""

    cause = "memory"

    def __init__(self, cpu: int | None = None, *, mib: int = 256) -> None:
        super().__init__(cpu)
        if not 1 <= mib <= 1 << 20:
            raise WrongInput(f"--mib must lie in 1..{1 << 20}, found {mib}")
        self._half = np.ones(mib << 17, np.uint8)  # touched, so that no page fault is in the way
        self._other = np.ones(mib << 17, np.uint8)
        self._moved, self._busy_ns = 0, 0

    def disturb(self, length_ns: int, waiter: Waiter) -> tuple[int, int]:
        start = time.monotonic_ns()
        piece, at = min(1 << 22, len(self._half)), 0  # 4 MiB: about a millisecond between looks at the clock
        with ordinarily():
            while time.monotonic_ns() - start < length_ns and not waiter.ended_by:
                self._other[at : at + piece] = self._half[at : at + piece]
                self._moved += 2 * piece
                at = (at + piece) % (len(self._half) - piece + 1)
        end = time.monotonic_ns()
        self._busy_ns += end - start
        return start, end

    def about(self) -> dict[str, Any]:
        return super().about() | {"gb_per_s": self._moved / max(self._busy_ns, 1)}


class Quota:
    """A CPU quota for a process: a control group of its own, in which it may run period - length of each period.

    The log has one event, the time in which the quota held: the kernel chooses the moments.  The group has the greatest
    weight there is, as the quota alone shall stop it, not the company of other groups.
    Raises: WrongInput where control groups are not writable.
    """

    cause = "cgroup quota"

    def __init__(self, pid: int, *, length_s: float, period_s: float) -> None:
        if not 0 < length_s < period_s or not 1e-3 <= period_s <= 1.0 or period_s - length_s < 1e-3:
            raise WrongInput(
                "--period must lie in 1 ms..1 s and leave at least 1 ms beside --length, found "
                f"{period_s:g} s and {length_s:g} s"
            )
        self.pid, self._pidfd = pid, open_target(pid)
        self._quota_us, self._period_us = round((period_s - length_s) * 1e6), round(period_s * 1e6)
        membership, mounts = (Path(f"/proc/{p}").read_bytes() for p in (f"{pid}/cgroup", "self/mountinfo"))
        try:
            self._home = group_of(membership, mounts)
        except ValueError as error:
            raise WrongInput(f"no CPU quota can be set here: {error}") from None
        self._made = self._home / f"sigma-noise-{os.getpid()}"

    def __enter__(self) -> "Quota":
        try:
            self._made.mkdir()
            if (self._made / "cpu.cfs_quota_us").exists():
                (self._made / "cpu.cfs_period_us").write_text(str(self._period_us))
                (self._made / "cpu.cfs_quota_us").write_text(str(self._quota_us))
                (self._made / "cpu.shares").write_text(MOST_SHARES)
            else:
                (self._made / "cpu.weight").write_text(MOST_WEIGHT)
                (self._made / "cpu.max").write_text(f"{self._quota_us} {self._period_us}")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._made.rmdir()
            raise WrongInput(f"no CPU quota can be set here: {self._made}: {error.strerror}") from None
        group = [str(self._home / "cgroup.procs"), str(self.pid), str(self._made)]
        self._watchdog = Watchdog(self._pidfd, group)
        return self

    def __exit__(self, *_: Any) -> None:
        self._leave()
        deadline = time.monotonic() + 1.0
        while self._made.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # busy until the kernel has moved the last thread
                self._made.rmdir()
                break
            time.sleep(0.01)
        self._watchdog.dismiss()
        os.close(self._pidfd)

    def disturb(self, length_ns: int, waiter: Waiter) -> tuple[int, int]:
        start = time.monotonic_ns()
        try:
            (self._made / "cgroup.procs").write_text(str(self.pid))
        except ProcessLookupError:
            raise TargetGone from None
        except OSError as error:
            raise WrongInput(f"pid {self.pid} cannot get a CPU quota here: {error.strerror}") from None
        waiter.until(start + length_ns)
        self._leave()
        return start, time.monotonic_ns()

    def about(self) -> dict[str, Any]:
        return {"pid": self.pid, "quota_us": self._quota_us, "cfs_period_us": self._period_us}

    def _leave(self) -> None:
        with contextlib.suppress(OSError):  # the target may be gone
            (self._home / "cgroup.procs").write_text(str(self.pid))


class Gpu:
    """Kernels that do nothing for a known number of cycles, on a stream of their own (`torch.cuda._sleep`).

    Stamps are of the host, around the launch and the wait for its end, so some 10 us longer than the kernel.
    Raises: WrongInput where torch sees no GPU.
    """

    cause = "gpu spin"

    def __init__(self, device: int = 0) -> None:
        import torch

        if not torch.cuda.is_available():
            raise WrongInput("--target gpu: torch sees no GPU here; take --target cpu, memory or proc")
        if not 0 <= device < torch.cuda.device_count():
            raise WrongInput(f"--device must lie in 0..{torch.cuda.device_count() - 1}, found {device}")
        self._cuda, self.device = torch.cuda, device

    def __enter__(self) -> "Gpu":
        with self._cuda.device(self.device):
            self._stream = self._cuda.Stream()
        self._cycles_per_s = 0.0
        for cycles in (1 << 20, 1 << 24):  # the first warms up
            begin = time.monotonic_ns()
            self._spin(cycles)
            self._cycles_per_s = cycles / ((time.monotonic_ns() - begin) * 1e-9)
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def disturb(self, length_ns: int, waiter: Waiter) -> tuple[int, int]:
        start = time.monotonic_ns()
        left = length_ns
        while left > 0 and not waiter.ended_by:  # in pieces, so that a signal is heard
            piece = min(left, 100_000_000)
            self._spin(round(piece * 1e-9 * self._cycles_per_s))
            left -= piece
        return start, time.monotonic_ns()

    def about(self) -> dict[str, Any]:
        return {"device": self.device, "cycles_per_s": self._cycles_per_s}

    def _spin(self, cycles: int) -> None:
        with self._cuda.device(self.device), self._cuda.stream(self._stream):
            self._cuda._sleep(cycles)
        self._stream.synchronize()


class Watchdog:
    """The process of `watchdog.py`, which outlives this one just long enough to undo what it did."""

    def __init__(self, pidfd: int, group: list[str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__, str(pidfd), *(group or [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[pidfd],
            start_new_session=True,  # what ends the injector's job must not end this
            bufsize=0,
        )
        if self._process.stdout.readline() != b"ready\n":
            self.dismiss()
            raise Failure("the watchdog that would free the target did not start")

    def expect_end(self, by_ns: int) -> None:
        self._say(f"stop {by_ns}\n")

    def ended(self) -> None:
        self._say("cont\n")

    def dismiss(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.write(b"done\n")
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _say(self, text: str) -> None:
        try:
            self._process.stdin.write(text.encode())
        except OSError:
            raise Failure(
                "the watchdog that would free the target was killed: nothing more is stopped"
            ) from None


def open_target(pid: int) -> int:
    """A pidfd of a process that may be disturbed."""
    if pid in (0, 1, os.getpid()) or pid < 0:
        raise WrongInput(f"--pid must be another process than the first and this one, found {pid}")
    try:
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        raise WrongInput(f"--pid: there is no process {pid}") from None
    except OSError as error:
        raise WrongInput(f"--pid: process {pid} cannot be disturbed: {error.strerror}") from None
    if state in "Tt":
        os.close(pidfd)
        raise WrongInput(f"--pid: process {pid} is stopped already; start it with kill -CONT {pid}")
    return pidfd


def check_cpu(cpu: int | None) -> int | None:
    if cpu is not None and cpu not in os.sched_getaffinity(0):
        raise WrongInput(f"--cpu must be one of {sorted(os.sched_getaffinity(0))}, found {cpu}")
    return cpu


@contextlib.contextmanager
def ordinarily() -> Iterator[None]:
    """Compete as any process does: at real-time priority a busy loop would leave others nothing."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)
