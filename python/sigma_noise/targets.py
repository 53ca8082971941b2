"""What an injector can disturb: a process, a CPU, the memory bus, a GPU; a CPU quota is in `quota.py`."""

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
from sigma_noise.inject import TargetGone, Waiter
from sigma_noise.watchdog import has_ended, resume

GRACE_S = 1.0  # that a stop may outlive its time before the watchdog ends it
STALL_NS = 1_000_000_000  # between two looks at the clock: a busy loop that was itself stopped, and disturbed nothing
SPIN_CHECK = 2000  # rounds of a busy loop between two looks at the clock, some 50 us


class Stop:
    """SIGSTOP and SIGCONT to a process, which is never left stopped.

    SIGCONT is sent in `finally`; a watchdog process sends it if this one is killed, or is itself stopped in between:
    then the stop ended when the watchdog ended it.  Signals go through a pidfd, so they cannot reach a process that was
    given the number later.  Entering raises: as `open_target`.
    """

    cause = "stop"

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def __enter__(self) -> "Stop":
        with contextlib.ExitStack() as stack:
            self._pidfd = open_target(self.pid)
            stack.callback(os.close, self._pidfd)
            self._watchdog = Watchdog(self._pidfd)
            stack.callback(self._watchdog.dismiss)
            stack.callback(resume, self._pidfd)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()

    def disturb(self, length_ns: int, waiter: Waiter) -> tuple[int, int]:
        if has_ended(self._pidfd):
            raise TargetGone
        self._watchdog.expect_end(time.monotonic_ns() + length_ns + round(GRACE_S * 1e9))
        start = time.monotonic_ns()
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
            waiter.until(start + length_ns, self._pidfd)
        except ProcessLookupError:
            raise TargetGone from None
        finally:
            resume(self._pidfd)
        end = time.monotonic_ns()
        end = self._watchdog.ended() or end
        if has_ended(self._pidfd):
            raise TargetGone((start, end))
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
        start = last = time.monotonic_ns()
        with ordinarily():
            while last - start < length_ns and not waiter.ended_by:
                self._piece()
                now = time.monotonic_ns()
                if now - last > STALL_NS:
                    break
                last = now
        return start, last

    def about(self) -> dict[str, Any]:
        return {"cpu": self.cpu}

    def _piece(self) -> None:
        for _ in range(SPIN_CHECK):
            pass


class Memory(Busy):
    """Copies memory that no cache holds, so that others wait for the bus."""

    cause = "memory"

    def __init__(self, cpu: int | None = None, *, mib: int = 256) -> None:
        super().__init__(cpu)
        if not 1 <= mib <= 1 << 20:
            raise WrongInput(f"--mib must lie in 1..{1 << 20}, found {mib}")
        # Half of it each, and touched, so that no page fault is in the way.
        self._half, self._other = np.ones(mib << 19, np.uint8), np.ones(mib << 19, np.uint8)
        self._at, self._moved, self._busy_ns = 0, 0, 0

    def disturb(self, length_ns: int, waiter: Waiter) -> tuple[int, int]:
        start, end = super().disturb(length_ns, waiter)
        self._busy_ns += end - start
        return start, end

    def about(self) -> dict[str, Any]:
        held = self._half.nbytes + self._other.nbytes
        return super().about() | {"bytes": held, "gb_per_s": self._moved / max(self._busy_ns, 1)}

    def _piece(self) -> None:
        piece, at = (
            min(1 << 22, len(self._half)),
            self._at,
        )  # 4 MiB: about a millisecond between looks at the clock
        self._other[at : at + piece] = self._half[at : at + piece]
        self._moved += 2 * piece
        self._at = (at + piece) % (len(self._half) - piece + 1)


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
        start = last = time.monotonic_ns()
        left = length_ns
        while left > 0 and not waiter.ended_by:  # in pieces, so that a signal is heard
            piece = min(left, 100_000_000)
            self._spin(round(piece * 1e-9 * self._cycles_per_s))
            now = time.monotonic_ns()
            if now - last > piece + STALL_NS:
                break
            last, left = now, left - piece
        return start, last

    def about(self) -> dict[str, Any]:
        return {"device": self.device, "cycles_per_s": self._cycles_per_s}

    def _spin(self, cycles: int) -> None:
        with self._cuda.device(self.device), self._cuda.stream(self._stream):
            self._cuda._sleep(cycles)
        self._stream.synchronize()


KILLED = "the watchdog that would free the target was killed: nothing more is stopped"


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

    def ended(self) -> int:
        """When the watchdog had to end the stop, in ns; 0 if it had not."""
        self._say("cont\n")
        if not (answer := self._process.stdout.readline()):
            raise Failure(KILLED)
        return int(answer)

    def dismiss(self) -> None:
        with contextlib.suppress(OSError):  # it was killed
            self._process.stdin.write(b"done\n")
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _say(self, text: str) -> None:
        try:
            self._process.stdin.write(text.encode())
        except OSError:
            raise Failure(KILLED) from None


def open_target(pid: int) -> int:
    """A pidfd of a process that may be disturbed.

    Raises: WrongInput for a process that does not exist, has ended, is not ours, is this one or the first, or is
    stopped already.
    """
    if pid in (0, 1, os.getpid()) or pid < 0:
        raise WrongInput(f"--pid must be another process than the first and this one, found {pid}")
    with contextlib.ExitStack() as stack:
        try:
            pidfd = os.pidfd_open(pid)
            stack.callback(os.close, pidfd)
            signal.pidfd_send_signal(pidfd, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            raise WrongInput(f"--pid: there is no process {pid}") from None
        except OSError as error:
            raise WrongInput(f"--pid: process {pid} cannot be disturbed: {error.strerror}") from None
        if has_ended(pidfd):
            raise WrongInput(f"--pid: process {pid} has ended; only its parent has not asked for that yet")
        if state in "Tt":
            raise WrongInput(f"--pid: process {pid} is stopped already; start it with kill -CONT {pid}")
        stack.pop_all()
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
