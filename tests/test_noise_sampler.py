"""The sampler against a made-up /proc whose contents are known, and against this thread's own."""

import errno
import gc
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from sigma_noise.counters import (
    TICKS_PER_S,
    GroupStat,
    Held,
    cpu_stat,
    group_of,
    machine_stat,
    pressure,
    schedstat,
    slurp,
    sources,
    status,
    task_stat,
)
from sigma_noise.fitness import cpu_list, fault_cost_s
from sigma_noise.sampler import GIVE_UP_AFTER, Sampler
from sigma_noise.ticker import Ticker, housekeeping

STAT = b"""cpu  10 20 30 40 50 6 7 8 0 0
cpu0 1 2 3 4 5 1 2 3 0 0
cpu1 9 18 27 36 45 5 5 5 0 0
intr 123456 1 2 3
ctxt 99
"""
MOUNTS_1 = b"31 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
MOUNTS_2 = b"30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
TICK_NS = 1e9 / TICKS_PER_S


def write(root: Path, name: str, text: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)


@pytest.fixture
def root(tmp_path):
    """A machine whose thread 7 runs on CPU 1, in version 2 of control groups."""
    write(tmp_path, "proc/self/task/7/schedstat", b"5000 300 12\n")
    write(
        tmp_path,
        "proc/self/task/7/status",
        b"voluntary_ctxt_switches:\t5\nvoluntary_ctxt_switches:\t5\nnonvoluntary_ctxt_switches:\t9\n",
    )
    fields = b" ".join(b"%d" % i for i in range(4, 53))
    write(tmp_path, "proc/self/task/7/stat", b"7 (a) R (b)) S " + fields)
    write(tmp_path, "proc/stat", STAT)
    write(tmp_path, "proc/pressure/cpu", b"some avg10=1.00 total=4444\nfull avg10=0.00 total=1\n")
    write(tmp_path, "proc/self/cgroup", b"0::/job\n")
    write(tmp_path, "proc/self/mountinfo", MOUNTS_2)
    write(tmp_path, "sys/fs/cgroup/job/cpu.stat", b"usage_usec 9\nnr_throttled 4\nthrottled_usec 77\n")
    write(tmp_path, "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq", b"2400000\n")
    heat = "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_total_time_ms"
    write(tmp_path, heat, b"31\n")
    return tmp_path


def read_once(root, **options):
    sampler = Sampler(tid=7, root=root, **options)
    sampler.sample()
    return {name: series.value.tolist() for (_, _, name), series in sampler.rows(0).items()}


def test_every_counter_is_read_as_the_kernel_means_it(root):
    """Defends: fields one off, ticks taken for ns, another CPU's line, a name of a thread with brackets in it."""
    assert read_once(root, cpu=1) == {
        "run_delay_ns": [300.0],
        "on_cpu_ns": [5000.0],
        "nonvoluntary_switches": [9.0],
        "minor_faults": [10.0],
        "major_faults": [12.0],
        "steal_ns": [5 * TICK_NS],
        "irq_ns": [5 * TICK_NS],
        "softirq_ns": [5 * TICK_NS],
        "interrupts": [123456.0],
        "throttled_ns": [77e3],
        "throttled_count": [4.0],
        "psi_cpu_us": [4444.0],
        "cpu_khz": [2.4e6],
        "core_throttled_ns": [31e6],
    }
    everywhere = read_once(root)
    assert everywhere["irq_ns"] == [6 * TICK_NS]
    assert everywhere["softirq_ns"] == [7 * TICK_NS]
    assert everywhere["steal_ns"] == [8 * TICK_NS]
    assert "cpu_khz" not in everywhere
    assert "core_throttled_ns" not in everywhere


def test_this_kernel_writes_what_the_parsers_expect():
    """Defends: a made-up /proc that resembles no real one."""
    task = Path("/proc/thread-self")
    on_cpu, run_delay = schedstat(slurp(task / "schedstat"))
    assert on_cpu > 0
    assert run_delay >= 0
    assert status(slurp(task / "status"))[0] >= 0
    assert task_stat(slurp(task / "stat"))[0] > 0
    steal, irq, softirq, interrupts = machine_stat(slurp(Path("/proc/stat")), None)
    assert min(steal, irq, softirq) >= 0
    assert interrupts > 0
    names = {name for source in sources(threading.get_native_id(), 0) for name in source.names}
    assert {"run_delay_ns", "on_cpu_ns", "steal_ns", "throttled_ns", "psi_cpu_us", "cpu_khz"} <= names


def test_version_1_of_control_groups(root):
    write(root, "proc/self/cgroup", b"8:pids:/\n1:cpu,cpuacct:/job\n0::/\n")
    write(root, "proc/self/mountinfo", MOUNTS_1 + MOUNTS_2)
    write(root, "sys/fs/cgroup/cpu/job/cpu.stat", b"nr_periods 9\nnr_throttled 3\nthrottled_time 8888\n")
    found = read_once(root)
    assert found["throttled_ns"] == [8888.0]
    assert found["throttled_count"] == [3.0]


