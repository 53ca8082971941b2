"""Processes that are disturbed and injectors that disturb them, for several tests of `sigma noise inject`."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sigma_noise import inject_cli
from sigma_noise.inject import Waiter


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def eventually(is_so, what: str, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


@contextlib.contextmanager
def sleeping() -> Iterator[int]:
    """The pid of a process that sleeps."""
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process.pid
        process.send_signal(signal.SIGCONT)
        process.kill()


@contextlib.contextmanager
def injectors() -> Iterator[Callable[..., subprocess.Popen]]:
    """What starts injectors as processes; those that a test leaves are ended."""
    started: list[subprocess.Popen] = []

    def start(*options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "sigma_noise.inject_cli", *options]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        assert started[-1].stderr.readline() == inject_cli.BEGINS + "\n"
        return started[-1]

    try:
        yield start
    finally:
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

    def until(self, deadline_ns: int, pidfd: int | None = None) -> bool:
        if self.act is not None:
            self.act(len(self.seen))
        if self.alternates:
            wanted = "T" if len(self.seen) % 2 else "S"
            eventually(lambda: state(self.pid) == wanted, f"a process that never was in state {wanted}")
        self.seen.append(state(self.pid))
        return super().until(deadline_ns, pidfd)
