"""The native loops: every stamp in order, the work that was asked for, and what a disturbed loop says of it.

Nothing here asserts how long anything takes: a machine may be as noisy as it likes.
"""

import os
import signal
import threading
import time
from itertools import pairwise
from typing import BinaryIO

import numpy as np
import pytest
from sigma_noise import loops
from sigma_noise.work import reserved, work

from sigma_kernels import _C

SMALL = {"spin": {}, "copy": {"bytes": 10_000, "slice": 1000}, "gemm": {"R": 5, "N": 7, "K": 9},
         "grouped": {"R": 20, "E": 6, "N": 7, "K": 9}}  # fmt: skip
every_kernel = pytest.mark.parametrize("kernel", SMALL)


def stepped(state: int, steps: int) -> int:
    """The state of spin after so many steps x -> a x + c mod 2^64, by squaring the map."""
    a, c = 6364136223846793005, 1442695040888963407
    scale, shift = 1, 0
    while steps:
        if steps & 1:
            scale, shift = scale * a, shift * a + c
        a, c = a * a % 2**64, c * (a + 1) % 2**64
        steps >>= 1
    return (scale * state + shift) % 2**64


def assert_in_order(series):
    """Quanta follow each other, and none ends before it begins."""
    assert (series.end_ns >= series.start_ns).all()
    assert (np.diff(series.start_ns) >= 0).all()
    assert series.start_ns.dtype == series.end_ns.dtype == np.int64


@every_kernel
def test_quanta_share_their_edges_and_lie_within_the_call(kernel):
    """Defends: time between two quanta that belongs to neither, stamps of another clock, quanta begun too late."""
    before = time.monotonic_ns()
    series = loops.fixed_work(kernel, quantum_s=2e-3, duration_s=0.02, **SMALL[kernel])
    after = time.monotonic_ns()
    assert_in_order(series)
    assert len(series) >= 1
    assert (series.end_ns[:-1] == series.start_ns[1:]).all()
    assert before <= series.start_ns[0]
    assert series.end_ns[-1] <= after
    assert series.end_ns[-1] - series.start_ns[0] >= 0.02e9, "it ended before its time was over"
    assert (series.start_ns < series.start_ns[0] + 0.02e9).all(), "a quantum began after the deadline"
    assert (series.value == 1).all()


def test_spin_makes_every_step():
    """Defends: steps that the compiler folds or drops, which would make a quantum shorter than it says."""
    made = work("spin", seed=3)
    first = made.checksum()
    made.native.steps = 1237
    assert len(loops.time_quanta(made, 41)) == 41
    assert made.checksum() == stepped(first, 41 * 1237)


def test_copy_moves_its_slices():
    made = work("copy", bytes=10_500, slice=1000)  # ten whole slices
    made.native.steps = 4
    loops.time_quanta(made, 2)
    (source,) = made.inputs
    assert len(source) == 10_000
    assert (made.output[:8000] == source[:8000]).all()
    assert not made.output[8000:].any()
    loops.time_quanta(made, 1)
    assert (made.output == source).all()
    assert np.abs(source.view(np.float32).std() - 1) < 0.1, "not normal values"


@pytest.mark.parametrize("kernel", ["gemm", "grouped"])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_are_those_of_their_inputs(kernel, threads):
    made = work(kernel, seed=1, threads=threads, **SMALL[kernel])
    loops.time_quanta(made, 3)
    offsets, x, weight = made.inputs
    assert offsets[-1] == len(x) == sum(made.tokens_of_expert)
    for e, (begin, end) in enumerate(pairwise(offsets)):
        want = x[begin:end].astype(np.float64) @ weight[e].T.astype(np.float64)
        np.testing.assert_allclose(made.output[begin:end], want, rtol=1e-5, atol=1e-5)


@every_kernel
def test_one_seed_is_one_work(kernel):
    """Defends: values, or a histogram of experts, that differ between two measurements that are compared."""

    def result(seed):
        made = work(kernel, seed=seed, **SMALL[kernel])
        loops.time_quanta(made, 20)
        return made.checksum(), made.tokens_of_expert

    assert result(5) == result(5)
    assert result(5)[0] != result(6)[0]