def test_a_container_mounts_its_group_as_the_root():
    """Defends: /docker/abc looked for inside the container, where it is /."""
    mounts = b"31 25 0:27 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    assert group_of(b"0::/docker/abc/sub\n", mounts) == Path("/sys/fs/cgroup/sub")
    assert group_of(b"0::/docker/abc\n", mounts) == Path("/sys/fs/cgroup")
    assert group_of(b"0::/../elsewhere\n", MOUNTS_2) == Path("/sys/fs/cgroup")
    with pytest.raises(ValueError, match="no cpu controller"):
        group_of(b"8:pids:/\n", MOUNTS_1)


def test_a_process_that_is_moved_to_another_group(root):
    """Defends: a counter that falls to what the new group says, or leaps to it."""
    sampler = Sampler(tid=7, root=root)
    sampler.sample()
    write(root, "sys/fs/cgroup/quota/cpu.stat", b"nr_throttled 100\nthrottled_usec 5000\n")
    write(root, "proc/self/cgroup", b"0::/quota\n")
    sampler.sample()
    write(root, "sys/fs/cgroup/quota/cpu.stat", b"nr_throttled 103\nthrottled_usec 5600\n")
    sampler.sample()
    write(root, "proc/self/cgroup", b"0::/job\n")
    shutil.rmtree(root / "sys/fs/cgroup/quota")
    sampler.sample()
    write(root, "sys/fs/cgroup/job/cpu.stat", b"nr_throttled 5\nthrottled_usec 80\n")
    sampler.sample()
    throttled = sampler.rows(0)[0, "counter", "throttled_ns"].value
    assert throttled.tolist() == [77e3, 77e3, 677e3, 677e3, 680e3]


def test_files_that_stay_open_tell_what_is_in_them_now(root, monkeypatch):
    """Defends: the first reading told again; a file cut at a page; a group that is gone and takes its counter along."""
    held = Held()
    group = GroupStat(root, held)
    assert group.read() == (77e3, 4.0)
    write(root, "sys/fs/cgroup/job/cpu.stat", b"nr_throttled 5\nthrottled_usec 80\n")
    assert group.read() == (80e3, 5.0)
    write(root, "sys/fs/cgroup/quota/cpu.stat", b"nr_throttled 100\nthrottled_usec 5000\n")
    write(root, "proc/self/cgroup", b"0::/quota\n")
    assert group.read() == (80e3, 5.0)
    real, gone = os.pread, [OSError(errno.ENODEV, "the group was removed and made again")]
    monkeypatch.setattr(os, "pread", lambda *args: real(*args) if not gone else raised(gone.pop()))
    assert group.read() == (80e3, 5.0)
    for size in (0, Held.MOST - 1, Held.MOST, 3 * Held.MOST + 7):
        write(root, "long", bytes(size % 251 for size in range(size)))
        assert held(root / "long") == (root / "long").read_bytes()
    held.close()
    with pytest.raises(FileNotFoundError):
        held(root / "none")


def raised(error: Exception) -> bytes:
    raise error


def test_a_group_without_a_quota_is_told(root):
    write(root, "sys/fs/cgroup/job/cpu.stat", b"usage_usec 9\n")
    with Sampler(tid=7, root=root) as sampler:
        pass
    assert "cannot have a quota" in sampler.info["unread"]["throttled_ns"]


def test_what_cannot_be_read_has_a_reason(root):
    """Defends: counters that are absent in silence; one bad file that takes the others with it."""
    shutil.rmtree(root / "proc/pressure")
    write(root, "proc/self/task/7/stat", b"")
    write(root, "proc/self/task/7/schedstat", b"what is this\n")
    with Sampler(tid=7, root=root) as sampler:
        pass
    unread = sampler.info["unread"]
    assert unread["psi_cpu_us"].endswith("proc/pressure/cpu: does not exist")
    assert "odd contents" in unread["minor_faults"]
    assert "odd contents" in unread["run_delay_ns"]
    assert unread["cpu_khz"] == "the measuring thread is not pinned to one CPU"
    assert set(unread) == {
        "psi_cpu_us",
        "minor_faults",
        "major_faults",
        "run_delay_ns",
        "on_cpu_ns",
        "cpu_khz",
        "core_throttled_ns",
    }
    names = {name for _, _, name in sampler.rows(0)}
    assert names == {
        "nonvoluntary_switches", "steal_ns", "irq_ns", "softirq_ns", "interrupts", "throttled_ns", "throttled_count",
    }  # fmt: skip


