"""Is this machine fit to be measured?  Each check says so in a sentence, and what to do where it is not."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sigma_train.errors import WrongInput

from sigma_noise import host
from sigma_noise.accelerators import find
from sigma_noise.counters import group_of, machine_stat, pressure, slurp
from sigma_noise.loops import clock_cost, detours
from sigma_noise.plain import plain

CLOCK_READ_S = 200e-9  # above this a reading is a system call, or an emulated clock
BASELINE = 0.2  # noise share above which injected disturbances drown (study of a two-core guest)
STEAL = 0.02
LOAD = 0.5  # CPUs that others use, as a share of all
PAGES = 2048
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Check:
    """`fit` is None for what is told but not judged; `value` is in base units, None where it could not be read."""

    name: str
    fit: bool | None
    value: float | str | None
    sentence: str
    remedy: str = ""


def examine(*, cpu: int | None = None, seconds: float = 2.0, root: Path = Path("/")) -> list[Check]:
    """All checks; the baseline noise takes `seconds`, on `cpu` if that is given.

    Steal is counted meanwhile, and while the load is looked at.  Raises: WrongInput for seconds that are none.
    """
    if not seconds > 0:
        raise WrongInput(f"--duration must be seconds above 0, found {seconds:g}")
    found = [clock_source(root), clock_read(), isolation(cpu, root), governor(cpu, root), quota(root)]
    began_ns, before = time.monotonic_ns(), _steal_ns(cpu, root)
    found.append(load(root))
    found.append(baseline(seconds, cpu))
    after, counted_s = _steal_ns(cpu, root), (time.monotonic_ns() - began_ns) * 1e-9
    found.append(steal(before, after, counted_s, _cpus() if cpu is None else 1))
    devices, absent = find()
    names = ", ".join(d.name for d in devices)
    why = "; ".join(f"{library}: {reason}" for library, reason in absent.items())
    found.append(Check("accelerators", None, names or None, f"{names or 'none'}{f' ({why})' if why else ''}"))
    return found


def is_fit(checks: list[Check]) -> bool:
    return all(check.fit is not False for check in checks)


def to_json(checks: list[Check]) -> dict[str, Any]:
    """`doctor.schema.json` says what is in it."""
    return {"schema_version": SCHEMA_VERSION, "fit": is_fit(checks), "checks": plain(checks)}


def clock_source(root: Path = Path("/")) -> Check:
    source = host.clock_source(root)
    if source is None:
        return Check("clock source", None, None, "not readable")
    if source in host.FAST_CLOCKS:
        return Check("clock source", True, source, f"{source}, read in user space")
    return Check(
        "clock source",
        False,
        source,
        f"{source}, whose every reading is a call into the kernel or the hypervisor",
        f"boot with clocksource=tsc, or write tsc to {root / host.CLOCK_SOURCE} if it is among available_clocksource",
    )


def clock_read() -> Check:
    cost = clock_cost()
    told = f"a reading takes {cost.median_s * 1e9:.0f} ns, {cost.least_s * 1e9:.0f} ns at best"
    if cost.median_s <= CLOCK_READ_S:
        return Check("clock reading", True, cost.median_s, told)
    remedy = "use the clock source tsc, and measure outside of emulators and sandboxes that trap the clock"
    return Check("clock reading", False, cost.median_s, told, remedy)


def isolation(cpu: int | None, root: Path = Path("/")) -> Check:
    """Told, not judged: without isolation noise is what the machine has, which may be what is asked for."""
    try:
        isolated = (root / "sys/devices/system/cpu/isolated").read_text().strip()
    except OSError as error:
        return Check("isolation", None, None, f"not readable: {error.strerror}")
    if cpu is not None and cpu in cpu_list(isolated):
        return Check("isolation", None, isolated, f"CPU {cpu} is isolated from the scheduler's balancing")
    of = "no CPU is" if not isolated else f"only {isolated} are"
    return Check(
        "isolation", None, isolated, f"{of} isolated", "boot with isolcpus=managed_irq,domain,N and pin to N"
    )


def governor(cpu: int | None, root: Path = Path("/")) -> Check:
    name = host.governor(cpu, root)
    if name is None:
        return Check("frequency governor", None, None, "the system does not show one, as in most guests")
    if name == "performance":
        return Check("frequency governor", True, name, name)
    return Check(
        "frequency governor",
        False,
        name,
        f"{name}: the clock follows the load, so that work after a pause is slow",
        "cpupower frequency-set -g performance",
    )


def quota(root: Path = Path("/")) -> Check:
    """A quota in the group of this process or in one above it."""
    try:
        group = group_of(slurp(root / "proc/self/cgroup"), slurp(root / "proc/self/mountinfo"), root)
    except (OSError, ValueError) as error:
        return Check("CPU quota", None, None, f"not readable: {error}")
    for folder in (group, *group.parents):
        cpus = _cpus_of_quota(folder)
        if cpus is not None:
            remedy = "lift the quota (no CPU limit in the pod), or take whole CPUs by a cpuset"
            return Check("CPU quota", False, cpus, f"{cpus:g} CPUs by {folder}: used up, it stops us", remedy)
    return Check("CPU quota", True, None, "none")


def load(root: Path = Path("/"), wait: Callable[[float], None] = time.sleep) -> Check:
    """What others run, from the pressure and the run queue, before we add to it."""
    try:
        running = float((root / "proc/loadavg").read_text().split()[3].split("/")[0]) - 1  # less us
        before = pressure(slurp(root / "proc/pressure/cpu"))[0]
    except (OSError, ValueError, IndexError) as error:
        return Check("load", None, None, f"not readable: {error}")
    wait(0.5)
    waiting = (pressure(slurp(root / "proc/pressure/cpu"))[0] - before) * 1e-6 / 0.5
    cpus = _cpus()
    told = f"{running:.0f} others running on {cpus} CPUs, somebody waited {waiting:.0%} of half a second"
    if running <= LOAD * cpus:
        return Check("load", True, running, told)
    return Check("load", False, running, told, "stop what else runs here, or wait until it has ended")


def steal(before_ns: float | None, after_ns: float | None, seconds: float, cpus: int) -> Check:
    """Of `cpus` in the `seconds` between two readings of what was taken from them together."""
    if before_ns is None or after_ns is None:
        return Check("steal", None, None, "not readable")
    share = (after_ns - before_ns) * 1e-9 / seconds / cpus
    told = f"the hypervisor took {share:.1%} of the time"
    if share <= STEAL:
        return Check("steal", True, share, told)
    return Check("steal", False, share, told, "ask for dedicated CPUs, or measure on another host")


def baseline(seconds: float, cpu: int | None) -> Check:
    share = baseline_noise(seconds, cpu)
    told = f"{share:.1%} of {seconds:g} s is lost to gaps above 1 us" + (
        "" if cpu is None else f", on CPU {cpu}"
    )
    if share <= BASELINE:
        return Check("baseline noise", True, share, told)
    remedy = "find who takes it: sigma noise run --attribute; then stop it, pin, or isolate a CPU"
    return Check("baseline noise", False, share, told, remedy)


def baseline_noise(seconds: float, cpu: int | None = None) -> float:
    """Share of time lost to gaps above 1 us, in a loop that does nothing."""
    before = os.sched_getaffinity(0)
    try:
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        _, info = detours(duration_s=seconds, threshold_s=1e-6)
    finally:
        os.sched_setaffinity(0, before)
    return info.total_s / info.observed_s


def fault_cost_s() -> float:
    """Seconds for a minor fault: fresh anonymous pages, touched one by one; the median of five rounds."""
    rounds = []
    for _ in range(5):
        with mmap.mmap(-1, PAGES * mmap.PAGESIZE) as memory:
            if hasattr(memory, "madvise") and hasattr(mmap, "MADV_NOHUGEPAGE"):
                memory.madvise(mmap.MADV_NOHUGEPAGE)
            page = (ctypes.c_char * len(memory)).from_buffer(memory)
            touched = np.frombuffer(page, np.uint8)[:: mmap.PAGESIZE]
            begin = time.thread_time_ns()
            touched[:] = 1
            rounds.append((time.thread_time_ns() - begin) / PAGES)
            del touched, page
    return float(np.median(rounds)) * 1e-9


def cpu_list(text: str) -> set[int]:
    """CPUs of a list as the kernel writes it, 0-3,8."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        found |= set(range(int(low), int(high or low) + 1))
    return found


def _cpus_of_quota(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
            return None if limit == "max" else int(limit) / int(period)
        limit = (folder / "cpu.cfs_quota_us").read_text()
        return None if int(limit) < 0 else int(limit) / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None


def _steal_ns(cpu: int | None, root: Path) -> float | None:
    try:
        return machine_stat(slurp(root / "proc/stat"), cpu)[0]
    except (OSError, ValueError, IndexError, KeyError):
        return None


def _cpus() -> int:
    """Of the machine, as /proc/stat and /proc/loadavg count: this process may be allowed fewer."""
    return os.cpu_count() or 1