def test_fixed_time_is_on_its_grid_and_counts_each_chunk(monkeypatch):
    """Defends: a grid that drifts with the work, chunks lost at a boundary."""
    made = work("spin", seed=2)
    first = made.checksum()
    made.native.steps = 50
    chunk, asked, native = loops.Calibration(50, 0.0), [], _C.noise.FixedTime
    monkeypatch.setattr(_C.noise, "FixedTime", lambda *args: (asked.extend(args), native(*args))[1])
    series, info = loops.run_fixed_time(made, chunk, 1e-3, 0.03)
    assert len(series) == 30
    assert (np.diff(series.start_ns) == 1_000_000).all()
    assert (series.end_ns - series.start_ns == 1_000_000).all()
    assert series.start_ns[0] == asked[0]
    assert series.start_ns[0] % 1_000_000 == 0
    assert info.skipped == np.count_nonzero(series.value == 0)
    assert 0 <= info.median_late_s <= info.longest_late_s
    # One chunk more: that which ended after the last boundary.
    assert made.checksum() == stepped(first, 50 * (int(series.value.sum()) + 1))


def test_a_chunk_of_many_quanta_leaves_them_empty():
    made = work("spin")
    made.native.steps = 1
    least = loops.calibrate(made, 5e-3)
    series, info = loops.run_fixed_time(made, least, 1e-3, 0.02)
    assert info.skipped == np.count_nonzero(series.value == 0) >= 10
    assert series.value.max() <= 1
    assert info.longest_late_s >= 0


@pytest.mark.parametrize("quantum_s, steps", [(1e-6, 500), (1e-3, 500_000), (0.2, 100_000_000), (3e-9, 2)])
def test_calibration_finds_the_steps(monkeypatch, quantum_s, steps):
    """Defends: steps extrapolated from a quantum too short to be timed; the last power of two taken for the answer."""
    timed = []

    def least_s(made, steps):
        timed.append(steps)
        return steps * 2e-9

    monkeypatch.setattr(loops, "_least_s", least_s)
    made = work("spin")
    found = loops.calibrate(made, quantum_s)
    assert found.steps == made.native.steps == pytest.approx(steps, abs=1)
    assert found.quantum_s == pytest.approx(found.steps * 2e-9)
    assert max(timed) * 2e-9 < 4 * min(quantum_s, loops.LONG_ENOUGH_S), (
        "calibrating takes longer than it must"
    )


def test_a_step_longer_than_the_quantum_is_one_step_or_refused(monkeypatch):
    monkeypatch.setattr(loops, "_least_s", lambda made, steps: steps * 1e-3)
    made = work("gemm")
    with pytest.raises(ValueError, match=r"a step of gemm, which takes 0.001 s .* found 0.0005"):
        loops.calibrate(made, 5e-4)
    assert loops.calibrate(made, 5e-4, is_least=False) == loops.Calibration(1, 1e-3)


def test_the_clock_costs_something():
    cost = loops.clock_cost()
    assert 0 < cost.step_s <= cost.median_s < 1e-3
    assert 0 <= cost.least_s <= cost.median_s
    assert cost.resolution_s == time.clock_getres(time.CLOCK_MONOTONIC)


def in_a_child(function) -> tuple[int, BinaryIO]:
    """Its process and what it will write: the stamps of the series that `function` returns there."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        try:
            series = function()
            with open(writing, "wb") as file:
                file.write(np.stack([series.start_ns, series.end_ns]).tobytes())
        finally:
            os._exit(0)
    os.close(writing)
    return pid, open(reading, "rb")


@pytest.mark.parametrize("loop", ["detours", "fixed_work"])
def test_stops_of_the_process_are_found_where_they_were(loop):
    """Defends: detours that are missed, or stamped elsewhere.  Each stop of 30 ms lies in one gap of this length."""
    pid, told = in_a_child(
        (lambda: loops.detours(duration_s=1.2, threshold_s=5e-3)[0])
        if loop == "detours"
        else (lambda: loops.fixed_work("spin", quantum_s=1e-3, duration_s=1.2))
    )
    truth = []
    for _ in range(8):
        time.sleep(0.1)
        begin = time.monotonic_ns()
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.03)
        end = time.monotonic_ns()
        os.kill(pid, signal.SIGCONT)
        truth.append((begin, end))
    with told:
        starts, ends = np.frombuffer(told.read(), np.int64).reshape(2, -1)
    assert os.waitpid(pid, 0)[1] == 0
    seen = [(begin, end) for begin, end in truth if starts[0] <= begin and end <= ends[-1]]
    assert len(seen) >= 4, "the loop saw too little of it"
    for begin, end in seen:
        overlap = np.minimum(ends, end) - np.maximum(starts, begin)
        assert overlap.max() >= 0.9 * (end - begin), (begin, end)


def test_a_full_ring_keeps_the_newest_and_says_what_is_lost():
    series, info = loops.detours(duration_s=0.02, threshold_s=0, capacity=64)
    assert len(series) == 64
    assert info.found == info.lost + 64
    assert info.lost > 0
    assert_in_order(series)
    assert (series.end_ns[:-1] <= series.start_ns[1:]).all()
    assert info.total_s <= info.observed_s
    np.testing.assert_allclose(series.value, series.seconds - info.least_gap_s, atol=1e-12)
    # Gaps of 0 ns are none, all others are detours: together they are all of the time.
    assert info.total_s == pytest.approx(info.observed_s, abs=1e-9)


def test_a_signal_is_answered_while_a_loop_runs():
    """Defends: a Ctrl-C that waits for the end of an hour's measurement."""

    class Halt(Exception):
        pass

    def halt(*_):
        raise Halt

    former = signal.signal(signal.SIGUSR1, halt)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(Halt):
            loops.detours(duration_s=200, threshold_s=1)
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, former)
    assert signal.set_wakeup_fd(-1) == -1, "the loop left its file to signals"


