"""`sigma noise run`: what is asked for is in the file, and a file is whole or absent."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import forked
import noise_ranks
import numpy as np
import pytest
from sigma_cli import AGAIN_S
from sigma_noise import host, loops, run
from sigma_noise import offset as offset_module
from sigma_noise.measure import measure
from sigma_noise.plan import Plan
from sigma_noise.run import rows
from sigma_noise.trace import Series, Trace, read
from sigma_noise.units import time_of
from sigma_train.errors import Failure, WrongInput
from sigma_train.ranks import Ranks
from support import sigma

SHORT = ["--quantum", "200us", "--duration", "30ms", "--warm-up", "5ms"]
SIZES = [part for text in ("copy.bytes=1000000", "gemm.R=4", "gemm.N=8", "gemm.K=8", "grouped.R=8", "grouped.E=4",
                           "grouped.N=8", "grouped.K=8") for part in ("--size", text)]  # fmt: skip


def assert_one_sentence(stderr: str) -> None:
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


def noise_run(*more, env=None):
    return sigma("noise", "run", *more, env=env)


def test_a_run_writes_all_that_was_asked_for(cache, tmp_path):
    """Defends: a kernel or mode left out, settings that the file does not tell, quanta of the warm-up in it."""
    out = tmp_path / "run"
    before = time.monotonic_ns()
    result = noise_run(
        *SHORT, *SIZES, "--kernel", "spin,copy,gemm,grouped", "--mode", "fwq,ftq,detours", "--seed", "7",
        "--threads", "1", "--pin", str(min(os.sched_getaffinity(0))), "--out", str(out), env=cache,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    trace = read(out)
    kernels = ["spin", "copy", "gemm", "grouped"]
    assert trace.names() == sorted([*kernels, *(f"{name}_ftq" for name in kernels)])
    assert trace.names("event") in (["detour"], [])  # a quiet machine has none
    about = trace.ranks[0]
    for name in trace.names():
        series = trace.get(0, "quantum", name)
        assert series.start_ns[0] > before
        assert series.end_ns[-1] - series.start_ns[0] >= 0.03e9
        assert len(series) == 150 or not name.endswith("_ftq")
    assert trace.run["seed"] == 7
    assert trace.run["quantum_s"] == 200e-6
    assert trace.run["sizes"]["grouped"] == {"R": 8, "E": 4, "N": 8, "K": 8}
    assert trace.run["ranks"] == 1
    assert about["cpu"]["pinned"] == min(os.sched_getaffinity(0))
    assert about["clock"]["source"] == host.clock_source()
    assert about["clock"]["cost"]["median_s"] > 0
    assert about["clock"]["offsets"][0]["offset_ns"] == about["clock"]["offsets"][1]["residual_ns"] == 0
    assert about["measured"]["spin"]["steps"] > 1
    assert sum(about["measured"]["grouped"]["tokens_of_expert"]) == 8
    assert about["measured"]["detour"]["threshold_s"] == pytest.approx(
        max(1e-6, 9 * about["clock"]["cost"]["least_s"])
    )
    assert about["measured"]["detour"]["found"] == len(trace.get(0, "event", "detour"))
    json.dumps(about, allow_nan=False)
    for name in kernels:
        assert name in result.stdout
    assert "detours above" in result.stdout
    assert f"wrote {out} (1 file)" in result.stdout
    again = noise_run(*SHORT, "--out", str(out), env=cache)
    assert again.returncode == 2
    assert "has a measurement already, rank00000.parquet" in again.stderr
    assert_one_sentence(again.stderr)


def test_two_ranks_write_a_file_each(cache, tmp_path):
    """Defends: ranks that stamp other clocks, an all-to-all whose waits cannot be told from its transfer."""
    args = ["noise", "run", *SHORT, "--kernel", "a2a,spin", "--mode", "fwq", "--out", str(tmp_path)]
    results = forked.on_ranks(2, args, cache)
    assert [result.returncode for result in results] == [0, 0], results
    assert "(2 files)" in results[0].stdout
    assert not results[1].stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank00000.parquet", "rank00001.parquet"]
    trace = read(tmp_path)
    assert list(trace.ranks) == [0, 1]
    assert trace.names() == ["a2a", "a2a_local", "spin"]
    local, collective = ([trace.get(r, "quantum", name) for r in (0, 1)] for name in ("a2a_local", "a2a"))
    assert len(local[0]) == len(local[1]) == len(collective[0]) == len(collective[1]) >= 1
    for rank in (0, 1):
        assert (local[rank].end_ns <= collective[rank].start_ns).all(), "it arrived before its work was done"
        assert (collective[rank].end_ns[:-1] <= local[rank].start_ns[1:]).all()
    last = np.maximum(collective[0].start_ns, collective[1].start_ns)
    for rank in (0, 1):
        assert (last <= collective[rank].end_ns).all(), "it ended before all had come"
    assert trace.ranks[0]["clock"]["identity"] == trace.ranks[1]["clock"]["identity"]
    assert trace.ranks[0]["measured"]["a2a"] == trace.ranks[1]["measured"]["a2a"]


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


@pytest.mark.parametrize("start", ["nproc", pytest.param("torchrun", marks=pytest.mark.acceptance)])
def test_ranks_of_processes_that_others_start(tmp_path, cache, start):
    """Defends: arguments lost on the way to the ranks; ranks that find each other only where we start them."""
    out = tmp_path / "run"
    args = ["noise", "run", *SHORT, "--kernel", "a2a", "--mode", "fwq", "--out", str(out)]
    if start == "nproc":
        result = sigma(*args, "--nproc", "2", env=cache)
    else:
        command = [sys.executable, "-P", "-m", *TORCHRUN, "sigma_cli", *args]
        result = subprocess.run(  # elsewhere: `python -m`, which torchrun starts, finds sources of a checkout first
            command, env={**os.environ, **cache}, cwd=tmp_path, capture_output=True, text=True, check=False
        )
    assert result.returncode == 0, result.stderr
    assert list(read(out).ranks) == [0, 1]


def test_offsets_between_clocks(tmp_path):
    """Defends: an offset of the wrong sign, or one that is wrong by more than it says."""
    forked.spawn(noise_ranks.check_offsets, (3, str(tmp_path / "ranks")), 3)


def test_the_offset_is_of_the_shortest_trip(monkeypatch):
    """Defends: an answer set beside the question's begin or end, doubt of half its size, a long trip believed."""
    clock = iter([0, 100, 140, 200, 210, 300, 390])
    answers = iter([5070, 5105, 5390])
    fake = SimpleNamespace(send=lambda *_: None, recv=lambda box, _: box.fill_(next(answers)))
    monkeypatch.setattr(offset_module, "dist", fake)
    monkeypatch.setattr(Ranks, "gathered", lambda self, value: ["first", value])
    found = offset_module.offset(Ranks(1, 2), "mine", lambda: next(clock), pings=3)
    assert found == offset_module.Offset(at_ns=210, offset_ns=4900, residual_ns=5)


