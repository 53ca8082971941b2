"""Injected disturbances, measured and attributed on this machine.

Noise of others drowns what is injected: where more than 20 % of the time is lost before anything is injected, a test is
skipped with the measured share.  What was found is matched with the injector's log by overlap in time, never by count.
A test that fails is tried once more, as one burst of others may spoil a single try on a shared machine; code that is
wrong fails twice.  Where it is allowed (root), this session runs ahead of others while it measures; the injector is in
the same session, so the two share a CPU evenly.
"""

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from noise_gate import CPU, skip_if_unfit
from sigma_noise.attribution import STOPPED, Attribution, attribute
from sigma_noise.loops import detours, fixed_work
from sigma_noise.lost import Lost
from sigma_noise.sampler import Sampler
from sigma_noise.selftest import curve, injecting, limits, since
from sigma_noise.spans import match
from sigma_noise.trace import Series, read

AUTOGROUP = Path(
    "/proc/self/autogroup"
)  # sched(7): nice values count within a session, this between sessions
pytestmark = pytest.mark.live


@contextlib.contextmanager
def quiet_cpu() -> Iterator[None]:
    """Pinned, ahead of other sessions where that is allowed; skips where others take more than BASELINE."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {CPU})
    with contextlib.suppress(OSError):
        AUTOGROUP.write_text("-19")
    try:
        skip_if_unfit()
        yield
    finally:
        os.sched_setaffinity(0, before)
        with contextlib.suppress(OSError):
            AUTOGROUP.write_text("0")


@pytest.fixture(autouse=True)
def quiet_enough() -> Iterator[None]:
    with quiet_cpu():
        yield


def twice(check: Callable[[], None]) -> None:
    """Once more before it fails; a second failure is one."""
    try:
        check()
    except AssertionError as first:
        print(f"tried once more after: {str(first).splitlines()[:1]}")
        skip_if_unfit("to others after a try that failed")
        check()


class Measured:
    """Detours above 1 us of `duration_s` beside an injector, the counters, and the log of what was injected."""

    def __init__(self, folder: Path, cause: str, *options: str, duration_s: float) -> None:
        folder.mkdir(exist_ok=True)
        with injecting(folder / "truth.parquet", *options), Sampler(seed=1) as sampler:
            begin = time.monotonic_ns()
            self.found, self.info = detours(duration_s=duration_s, threshold_s=1e-6)
            end = time.monotonic_ns()
        self.sampler = sampler.info
        self.window = begin, end
        self.truth = since(read(folder / "truth.parquet").get(0, "event", cause), begin)
        self.lost = Lost(self.found.start_ns, self.found.end_ns, self.found.value, self.window)
        self.noise = self.info.total_s / self.info.observed_s
        counters = {n: s for (_, kind, n), s in sampler.rows(0).items() if kind == "counter"}
        self.attribution: Attribution = attribute(
            self.lost, counters, {}, unread=self.sampler["unread"], is_pinned=True
        )

    def longer_than(self, seconds: float) -> Series:
        live = self.found.seconds > seconds
        return Series(self.found.start_ns[live], self.found.end_ns[live], self.found.value[live])


def period_of(stamps_ns: np.ndarray) -> float:
    """Slope of the begins over their numbers on a grid of the median gap, by least squares; seconds."""
    gaps = np.diff(stamps_ns) * 1e-9
    numbers = np.concatenate([[0], np.cumsum(np.round(gaps / np.median(gaps)))])
    return float(np.polyfit(numbers, (stamps_ns - stamps_ns[0]) * 1e-9, 1)[0])


def test_stops_are_found_and_are_never_steal(tmp_path):
    """Defends: acceptance 17 and 21.  Detours missed, lengths and period wrong, a stop called steal."""

    def check() -> None:
        options = ["--target", "proc", "--pid", str(os.getpid()), "--length", "25ms", "--period", "200ms"]
        got = Measured(tmp_path / "m", "stop", *options, "--duration", "8s", duration_s=8.3)
        long = got.longer_than(12.5e-3)
        result = match(got.truth, long)
        hit = result.is_found
        print(
            f"noise {got.noise:.1%}; {len(got.truth)} stops, recall {result.recall:.3f}, precision "
            f"{result.precision:.3f}, mean {result.length_s[hit].mean() * 1e3:.2f} ms against "
            f"{got.truth.seconds.mean() * 1e3:.2f} ms; {got.attribution.sentence}"
        )
        assert len(got.truth) >= 35
        assert result.recall >= 0.95
        assert result.length_s[hit].mean() == pytest.approx(got.truth.seconds.mean(), rel=0.05)
        assert period_of(long.start_ns[result.is_true]) == pytest.approx(0.2, rel=0.01)
        found = got.attribution
        stopped_s = found.share(STOPPED) * found.lost_s
        assert found.named in (STOPPED, None)
        assert found.share("steal") < 0.1
        assert stopped_s == pytest.approx(got.truth.seconds.sum(), rel=0.15)
        assert found.share(STOPPED) + found.unknown.share > 0.6

    twice(check)


def test_a_busy_sibling_is_run_queue_wait(tmp_path):
    """Defends: acceptance 18.  Waiting for a CPU that is shared by two, called anything else."""

    def check() -> None:
        options = ["--target", "cpu", "--cpu", str(CPU), "--duration", "5s"]
        got = Measured(tmp_path / "m", "busy", *options, duration_s=4.0)
        print(f"noise {got.noise:.1%}; {got.attribution.sentence}")
        assert 0.40 <= got.noise <= 0.65
        assert got.attribution.named == "run-queue wait"
        assert got.attribution.share("run-queue wait") >= 0.80
        assert got.attribution.share("steal") < 0.05

    twice(check)


def test_a_quota_is_cgroup_throttle(tmp_path):
    """Defends: acceptance 19.  A quota of 50 ms in 100 ms, not found, or called waiting."""

    def check() -> None:
        options = ["--target", "quota", "--pid", str(os.getpid()), "--length", "50ms", "--period", "100ms"]
        try:
            got = Measured(tmp_path / "m", "cgroup quota", *options, "--duration", "5s", duration_s=4.0)
        except Exception as reason:
            if "no CPU quota can be set here" in str(reason) or "cannot get a CPU quota" in str(reason):
                pytest.skip(str(reason))
            raise
        print(f"noise {got.noise:.1%}; {got.attribution.sentence}")
        assert 0.40 <= got.noise <= 0.65
        assert period_of(got.longer_than(25e-3).start_ns) == pytest.approx(0.1, rel=0.02)
        assert got.attribution.named == "cgroup throttle"

    twice(check)


def test_pauses_of_the_garbage_collector(tmp_path):
    """Defends: acceptance 20.  Pauses missed or of wrong length; a cause that stays after gc.freeze took it away."""

    def quanta(n: int) -> tuple[Series, Sampler]:
        stamps = np.empty(n + 1, np.int64)
        with Sampler(seed=1) as sampler:
            stamps[0] = time.monotonic_ns()
            for i in range(n):
                end = stamps[i] + 2_000_000
                if i % 100 == 50:
                    gc.collect()
                while time.monotonic_ns() < end:
                    pass
                stamps[i + 1] = time.monotonic_ns()
        return Series(stamps[:-1], stamps[1:], np.ones(n)), sampler

    def check() -> None:
        garbage = []
        for _ in range(600_000):
            cycle: list[object] = []
            cycle.append(cycle)
            garbage.append(cycle)
        try:
            series, sampler = quanta(500)
            pauses = sampler.rows(0)[0, "event", "gc"]
            lost = Lost.over_floor(series, 2e-3)
            counters = {n: s for (_, kind, n), s in sampler.rows(0).items() if kind == "counter"}
            found = attribute(lost, counters, {"gc": pauses})
            long = pauses.seconds > 0.02
            assert long.sum() == 5
            for start, seconds in zip(pauses.start_ns[long], pauses.seconds[long], strict=True):
                hit = np.searchsorted(series.start_ns, start, side="right") - 1
                print(f"pause {seconds * 1e3:.1f} ms, quantum {series.seconds[hit] * 1e3:.1f} ms")
                assert series.seconds[hit] == pytest.approx(seconds, rel=0.1)
            print(found.sentence)
            assert found.named == "gc"
            gc.freeze()
            try:
                _, sampler = quanta(200)
                pauses = sampler.rows(0)[0, "event", "gc"]
                assert np.all(pauses.seconds < 0.02)
                assert 2.0 in pauses.value
            finally:
                gc.unfreeze()
        finally:
            for cycle in garbage:
                cycle.clear()

    gc.collect()
    gc.disable()  # other than forced ones, which come from the thread that measures
    try:
        twice(check)
    finally:
        gc.enable()


def test_the_sampler_costs_little():
    """Defends: a reading that becomes dear.  CPU time of the sampler's thread, on a CPU that is not measured.

    Seen 0.64 to 0.88 % of it, the more the colder the caches; what acceptance 22 asks for, that the measurement does
    not feel it, is asserted by the next test.
    """
    with Sampler(seed=1) as sampler:
        detours(duration_s=2.0, threshold_s=1e-6)
    info = sampler.info
    print(f"{info['cost_s'] / info['ticks'] * 1e6:.0f} us a reading, {info['cost_ratio']:.2%} of a CPU")
    assert info["ticks"] >= 10
    assert info["cost_ratio"] < 0.02
    assert info["housekeeping_cpus"] != [CPU]


def test_the_sampler_does_not_disturb():
    """Defends: acceptance 22.  Seven rounds with and without, interleaved: median of quanta and noise share."""

    def noise(series: Series) -> tuple[float, float]:
        floor = np.quantile(series.seconds, 0.05)
        over = np.maximum(series.seconds - floor, 0)
        return float(np.median(series.seconds)), float(over.sum() / series.seconds.sum())

    def one(with_sampler: bool, round_: int) -> tuple[float, float]:
        with Sampler(seed=round_) if with_sampler else contextlib.nullcontext():
            return noise(fixed_work("spin", quantum_s=100e-6, duration_s=3.0))

    def check() -> None:
        rounds = [[one(w, r) for w in ((True, False) if r % 2 else (False, True))] for r in range(7)]
        ordered = np.array(
            [pair[::-1] if r % 2 else pair for r, pair in enumerate(rounds)]
        )  # [7, (without, with), 2]
        shift = ordered[:, 1] - ordered[:, 0]
        median = float(np.median(ordered[:, 1, 0] / ordered[:, 0, 0])) - 1
        share = float(np.median(shift[:, 1]))
        print(f"median {median:+.3%}, noise share {share * 100:+.3f} points")
        assert abs(median) < 0.01
        assert abs(share) < 0.005

    twice(check)


def test_the_curve_of_this_machine():
    """Defends: acceptance 17 as the self-test reports it: stops of 20 ms are found at every rate."""
    cells = curve((1e-3, 20e-3), (2.0, 10.0), duration_s=3.0, seed=1)
    for cell in cells:
        print(cell)
    assert all(c.injected >= 4 for c in cells)
    assert all(limit is not None and limit <= 20e-3 for limit in limits(cells).values())


def test_counters_of_another_thread():
    """Defends: a Sampler that is told a thread and measures itself or the caller."""
    ready, done = threading.Event(), threading.Event()
    tid = []

    def idle() -> None:
        tid.append(threading.get_native_id())
        ready.set()
        done.wait()

    thread = threading.Thread(target=idle)
    thread.start()
    ready.wait()
    try:
        with Sampler(tid=tid[0], period_s=0.05) as sampler:
            detours(duration_s=0.3, threshold_s=1e-6)
    finally:
        done.set()
        thread.join()
    on_cpu = sampler.rows(0)[0, "counter", "on_cpu_ns"].value
    assert on_cpu[-1] - on_cpu[0] < 0.05e9