def test_a_loop_goes_on_after_a_signal_that_stops_nothing():
    """Defends: a measurement cut short by somebody's timer, quanta lost or counted twice when it goes on."""
    seen = []
    former = signal.signal(signal.SIGALRM, lambda *_: seen.append(time.monotonic_ns()))
    made = work("spin", seed=8)
    first = made.checksum()
    calibrated = loops.calibrate(made, 1e-4)
    between = made.checksum()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        series = loops.time_quanta(made, 2000)
        signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert first != between
    assert len(series) == 2000
    assert (series.end_ns[:-1] == series.start_ns[1:]).all()
    assert made.checksum() == stepped(between, 2000 * calibrated.steps)
    inside = [t for t in seen if series.start_ns[0] <= t <= series.end_ns[-1]]
    assert inside, "handlers waited until the loop was over"


def test_a_loop_runs_in_another_thread():
    """Defends: signals handled where Python has no handlers; and the GIL, which the loop must not hold."""
    out = []
    thread = threading.Thread(target=lambda: out.append(loops.detours(duration_s=0.2, threshold_s=1e-6)[1]))
    thread.start()
    count = 0
    while thread.is_alive():
        count += 1
    thread.join()
    assert count > 100
    assert out[0].readings > 100


def test_reserved_memory_is_there():
    """Defends: a loop whose first touch of each page is a detour."""
    import resource

    n = 1 << 20
    stamps = reserved(n)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    _C.noise.read_clock(stamps.ctypes.data, n)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < n * 8 // 4096 // 10
    assert (np.diff(stamps) >= 0).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: work("gem"), "kernel must be one of spin, copy, gemm, grouped, found 'gem'"),
        (lambda: work("spin", R=3), "spin takes no sizes, found 'R'"),
        (lambda: work("gemm", E=3), "gemm takes R, N, K, threads, found 'E'"),
        (lambda: work("gemm", R=0), "R of gemm must be a whole number of at least 1, found 0"),
        (lambda: work("copy", bytes=10, slice=11), r"slice of copy must be at most bytes \(10\), found 11"),
        (lambda: loops.fixed_work("spin", quantum_s=0, duration_s=1), "quantum_s must be seconds above 0"),
        (lambda: loops.fixed_work("spin", quantum_s=1e-8, duration_s=1), "quantum_s must be at least 1e-07"),
        (lambda: loops.fixed_work("spin", quantum_s=1e-3, duration_s=float("inf")), "duration_s must be"),
        (lambda: loops.fixed_work("spin", quantum_s=1e-6, duration_s=1e4), "duration_s must be at most 16.8"),
        (
            lambda: loops.fixed_work("gemm", quantum_s=1e-6, duration_s=1, R=512, N=512, K=512),
            "quantum_s must be at least a step of gemm, .* with R=512, N=512, K=512, threads=1, found 1e-06",
        ),
        (lambda: loops.fixed_time("spin", quantum_s=1, duration_s=1, chunks=0), "chunks must be at least 1"),
        (lambda: loops.detours(duration_s=-1, threshold_s=1), "duration_s must be seconds above 0, found -1"),
        (lambda: loops.detours(duration_s=1, threshold_s=float("nan")), "threshold_s must be seconds"),
        (lambda: loops.detours(duration_s=1, threshold_s=1, capacity=0), "capacity must lie in 1.."),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