def test_a_late_rank_is_told_by_its_local_time(tmp_path):
    """Defends: stamps of arrival taken after the collective, which name whoever waited."""
    forked.spawn(noise_ranks.check_late_rank, (2, str(tmp_path / "ranks")), 2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing(tmp_path, cache, number):
    """Defends: a signal that waits for the measurement's end, half a file, traceback instead of a sentence."""
    out = tmp_path / "run"
    with forked.Running(
        ["noise", "run", "--duration", "300s", "--warm-up", "0s", "--out", str(out)], cache
    ) as process:
        while not out.exists():
            time.sleep(0.02)
        time.sleep(0.3)
        stopped = time.monotonic()
        process.send_signal(number)
        result = process.result()
    assert result.returncode == 128 + number
    assert time.monotonic() - stopped < AGAIN_S * 10, "it went on for much longer than a signal needs"
    assert_one_sentence(result.stderr)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    "args, message",
    [
        (["--kernel", "spin,gem"], "--kernel must be of spin, copy, gemm, grouped, a2a, found 'gem'"),
        (["--kernel", "spin,spin"], "--kernel wants different names, found spin,spin"),
        (["--mode", "fwk"], "--mode must be of fwq, ftq, detours, found 'fwk'"),
        (["--kernel", "a2a"], "--kernel a2a wants at least 2 ranks, found 1"),
        (["--kernel", "a2a", "--nproc", "2", "--mode", "ftq"], "--kernel a2a is fixed work"),
        (["--size", "gemm.R=4"], "--size gemm: no such kernel is measured"),
        (["--kernel", "gemm", "--size", "gemm.Z=4"], "--size: gemm takes R, N, K, threads, found 'Z'"),
        (["--size", "gemm=4"], "--size must be like grouped.E=96, found 'gemm=4'"),
        (["--pin", "a"], "--pin must be whole numbers by commas, found 'a'"),
        (["--pin", "99999"], "--pin must be of the CPUs that this process may use"),
        (["--mode", "detours", "--quantum", "2ms"], "--quantum would change nothing: --mode detours times"),
        (
            ["--nproc", "2", "--pin", "0,1", "--mode", "fwq", "--threshold", "2us"],
            "--threshold would change nothing",
        ),
        (
            ["--quantum", "1ms", "--duration", "10h"],
            "--duration must be at most 1.68e+04 with quanta of 0.001 s",
        ),
        (["--quantum", "0"], "--quantum must be seconds above 0, found 0.0"),
        (
            ["--kernel", "gemm", "--quantum", "1us", "--size", "gemm.N=4096"],
            "--quantum must be at least a step of",
        ),
        (["--backend", "cuda"], "--backend cuda: torch"),
        (["--out", "/proc/x"], "--out: cannot write in /proc/x"),
    ],
)
def test_wrong_input_is_named(cache, tmp_path, args, message):
    more = [] if "--out" in args else ["--out", str(tmp_path / "run")]
    result = noise_run(*args, *more, env=cache)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert_one_sentence(result.stderr)


