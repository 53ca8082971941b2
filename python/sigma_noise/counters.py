"""The counters of the Linux kernel that tell why a thread lost time, read without privileges.

| name | unit | of | file | when it moves |
|---|---|---|---|---|
| on_cpu_ns | ns | the thread | its CPU clock, or schedstat | always; schedstat at ticks |
| run_delay_ns | ns | the thread | schedstat | when a wait for a CPU ends |
| nonvoluntary_switches | 1 | the thread | status | at once |
| minor_faults, major_faults | 1 | the thread | stat | at once |
| steal_ns, irq_ns, softirq_ns | ns | the pinned CPU, or all | /proc/stat | in steps of a clock tick, mostly 10 ms |
| interrupts | 1 | all CPUs | /proc/stat | at once |
| throttled_ns, throttled_count | ns, 1 | the control group | cpu.stat | when a throttle ends |
| psi_cpu_us | us | the machine | /proc/pressure/cpu | every 2 s or when read |
| cpu_khz | kHz | the pinned CPU | cpufreq | a gauge, not a counter |
| core_throttled_ns | ns | the core of the pinned CPU, for heat | thermal_throttle | in ms; of Intel alone |
"""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

_THROTTLES = re.compile(rb"^nr_throttled (\d+)$", re.MULTILINE)
_THROTTLED = re.compile(rb"^throttled_(usec|time) (\d+)$", re.MULTILINE)
TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Source(Protocol):
    """Something with one reading for each name.  `read` raises OSError, ValueError, IndexError or KeyError."""

    names: tuple[str, ...]

    def read(self) -> tuple[float, ...]: ...


class TextFile:
    """A file whose text `parse` turns into one number for each name."""

    def __init__(
        self,
        path: Path,
        names: tuple[str, ...],
        parse: Callable[[bytes], tuple[float, ...]],
        reads: "Reads | None" = None,
    ) -> None:
        self.path, self.names, self._parse, self._reads = path, names, parse, reads or slurp

    def read(self) -> tuple[float, ...]:
        return self._parse(self._reads(self.path))


class ThreadClock:
    """on_cpu_ns of a thread of this process, exact while it runs: schedstat lags by up to a scheduler tick."""

    names = ("on_cpu_ns",)

    def __init__(self, tid: int) -> None:
        self._clock = (
            ~tid << 3
        ) | 6  # CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED, as clock_getcpuclockid(3) makes it

    def read(self) -> tuple[float, ...]:
        return (float(time.clock_gettime_ns(self._clock)),)


class GroupStat:
    """Throttling by the CPU quota of the control group that the process is in at the moment.

    A process may be moved: what the groups said is joined, so that the counter goes on from where it was.
    """

    names = ("throttled_ns", "throttled_count")

    def __init__(self, root: Path, reads: "Reads | None" = None) -> None:
        self._root, self._reads = root, reads or slurp
        self._joined = root / "proc/self/cgroup"
        self._membership: bytes | None = None
        self._path: Path | None = None
        self._before = (0.0, 0.0)  # to add to what the present group says
        self._last = (0.0, 0.0)

    def read(self) -> tuple[float, ...]:
        membership = self._reads(self._joined)
        moved = membership != self._membership
        if moved:
            self._path = (
                group_of(membership, slurp(self._root / "proc/self/mountinfo"), self._root) / "cpu.stat"
            )
        now = cpu_stat(self._reads(self._path))
        if moved and self._membership is not None:
            self._before = (self._last[0] - now[0], self._last[1] - now[1])
        self._membership = membership
        self._last = (self._before[0] + now[0], self._before[1] + now[1])
        return self._last


def sources(tid: int, cpu: int | None, root: Path = Path("/"), reads: "Reads | None" = None) -> list[Source]:
    """All there may be for a thread of this process; `cpu` is where it is pinned, None if it is not.

    `reads`: of the thread's and its group's files, `slurp` where it is not given.
    """
    task = root / "proc/self/task" / str(tid)
    found: list[Source] = [
        TextFile(task / "schedstat", ("run_delay_ns",), lambda text: schedstat(text)[1:], reads)
    ]
    if root == Path("/") and _has_clock(tid):
        found.append(ThreadClock(tid))
    else:
        found.append(TextFile(task / "schedstat", ("on_cpu_ns",), lambda text: schedstat(text)[:1]))
    found += [
        TextFile(task / "status", ("nonvoluntary_switches",), status),
        TextFile(task / "stat", ("minor_faults", "major_faults"), task_stat),
        TextFile(
            root / "proc/stat",
            ("steal_ns", "irq_ns", "softirq_ns", "interrupts"),
            lambda text: machine_stat(text, cpu),
        ),
        GroupStat(root, reads),
        TextFile(root / "proc/pressure/cpu", ("psi_cpu_us",), pressure),
    ]
    if cpu is not None:
        at = root / f"sys/devices/system/cpu/cpu{cpu}"
        found.append(TextFile(at / "cpufreq/scaling_cur_freq", ("cpu_khz",), lambda text: (float(text),)))
        heat = at / "thermal_throttle/core_throttle_total_time_ms"
        found.append(TextFile(heat, ("core_throttled_ns",), lambda text: (int(text) * 1e6,)))
    return found


