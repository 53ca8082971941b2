"""Disturbances whose begin and end are known: what a profiler says is judged by them.

Disturbances begin on a grid of absolute times, t0 + k period, each moved by a uniform jitter that comes from the seed,
so late ones do not make later ones late.  Stamps are CLOCK_MONOTONIC, the clock of what is measured.  What was done is
written as a trace whose events have the cause as name and the length asked for as value, in seconds.
"""

import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType, TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sigma_noise.trace import Series, Trace

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

LEAD_NS = 50_000_000  # from ready to t0, so that the first disturbance is as punctual as the others


@dataclass(frozen=True)
class Plan:
    """When to disturb.  Seconds; `period_s` None means one disturbance for the whole time.

    Raises: ValueError if a time is none, or disturbances could overlap.
    """

    duration_s: float
    length_s: float | None = None
    period_s: float | None = None
    jitter_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("duration_s", "length_s", "period_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e6:
                raise ValueError(f"{name} must be seconds above 0 and below 1e6, found {value}")
        if not 0 <= self.jitter_s < 1e6:
            raise ValueError(f"jitter_s must be seconds of 0 or more, found {self.jitter_s}")
        if (self.length_s is None) != (self.period_s is None):
            raise ValueError("length_s and period_s must be given both, or neither for one long disturbance")
        if self.period_s is None:
            if self.jitter_s:
                raise ValueError("jitter_s must be 0 without period_s: one long disturbance has no grid")
        elif self.length_s + 2 * self.jitter_s >= self.period_s:
            raise ValueError(
                f"length_s + 2 jitter_s must be below period_s, found {self.length_s} + 2 * {self.jitter_s} "
                f"and {self.period_s}"
            )

    @property
    def each_s(self) -> float:
        """How long a disturbance is asked to be."""
        return self.duration_s if self.length_s is None else self.length_s

    def starts_ns(self) -> NDArray[np.int64]:
        """Begins after t0, int64 [n], the first one jitter after it; the last ends within the duration."""
        if self.period_s is None:
            return np.zeros(1, np.int64)
        n = math.floor((self.duration_s - self.length_s - 2 * self.jitter_s) / self.period_s + 1e-9) + 1
        moved = np.random.default_rng(self.seed).uniform(-1.0, 1.0, max(n, 0)) * self.jitter_s
        return np.round((np.arange(len(moved)) * self.period_s + self.jitter_s + moved) * 1e9).astype(
            np.int64
        )


class Waiter:
    """Sleeps that a signal ends: while it is entered, SIGINT, SIGTERM and SIGHUP only set `ended_by`.

    SIGTSTP is ignored, as a suspended injector would leave its target disturbed.  Handlers can be set by the main
    thread alone; elsewhere signals do what they did.
    """

    def __init__(self) -> None:
        self.ended_by = 0

    def __enter__(self) -> "Waiter":
        self._before: dict[int, Any] = {}
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in ENDING}
            self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        for end in self._pipe:
            os.close(end)

    def until(self, deadline_ns: int, pidfd: int | None = None) -> bool:
        """Sleep; False as soon as a signal came or the process of `pidfd` has ended."""
        heard = [self._pipe[0]] if pidfd is None else [self._pipe[0], pidfd]
        while not self.ended_by and (left := deadline_ns - time.monotonic_ns()) > 0:
            if pidfd in select.select(heard, [], [], left * 1e-9)[0]:
                return False
        return not self.ended_by

    def _note(self, number: int, _: FrameType | None) -> None:
        self.ended_by = number
        os.write(self._pipe[1], b"!")  # so that a select which is about to begin returns as well


class Target(Protocol):
    """What is disturbed.  Entering it takes what it needs, leaving it undoes everything.

    `disturb` returns the begin and end of a disturbance that is to last until a time, or until the waiter is ended:
    of what took place, whatever was asked for.  Raises: TargetGone where there is nothing left to disturb.
    """

    cause: str

    def __enter__(self) -> "Target": ...

    def __exit__(self, *_: Any) -> None: ...

    def disturb(self, length_ns: int, waiter: Waiter) -> tuple[int, int]: ...

    def about(self) -> dict[str, Any]: ...


class TargetGone(Exception):
    """The process that was disturbed has ended; `args` is begin and end of the disturbance that it ended in, if any."""


def inject(target: Target, plan: Plan, waiter: Waiter, begins: Callable[[], None] = lambda: None) -> Trace:
    """Disturb `target` as planned and return what was done; `begins` is called when all is ready.

    A disturbance that would begin more than half a period late is skipped and counted.  `run["ended"]` says "done", the
    signal that ended it, or "target gone".
    """
    done: list[tuple[int, int]] = []
    late_ns, skipped, ended = 0, 0, "done"
    length_ns = round(plan.each_s * 1e9)
    patience_ns = round(plan.period_s * 0.5e9) if plan.period_s else 1 << 62
    with target, in_time() as scheduling:
        begins()
        t0 = time.monotonic_ns() + LEAD_NS
        try:
            for start in (t0 + plan.starts_ns()).tolist():
                if not waiter.until(start):
                    break
                late = time.monotonic_ns() - start
                if late > patience_ns:
                    skipped += 1
                    continue
                late_ns = max(late_ns, late)
                done.append(target.disturb(length_ns, waiter))
            waiter.until(t0 + round(plan.duration_s * 1e9))
        except TargetGone as gone:
            done.extend(gone.args)
            ended = "target gone"
        about = target.about()
    if waiter.ended_by:
        ended = signal.Signals(waiter.ended_by).name
    stamps = np.array(done, np.int64).reshape(-1, 2)
    truth = Series(stamps[:, 0].copy(), stamps[:, 1].copy(), np.full(len(stamps), plan.each_s))
    run = {"tool": "sigma noise inject", "cause": target.cause, **asdict(plan), "ended": ended}
    run |= {"skipped": skipped, "longest_late_s": late_ns * 1e-9, "scheduling": scheduling, **about}
    rank = {"host": socket.gethostname(), "clock": "CLOCK_MONOTONIC"}
    return Trace(run, {0: rank}, {(0, "event", target.cause): truth})


@contextmanager
def in_time() -> Iterator[str]:
    """Wake before ordinary processes do, where that is allowed."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except OSError as error:
        yield f"ordinary: SCHED_FIFO refused: {error.strerror}"
        return
    try:
        yield "SCHED_FIFO"
    finally:
        os.sched_setscheduler(0, *before)