def test_the_collector_rests_while_it_is_measured(monkeypatch):
    """Defends: a gen-2 pause within the loops, and a process left without its collector."""
    seen = []

    def run_fixed_work(*_, **__):
        seen.append((gc.isenabled(), gc.get_freeze_count()))
        raise ZeroDivisionError

    monkeypatch.setattr(loops, "run_fixed_work", run_fixed_work)
    frozen = gc.get_freeze_count()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure(Plan(duration_s=0.01, warm_up_s=0), Ranks())
    ((is_enabled, in_loop),) = seen
    assert not is_enabled
    assert in_loop > 1000
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_a_pin_is_undone():
    before = os.sched_getaffinity(0)
    with host.pinned(min(before)):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


def test_ranks_take_their_cpus_in_turn(monkeypatch):
    first = min(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {first, first + 1})
    found = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(host.cpu_of((first + 1, first)))
    assert found == [first + 1, first, first + 1]
    assert host.cpu_of(()) is None


@pytest.mark.parametrize(
    "value, want", [(0, "0 s"), (1.2345e-3, "1.23 ms"), (9.999e-4, "1 ms"), (0.9994, "999 ms"), (61.0, "61 s"),
                    (2e-8, "20 ns")]
)  # fmt: skip
def test_times_in_the_table(value, want):
    assert time_of(value) == want


def test_the_table_says_the_worst_of_each_kind():
    """Defends: longest and least mixed up, which of chunks are the other way round than of times."""
    start = np.arange(100) * 10
    work = Series(start, start + np.arange(1, 101), np.ones(100))
    done = Series(start, start + 10, np.arange(100.0))
    trace = Trace({}, {0: {}}, {(0, "quantum", "gemm"): work, (0, "quantum", "gemm_ftq"): done})
    of_work, of_time = rows(trace, 0)
    assert (of_work.best, of_work.worst) == pytest.approx((1e-9, 100e-9))
    assert of_work.median == pytest.approx(50.5e-9)
    assert of_work.rare == pytest.approx(99.01e-9)
    assert (of_time.best, of_time.worst) == (99, 0)
    assert of_time.rare == pytest.approx(0.99)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_leaves_no_half_run(tmp_path, monkeypatch, failing):
    """Defends: files of the other ranks, which look like a run.  This rank is 0; the other one is only told of."""
    trace = Trace({}, {0: {}}, {})
    told = lambda self, value: [value, "No space left" if failing else ""]  # noqa: E731
    monkeypatch.setattr(Ranks, "gathered", told)
    monkeypatch.setattr(run, "together", lambda ranks: None)
    if failing == 0:
        monkeypatch.setattr(run, "rank_file", lambda out, rank: tmp_path / "none" / "rank00000.parquet")
    with pytest.raises(Failure, match=f"rank {failing}: "):
        run.write_together(trace, Ranks(0, 2), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_step_longer_than_a_quantum_is_said_on_every_rank():
    with pytest.raises(WrongInput, match="--quantum must be at least a step of gemm"):
        measure(Plan(kernels=("gemm",), quantum_s=1e-6, sizes={"gemm": {"N": 4096}}, warm_up_s=0), Ranks())
