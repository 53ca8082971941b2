"""A CPU quota for a process, as a disturbance: a control group of its own for a while."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from sigma_train.errors import Failure, WrongInput

from sigma_noise.counters import group_of
from sigma_noise.inject import TargetGone, Waiter
from sigma_noise.targets import Watchdog, open_target
from sigma_noise.watchdog import has_ended, remove_group

MOST_SHARES, MOST_WEIGHT = "262144", "10000"  # of version 1 and 2 of control groups


class Quota:
    """A group in which a process may run period - length of each period.

    The log has one event, the time in which the quota held: the kernel chooses the moments.  The group has the greatest
    weight there is, as the quota alone shall stop it, not the company of other groups.  On leaving, whatever is in the
    group goes back to where the process was, and the group is removed; the watchdog does it if this process is killed.
    Entering raises: WrongInput where control groups are not writable, and as `open_target`.
    """

    cause = "cgroup quota"

    def __init__(self, pid: int, *, length_s: float, period_s: float) -> None:
        if not 0 < length_s < period_s or not 1e-3 <= period_s <= 1.0 or period_s - length_s < 1e-3:
            raise WrongInput(
                "--period must lie in 1 ms..1 s and leave at least 1 ms beside --length, found "
                f"{period_s:g} s and {length_s:g} s"
            )
        self.pid = pid
        self._quota_us, self._period_us = round((period_s - length_s) * 1e6), round(period_s * 1e6)

    def __enter__(self) -> "Quota":
        with contextlib.ExitStack() as stack:
            self._pidfd = open_target(self.pid)
            stack.callback(os.close, self._pidfd)
            self._home = self._group_of_target()
            self.made = self._home / f"sigma-noise-{os.getpid()}"
            # Before the group is there, so that no death of this process leaves it behind.
            watchdog = Watchdog(self._pidfd, [str(self._home / "cgroup.procs"), str(self.made)])
            stack.callback(watchdog.dismiss)
            stack.callback(self._remove)
            self._make()
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()

    def disturb(self, length_ns: int, waiter: Waiter) -> tuple[int, int]:
        if has_ended(self._pidfd):  # its number may be another process's by now
            raise TargetGone
        start = time.monotonic_ns()
        try:
            (self.made / "cgroup.procs").write_text(str(self.pid))
        except ProcessLookupError:
            raise TargetGone from None
        except OSError as error:
            raise WrongInput(f"pid {self.pid} cannot get a CPU quota here: {error.strerror}") from None
        waiter.until(start + length_ns, self._pidfd)
        is_gone, held = has_ended(self._pidfd), (start, time.monotonic_ns())
        self._remove()
        if is_gone:
            raise TargetGone(held)
        return start, time.monotonic_ns()

    def about(self) -> dict[str, Any]:
        return {"pid": self.pid, "quota_us": self._quota_us, "cfs_period_us": self._period_us}

    def _group_of_target(self) -> Path:
        try:
            membership, mounts = (
                Path(f"/proc/{p}").read_bytes() for p in (f"{self.pid}/cgroup", "self/mountinfo")
            )
            home = group_of(membership, mounts)
        except (OSError, ValueError) as error:
            raise WrongInput(f"no CPU quota can be set here: {error}") from None
        if has_ended(self._pidfd):
            raise WrongInput(f"--pid: process {self.pid} has ended")
        return home

    def _make(self) -> None:
        try:
            self.made.mkdir()
            if (self.made / "cpu.cfs_quota_us").exists():
                (self.made / "cpu.cfs_period_us").write_text(str(self._period_us))
                (self.made / "cpu.cfs_quota_us").write_text(str(self._quota_us))
                (self.made / "cpu.shares").write_text(MOST_SHARES)
            else:
                (self.made / "cpu.weight").write_text(MOST_WEIGHT)
                (self.made / "cpu.max").write_text(f"{self._quota_us} {self._period_us}")
        except OSError as error:
            raise WrongInput(f"no CPU quota can be set here: {self.made}: {error.strerror}") from None

    def _remove(self) -> None:
        try:
            remove_group(str(self._home / "cgroup.procs"), str(self.made))
        except OSError as error:
            raise Failure(
                f"the control group {self.made} could not be removed: {error.strerror}; rmdir does it once it is empty"
            ) from None
