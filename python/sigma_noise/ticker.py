"""A thread that looks at the machine now and then, and says what that cost."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

# Of the process, before anything pins itself: where a housekeeping CPU may be taken from.
ALLOWED_AT_START = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def housekeeping(measured: Collection[int], allowed: Collection[int] = ALLOWED_AT_START) -> frozenset[int]:
    """The CPUs that are not measured; empty where all are, which is so whenever nothing is pinned."""
    return frozenset(allowed) - frozenset(measured)


class Ticker:
    """Calls `tick` at once, then every `period_s` on average, and once more at the end.

    The gaps are uniform in 0.5..1.5 periods (random-phase sampling): a fixed period would alias with periodic noise and
    be a line in the spectrum of what is measured.  An error of `tick` ends the thread and is raised by `stop`.
    """

    def __init__(
        self, tick: Callable[[], None], period_s: float, seed: int, cpus: Collection[int] = ()
    ) -> None:
        if not period_s > 0:
            raise ValueError(f"period_s must be a time above 0, found {period_s}")
        self._tick, self._period_s, self._cpus = tick, period_s, frozenset(cpus)
        self._rng = np.random.default_rng(seed)
        self._ready, self._stopping = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sigma-noise-ticker", daemon=True)
        self.ticks = 0
        self.cost_s = 0.0
        self.late_s = 0.0
        self.pinned_to: list[int] = []

    def start(self) -> None:
        """Returns after the first tick."""
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    @property
    def account(self) -> dict[str, Any]:
        """What it did and cost: CPU seconds of its own thread, the latest it came, where it ran."""
        return {
            "period_s": self._period_s,
            "ticks": self.ticks,
            "cost_s": self.cost_s,
            "late_s": self.late_s,
            "housekeeping_cpus": self.pinned_to,
        }

    def _run(self) -> None:
        try:
            self._pin()
            due = time.monotonic()
            while True:
                self.late_s = max(self.late_s, time.monotonic() - due)
                self._once()
                gap_s = self._period_s * self._rng.uniform(0.5, 1.5)
                due = time.monotonic() + gap_s
                if self._stopping.wait(gap_s):
                    self._once()
                    return
        except BaseException as error:  # raised again in stop, where someone hears it
            self._error = error
        finally:
            self._ready.set()

    def _once(self) -> None:
        self._tick()
        self.ticks += 1
        self.cost_s = time.thread_time()
        self._ready.set()

    def _pin(self) -> None:
        if self._cpus:
            with contextlib.suppress(OSError):  # a CPU that went offline, or a cpuset that shrank
                os.sched_setaffinity(0, self._cpus)
                self.pinned_to = sorted(self._cpus)
