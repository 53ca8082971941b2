"""Fixed work, fixed time and detours on this CPU, by the native loops of csrc/noise.

Stamps are ns of CLOCK_MONOTONIC.  The loops hold no GIL, allocate nothing and write into memory that is there; a
signal ends them for as long as its handler takes, and they go on unless it raises.
"""

import contextlib
import math
import mmap
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from sigma_kernels import _C
from sigma_noise.trace import Series
from sigma_noise.work import Work, reserved, work

now_ns = _C.noise.now_ns
EVER_NS = 1 << 61
MOST_QUANTA = 1 << 24  # of one loop
ROOM = (
    3  # times the quanta that are to be expected: so much faster a machine may become once it is calibrated
)
TRIES = 7  # quanta whose least is taken for what the work takes undisturbed
LONG_ENOUGH_S = 5e-3  # of a quantum, for its steps to be counted by it
CHUNKS = 1000  # of a quantum of fixed time, so that one is 0.1 % of it


@dataclass(frozen=True)
class Calibration:
    """How many steps make a quantum, and how long they took at least."""

    steps: int
    quantum_s: float


@dataclass(frozen=True)
class ClockCost:
    """What reading the clock costs, and the least by which two readings differ that differ."""

    least_s: float
    median_s: float
    step_s: float
    resolution_s: float  # as the system says


@dataclass(frozen=True)
class FixedTimeInfo:
    """`skipped`: quanta within which no chunk ended.  `late_s`: from a boundary to the first reading after it."""

    chunk: Calibration
    skipped: int
    median_late_s: float
    longest_late_s: float


@dataclass(frozen=True)
class DetourInfo:
    """`lost`: detours that the ring had no room for, the oldest.  `total_s` is of all that were found.

    Whether two measurements compare depends on `threshold_s`.
    """

    threshold_s: float
    found: int
    lost: int
    total_s: float
    observed_s: float
    least_gap_s: float
    readings: int


def fixed_work(kernel: str, *, quantum_s: float, duration_s: float, seed: int = 0, **sizes: int) -> Series:
    """Quanta of the same work for `duration_s`, one after another without a gap; value 1 each.

    Args:    kernel: spin, copy, gemm or grouped; its sizes as `sigma_noise.work` names them.
    Raises:  ValueError for wrong arguments, a quantum shorter than one step, or more than MOST_QUANTA quanta;
             RuntimeError if the machine turns out ROOM times as fast as when the work was calibrated.
    """
    check_quanta(quantum_s, duration_s)
    made = work(kernel, seed=seed, **sizes)
    calibrate(made, quantum_s)
    return run_fixed_work(made, quantum_s=quantum_s, duration_s=duration_s)


def fixed_time(
    kernel: str, *, quantum_s: float, duration_s: float, chunks: int = CHUNKS, seed: int = 0, **sizes: int
) -> tuple[Series, FixedTimeInfo]:
    """How many chunks of work ended in each quantum of a grid of absolute times; their number is the value.

    A chunk is meant to be a `chunks`-th of a quantum, and is counted where it ends.  A kernel whose step is longer
    than that makes fewer.
    Raises: ValueError for wrong arguments or more than MOST_QUANTA quanta.
    """
    check_quanta(quantum_s, duration_s)
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, found {chunks}")
    made = work(kernel, seed=seed, **sizes)
    return run_fixed_time(made, calibrate(made, quantum_s / chunks, is_least=False), quantum_s, duration_s)


def run_fixed_work(made: Work, *, quantum_s: float, duration_s: float) -> Series:
    """As `fixed_work`, of work that is calibrated."""
    capacity, duration_ns = ROOM * math.ceil(duration_s / quantum_s) + 16, round(duration_s * 1e9)
    series = time_quanta(made, capacity, duration_ns)
    if len(series) == capacity and series.end_ns[-1] - series.start_ns[0] < duration_ns:
        raise RuntimeError(
            f"{made.kernel}: {capacity} quanta were over after "
            f"{(series.end_ns[-1] - series.start_ns[0]) * 1e-9:.3g} of {duration_s:g} s: the machine is {ROOM} times "
            "as fast as when the work was calibrated; measure again"
        )
    return series


def time_quanta(made: Work, quanta: int, duration_ns: int = EVER_NS) -> Series:
    """So many quanta, or fewer where one ends when the time is over."""
    edges = reserved(quanta + 1)
    state = _C.noise.FixedWork(quanta, edges.ctypes.data)
    _through_signals(partial(_C.noise.fixed_work, made.native, state, duration_ns))
    n = state.done
    return Series(edges[:n], edges[1 : n + 1], np.ones(n))