def test_files_that_vanish_and_come_back(root):
    """Defends: rows lost with their file, a reader that asks for ever, a hole passed over in silence."""
    sampler = Sampler(tid=7, root=root)
    sampler.sample()
    shutil.rmtree(root / "proc/self/task")
    pressure_file = root / "proc/pressure/cpu"
    text = pressure_file.read_bytes()
    pressure_file.write_bytes(b"\xff\x00")
    sampler.sample()
    pressure_file.write_bytes(text)
    for _ in range(GIVE_UP_AFTER):
        sampler.sample()
    with sampler:
        pass
    rows = sampler.rows(0)
    assert len(rows[0, "counter", "run_delay_ns"]) == 1
    assert len(rows[0, "counter", "psi_cpu_us"]) >= 1 + GIVE_UP_AFTER
    assert "after 1 readings" in sampler.info["interrupted"]["run_delay_ns"]
    assert "does not exist" in sampler.info["interrupted"]["run_delay_ns"]
    assert "odd contents" in sampler.info["interrupted"]["psi_cpu_us"]
    reader = sampler._readers[0]
    reader.source.read = lambda: pytest.fail("asked again after it had given up")
    sampler.sample()


def test_this_thread_is_what_is_measured():
    """Defends: counters of the sampler's own thread or of the process, stamps of another clock."""
    before = os.sched_getaffinity(0)
    helper_done = threading.Event()

    def other() -> None:
        while not helper_done.is_set():
            sum(range(1000))

    helper = threading.Thread(target=other)
    try:
        os.sched_setaffinity(0, {min(before)})
        begin_ns, cpu_begin_s = time.monotonic_ns(), time.thread_time()
        with Sampler(period_s=0.02) as sampler:
            helper.start()
            while time.thread_time() - cpu_begin_s < 0.2:
                pass
            gc.collect()
            helper_done.set()
            used_s = time.thread_time() - cpu_begin_s
        end_ns = time.monotonic_ns()
    finally:
        helper_done.set()
        helper.join()
        os.sched_setaffinity(0, before)
    rows = sampler.rows(3)
    on_cpu = rows[3, "counter", "on_cpu_ns"]
    assert (on_cpu.value[-1] - on_cpu.value[0]) * 1e-9 == pytest.approx(used_s, rel=0.1)
    assert begin_ns < on_cpu.start_ns[0] < on_cpu.start_ns[-1] < end_ns
    wait = rows[3, "counter", "run_delay_ns"]
    away_s = (wait.value[-1] - wait.value[0] + on_cpu.value[-1] - on_cpu.value[0]) * 1e-9
    assert away_s <= (end_ns - begin_ns) * 1e-9 * 1.05
    collections = rows[3, "event", "gc"]
    assert 2.0 in collections.value
    assert np.all(collections.seconds > 0)
    info = sampler.info
    assert info["cpu"] == min(before)
    assert info["housekeeping_cpus"] == sorted(housekeeping({min(before)}))
    assert info["ticks"] == len(on_cpu)
    assert 0 < info["cost_s"] < 0.2
    assert gc.callbacks == [c for c in gc.callbacks if c is not sampler._gc]


def test_gaps_between_readings_have_no_period():
    """Defends: a sampler that is itself a line in the spectrum, or drifts from its mean."""
    ticker = Ticker(lambda: None, 0.1, 5)
    gaps = 0.1 * ticker._rng.uniform(0.5, 1.5, 2000)
    assert gaps.mean() == pytest.approx(0.1, rel=0.02)
    stamps = np.cumsum(gaps)
    assert abs(np.exp(2j * np.pi * stamps / 0.1).mean()) < 0.1  # a fixed period has 1


def test_an_error_of_a_tick_is_raised():
    """Defends: a thread that dies unheard, or that nobody can join."""

    def fail() -> None:
        raise RuntimeError("no more")

    ticker = Ticker(fail, 0.01, 0)
    ticker.start()
    with pytest.raises(RuntimeError, match="no more"):
        ticker.stop()
    with pytest.raises(ValueError, match="period_s must be"):
        Ticker(fail, 0.0, 0)


def test_it_ticks_at_both_ends():
    stamps = []
    ticker = Ticker(lambda: stamps.append(time.monotonic()), 60.0, 0)
    ticker.start()
    assert len(stamps) == 1
    ticker.stop()
    assert len(stamps) == 2


def test_parsers_refuse_what_they_do_not_know():
    for parse in (schedstat, status, task_stat, pressure, cpu_stat, lambda text: machine_stat(text, 0)):
        for text in (b"", b"x y z", b"\x00\xff"):
            with pytest.raises((ValueError, IndexError, KeyError)):
                parse(text)


def test_cpu_lists():
    assert cpu_list("0-3,8\n") == {0, 1, 2, 3, 8}
    assert cpu_list("\n") == set()


def test_a_page_fault_has_a_cost():
    """Defends: pages that are not touched, huge ones counted as small, ns taken for seconds."""
    assert 2e-8 < fault_cost_s() < 1e-4
