"""Where a measurement ran: processor, clock, versions; and the state of the process while it runs."""

import contextlib
import gc
import os
import platform
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sigma_train.processor import processor_name

from sigma_kernels import _C
from sigma_noise.loops import ClockCost

CLOCK_SOURCE = "sys/devices/system/clocksource/clocksource0/current_clocksource"
FAST_CLOCKS = ("tsc", "arch_sys_counter")  # read without a system call


def described(cost: ClockCost, cpu: int | None) -> dict[str, Any]:
    """What the file says of a rank that is pinned to `cpu`, as JSON; None for what this system does not tell."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "local_rank": local_rank(),
        "clock": {
            "name": "CLOCK_MONOTONIC",
            "identity": clock_identity(),
            "source": clock_source(),
            "cost": asdict(cost),
            "wall_minus_monotonic_ns": time.time_ns() - time.monotonic_ns(),
        },
        "cpu": {
            "model": processor_name(),
            "count": os.cpu_count(),
            "pinned": cpu,
            "governor": governor(cpu),
            "isa": _C.isa(),
        },
        "versions": {
            "sigma_kernels": version("sigma-kernels"),
            "python": platform.python_version(),
            "numpy": version("numpy"),
            "torch": version("torch"),
            "system": f"{platform.system()} {platform.release()}",
        },
    }


def clock_identity() -> str:
    """Ranks of which this is the same read the same clock: of one boot, in one namespace of time."""
    boot = _read(Path("/proc/sys/kernel/random/boot_id")) or socket.gethostname()
    try:
        return f"{boot} {os.readlink('/proc/self/ns/time')}"
    except OSError:  # a kernel that has no such namespaces
        return boot


def clock_source(root: Path = Path("/")) -> str | None:
    return _read(root / CLOCK_SOURCE)


def governor(cpu: int | None, root: Path = Path("/")) -> str | None:
    """Of the frequency of `cpu`, or of the first CPU that this process may use."""
    at = min(os.sched_getaffinity(0)) if cpu is None else cpu
    return _read(root / f"sys/devices/system/cpu/cpu{at}/cpufreq/scaling_governor")


def local_rank() -> int:
    """Among the ranks of this host, as torchrun numbers them."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def cpu_of(cpus: tuple[int, ...]) -> int | None:
    """That of `cpus` which is the local rank's, in turn; none of none.

    Raises: ValueError for a CPU that this process may not use.
    """
    allowed = os.sched_getaffinity(0)
    if missing := sorted(set(cpus) - allowed):
        raise ValueError(
            f"pin must be of the CPUs that this process may use, {', '.join(map(str, sorted(allowed)))}, "
            f"found {missing[0]}"
        )
    return cpus[local_rank() % len(cpus)] if cpus else None


@contextlib.contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """This thread on that CPU, or where it likes."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if cpu is None else {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Python's collector neither runs nor looks at what is there already; afterwards all is as it was."""
    was_enabled, was_frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