def slurp(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 1 << 18):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


class Held:
    """`slurp` of files of the kernel that stay open, whose reading is one call: 2 us of processor time, not 14.

    One that went away, as the group that a process has left, is opened anew once.  Not to be shared between threads.
    """

    MOST = 1 << 12

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}

    def __call__(self, path: Path) -> bytes:
        if path in self._fds:
            try:
                return self._whole(self._fds[path])
            except OSError:
                os.close(self._fds.pop(path))
        self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._whole(self._fds[path])

    def _whole(self, fd: int) -> bytes:
        text = part = os.pread(fd, self.MOST, 0)
        while len(part) == self.MOST:
            part = os.pread(fd, self.MOST, len(text))
            text += part
        return text

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


Reads = Callable[[Path], bytes]


def schedstat(text: bytes) -> tuple[float, float]:
    """ns on a CPU and ns runnable without one."""
    on_cpu, run_delay, _ = text.split()
    return float(int(on_cpu)), float(int(run_delay))


def status(text: bytes) -> tuple[float]:
    key = b"nonvoluntary_ctxt_switches:"
    return (float(int(text[text.index(key) + len(key) :].split(maxsplit=1)[0])),)


def task_stat(text: bytes) -> tuple[float, float]:
    """minflt and majflt, fields 10 and 12 of proc_pid_stat(5), counted behind the name, which may hold anything."""
    fields = text[text.rindex(b")") + 1 :].split()
    return float(int(fields[7])), float(int(fields[9]))


def machine_stat(text: bytes, cpu: int | None) -> tuple[float, float, float, float]:
    """steal, irq and softirq of a CPU or of all, in ns, and interrupts of all, by proc_stat(5)."""
    lines = {line[: line.find(b" ")]: line for line in text.splitlines()}
    fields = lines[b"cpu" if cpu is None else b"cpu%d" % cpu].split()
    irq, softirq, steal = (int(fields[i]) * 1e9 / TICKS_PER_S for i in (6, 7, 8))
    return steal, irq, softirq, float(int(lines[b"intr"].split(maxsplit=2)[1]))


def pressure(text: bytes) -> tuple[float]:
    """us in which somebody waited; ValueError where the file does not say."""
    some = text[text.index(b"some ") :].partition(b"\n")[0]
    return (float(int(some[some.rindex(b"total=") + 6 :])),)


def cpu_stat(text: bytes) -> tuple[float, float]:
    """ns and count of throttles: throttled_usec in version 2 of control groups, throttled_time in ns in version 1."""
    times, taken = _THROTTLES.search(text), _THROTTLED.search(text)
    if times is None or taken is None:
        raise ValueError("cpu.stat without throttling: this group cannot have a quota")
    return int(taken[2]) * (1e3 if taken[1] == b"usec" else 1.0), float(int(times[1]))


def group_of(membership: bytes, mountinfo: bytes, root: Path = Path("/")) -> Path:
    """Folder of the group whose quota holds, from /proc/self/cgroup and /proc/self/mountinfo (cgroups(7)).

    The cpu controller of version 1 if it is mounted, otherwise version 2.
    Raises: ValueError if there is neither.
    """
    groups = {}
    for line in membership.decode().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):
            groups["cgroup" if controllers else "cgroup2"] = path
    for kind in ("cgroup", "cgroup2"):
        for line in mountinfo.decode().splitlines():
            mount, _, filesystem = line.partition(" - ")
            fields, (fstype, _, options) = mount.split(), filesystem.split(maxsplit=2)
            if fstype != kind or kind not in groups:
                continue
            if kind == "cgroup" and "cpu" not in options.split(","):
                continue
            inside = os.path.relpath(groups[kind], fields[3])  # a container mounts its own group as the root
            if inside.startswith("..") or groups[kind].startswith(
                "/.."
            ):  # of another namespace: not visible here
                inside = "."
            return root / fields[4].lstrip("/") / inside
    raise ValueError("no cpu controller of control groups is mounted")


def _has_clock(tid: int) -> bool:
    try:
        time.clock_gettime_ns((~tid << 3) | 6)
    except OSError:
        return False
    return True