def run_fixed_time(
    made: Work, chunk: Calibration, quantum_s: float, duration_s: float
) -> tuple[Series, FixedTimeInfo]:
    """As `fixed_time`, of chunks that are calibrated.  The grid begins at a multiple of the quantum."""
    quanta, quantum_ns = math.ceil(duration_s / quantum_s), round(quantum_s * 1e9)
    stamps, counts = reserved(quanta), reserved(quanta)
    begin_ns = (_C.noise.now_ns() // quantum_ns + 2) * quantum_ns
    state = _C.noise.FixedTime(begin_ns, quantum_ns, quanta, stamps.ctypes.data, counts.ctypes.data)
    _through_signals(partial(_C.noise.fixed_time, made.native, state))
    start_ns = begin_ns + quantum_ns * np.arange(quanta)
    late_s = (stamps - start_ns - quantum_ns) * 1e-9
    info = FixedTimeInfo(chunk, state.skipped, float(np.median(late_s)), float(late_s.max()))
    return Series(start_ns, start_ns + quantum_ns, counts.astype(np.float64)), info


def detours(*, duration_s: float, threshold_s: float, capacity: int = 1 << 20) -> tuple[Series, DetourInfo]:
    """Gaps above the threshold between readings of the clock; value: seconds above the least gap.

    Raises: ValueError for a duration, threshold or capacity that is none.
    """
    check_seconds("duration_s", duration_s)
    if not 0 <= threshold_s < math.inf:
        raise ValueError(f"threshold_s must be seconds of at least 0, found {threshold_s}")
    if not 1 <= capacity <= MOST_QUANTA:
        raise ValueError(f"capacity must lie in 1..{MOST_QUANTA}, found {capacity}")
    begin, end = reserved(capacity), reserved(capacity)
    state = _C.noise.Detours(round(threshold_s * 1e9), capacity, begin.ctypes.data, end.ctypes.data)
    _through_signals(partial(_C.noise.detours, state, round(duration_s * 1e9)))
    kept = np.arange(max(0, state.found - capacity), state.found) % capacity
    start_ns, end_ns = begin[kept], end[kept]
    info = DetourInfo(
        threshold_s=threshold_s,
        found=state.found,
        lost=state.found - len(kept),
        total_s=state.total_ns * 1e-9,
        observed_s=(state.last_ns - state.first_ns) * 1e-9,
        least_gap_s=state.least_ns * 1e-9,
        readings=state.readings,
    )
    return Series(start_ns, end_ns, (end_ns - start_ns - state.least_ns) * 1e-9), info


def calibrate(made: Work, quantum_s: float, *, is_least: bool = True) -> Calibration:
    """Set the steps of a quantum so that it takes `quantum_s` where nothing disturbs it.

    Raises: ValueError if one step takes longer than that by half; unless `is_least` is false, then one step it is.
    """
    native, steps = made.native, 1
    while True:
        least_s = _least_s(made, steps)
        if least_s >= min(quantum_s, LONG_ENOUGH_S):
            break
        steps *= 2
    if steps == 1 and is_least and least_s > 1.5 * quantum_s:
        raise ValueError(
            f"quantum_s must be at least a step of {made.kernel}, which takes {least_s:.3g} s here with "
            f"{', '.join(f'{k}={v}' for k, v in made.sizes.items())}, found {quantum_s:g}"
        )
    native.steps = max(1, round(steps * quantum_s / least_s))
    return Calibration(native.steps, least_s * native.steps / steps)


def clock_cost(readings: int = 100_000) -> ClockCost:
    """Of CLOCK_MONOTONIC, read from native code."""
    stamps = reserved(readings)
    _C.noise.read_clock(stamps.ctypes.data, readings)
    gaps = np.diff(stamps)
    return ClockCost(
        least_s=float(gaps.min()) * 1e-9,
        median_s=float(np.median(gaps)) * 1e-9,
        step_s=float(np.gcd.reduce(gaps)) * 1e-9,
        resolution_s=time.clock_getres(time.CLOCK_MONOTONIC),
    )


def check_quanta(quantum_s: float, duration_s: float) -> None:
    """Raises: ValueError, by name."""
    check_seconds("quantum_s", quantum_s)
    check_seconds("duration_s", duration_s)
    if quantum_s < 1e-7:
        raise ValueError(
            f"quantum_s must be at least 1e-07, where reading the clock is all, found {quantum_s:g}"
        )
    if duration_s / quantum_s > MOST_QUANTA:
        raise ValueError(
            f"duration_s must be at most {MOST_QUANTA * quantum_s:.3g} with quanta of {quantum_s:g} s, whose "
            f"stamps then take {ROOM * MOST_QUANTA * 8 >> 20} MiB, found {duration_s:g}"
        )


def check_seconds(name: str, seconds: float) -> None:
    """Raises: ValueError, by name."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name} must be seconds above 0, found {seconds}")


def _least_s(made: Work, steps: int) -> float:
    made.native.steps = steps
    return float(time_quanta(made, TRIES).seconds.min())


def _through_signals(loop: Callable[[int], None]) -> None:
    """Run a native loop that ends early where a byte is set, and again until none was.

    Python acts on a signal between two steps of its own, which a native loop has none of.  The handler that it
    installs writes the signal's number to a file in any case, and that file may be memory which the loop reads:
    no thread, no system call.  Off the main thread no signal is handled, so there is nothing to heed.
    """
    with contextlib.ExitStack() as stack:
        file = os.memfd_create("sigma_noise_signals")
        stack.callback(os.close, file)
        os.ftruncate(file, mmap.PAGESIZE)
        os.set_blocking(file, False)
        flag = np.frombuffer(mmap.mmap(file, mmap.PAGESIZE), np.uint8)
        with contextlib.suppress(ValueError):
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(file, warn_on_full_buffer=False))
        while True:
            loop(flag.ctypes.data)
            if not flag[0]:
                return
            os.lseek(file, 0, os.SEEK_SET)
            flag[0] = 0
