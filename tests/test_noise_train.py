"""`sigma train --noise`: every step of every rank is in the record, whatever ends the run, and costs next to nothing.

Ranks are forked, so that a run on four of them is seconds.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import rank_faults
import torch
from noise_gate import skip_if_unfit
from rich.console import Console
from sigma_noise import parts, steps, trace
from sigma_noise.recorder import Recorder, now_ns
from sigma_noise.step_ranks import step_ranks
from sigma_noise.steps import StepNoise, step_noise
from sigma_noise.trace import Trace
from sigma_train import loop
from sigma_train import step as one_step
from sigma_train.config import load_config
from sigma_train.metrics import read_metrics
from sigma_train.step_noise import FOLDER, PAUSES, PHASES, RecordWarning
from support import sigma
from test_train_learning import SMALL  # noqa: F401 - of make_trainer

from sigma_kernels.collectives import OBSERVERS, Where, told

pytestmark = pytest.mark.timeout(300)

RANKS, DISTURBED = 4, 2
STOP_S, EVERY_S, STOPS = 0.03, 0.3, 30


def losses(out: Path) -> list[float]:
    metrics = out / "metrics.jsonl"
    return [row["loss"] for row in read_metrics(metrics) if "loss" in row] if metrics.exists() else []


def steps_of(found: Trace, rank: int = 0) -> list[int]:
    return found.get(rank, "counter", "step").value.astype(int).tolist()


def arguments(out: Path, *more: str) -> list[str]:
    threads = ("--set", "train.threads=1")
    return ["train", "--preset", "smoke", "--out", str(out), *threads, *more]


def finished(args: list[str], cache: dict[str, str], fault: Callable[[], None] = rank_faults.nothing) -> None:
    with forked.Running(args, cache, fault=fault) as process:
        result = process.result(200)
    assert result.returncode == 0, result.stderr


def assert_phases_fill_the_steps(found: Trace, rank: int) -> None:
    """Each step is its phases, one after the other, to the nanosecond, and holds its collectives."""
    steps = found.get(rank, "quantum", "step")
    ends = np.sort(np.concatenate([found.get(rank, "quantum", name).end_ns for name in PHASES]))
    begins = np.sort(np.concatenate([found.get(rank, "quantum", name).start_ns for name in PHASES]))
    for begin, end in zip(steps.start_ns, steps.end_ns, strict=True):
        inside = (begins >= begin) & (begins < end)
        assert begins[inside][0] == begin
        assert begins[inside][1:].tolist() == ends[(ends > begin) & (ends <= end)][:-1].tolist()
    for name in PHASES:
        assert len(found.get(rank, "quantum", name)) >= len(steps), name


@pytest.fixture(scope="module")
def recorded(cache, tmp_path_factory) -> Path:
    """Twenty steps on one rank, with a report."""
    out = tmp_path_factory.mktemp("noise") / "run"
    result = sigma(*arguments(out, "--steps", "20", "--noise"), env=cache, fault=rank_faults.no_sample)
    assert result.returncode == 0, result.stderr
    assert "noise: one rank waits for nobody" in result.stdout
    return out


def test_a_record_has_every_step_and_its_phases(recorded):
    """Defends: steps without phases, time of a step in none, stamps of another step, files that are not joined."""
    found = trace.read(recorded / FOLDER)
    assert steps_of(found) == list(range(1, 21))
    assert_phases_fill_the_steps(found, 0)
    assert list((recorded / FOLDER / "parts").iterdir()) == []
    assert len(found.get(0, "quantum", "checkpoint")) >= 2
    assert len(found.get(0, "quantum", "validation")) == 2
    assert len(found.get(0, "quantum", "blocked")) == 0
    noise = step_noise(found)
    assert noise.phases_s["backward"][0] > noise.phases_s["log"][0]
    assert sum(seconds[0] for seconds in noise.phases_s.values()) == pytest.approx(noise.steps_s, rel=1e-9)
    many = step_ranks(found)
    assert many.window_s == pytest.approx(noise.local_s[0] / noise.steps, rel=1e-9)
    assert "wanted 100: measure longer" in many.projections[0].refusals[0]
    report = (recorded / "report.html").read_text()
    assert "<h2>What noise cost</h2>" in report
    assert "<td>backward" in report


def test_a_record_changes_no_number(recorded, cache, tmp_path):
    finished(arguments(tmp_path / "plain", "--steps", "20"), cache)
    assert losses(tmp_path / "plain") == losses(recorded)
    assert not (tmp_path / "plain" / FOLDER).exists()


def test_a_run_that_is_killed_keeps_what_checkpoints_recorded_and_goes_on(cache, tmp_path):
    """Defends: a record that is lost with its process, or written over by the next one."""
    out = tmp_path / "run"
    args = arguments(out, "--steps", "30", "--noise")
    with forked.Running(args, cache) as process:
        while len(losses(out)) < 16:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = steps_of(parts.read(out / FOLDER))
    assert kept == list(range(1, len(kept) + 1))
    assert 10 <= len(kept) < 30, "the kill came after the work was done"
    finished([*args, "--resume"], cache)
    found = trace.read(out / FOLDER)
    again = steps_of(found)[len(kept) :]
    assert again == list(range(again[0], 31))
    assert again[0] <= kept[-1] + 1
    assert steps_of(found)[: len(kept)] == kept
    assert len(found.get(0, "counter", "attempt")) == 2
    assert step_noise(found).steps == len(kept) - 1 + len(again) - 1


def test_a_signal_and_the_guard_leave_a_whole_record(cache, tmp_path):
    """Defends: steps since the last checkpoint lost where the run ends otherwise than by its last step."""
    out = tmp_path / "stopped"
    with forked.Running(
        arguments(out, "--steps", "5000", "--noise"), cache, fault=rank_faults.nothing
    ) as process:
        while len(losses(out)) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(200) == 0
    found = trace.read(out / FOLDER)
    assert steps_of(found) == list(range(1, len(losses(out)) + 1))
    diverged = arguments(tmp_path / "diverged", "--noise", "--steps", "30", "--set", "optim.lr=1e30")
    with forked.Running(diverged, cache, fault=rank_faults.nothing) as process:
        result = process.result(200)
    assert result.returncode == 1
    assert "gradient norm" in result.stderr
    steps = steps_of(trace.read(tmp_path / "diverged" / FOLDER))
    assert steps == list(range(1, len(losses(tmp_path / "diverged")) + 1)) != []


def test_steps_that_are_left_out_stand_in_the_record_and_a_return_does_not(cache, tmp_path, monkeypatch):
    """Defends: the time of loading a checkpoint in a step; numbers that go on where the run has gone back."""
    settings = ["train.save_every=4", "train.noise=true", "guard.on_nonfinite=rollback", "train.threads=1"]
    config = load_config("smoke", None, [*settings, f"train.out={tmp_path / 'run'}"], {"train": {"steps": 8}})
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("SIGMA_CACHE", cache["SIGMA_CACHE"])
    monkeypatch.setattr(loop, "dense_tokens_per_s", lambda config: 1.0)
    monkeypatch.setattr(loop, "product_flops_per_s", lambda dtype: 1e12)
    trainer = loop.Trainer(config, Console(quiet=True), resume=False)
    clip, left = one_step.clip, [1]

    def hurt(model, most):
        norm = clip(model, most)
        if trainer.step == 5 and left[0]:
            left[0] = 0
            return math.nan
        return norm

    monkeypatch.setattr(one_step, "clip", hurt)
    with trainer.ledger:
        trainer.run()
    found = trace.read(tmp_path / "run" / FOLDER)
    assert steps_of(found) == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    (restart_s,) = found.get(0, "quantum", "restart").seconds
    noise = step_noise(found)
    assert noise.steps == 8
    assert noise.pauses_s["restart"].tolist() == [restart_s]
    assert set(steps.PAUSES) == set(PAUSES)


def test_what_went_wrong_is_told_where_the_record_cannot_be_closed(make_trainer, monkeypatch):
    """Defends: a full disk in place of what ended the run; rows that are missing without a word."""
    trainer = make_trainer("run", "train.noise=true")

    def full(*_):
        raise OSError(28, "No space left on device")

    def ends(number):
        monkeypatch.setattr(parts, "fold", full)
        raise ZeroDivisionError

    monkeypatch.setattr(trainer.noise, "begin_step", ends)
    told = "^train.noise: the end of the run is not in the record: .*No space left"
    with pytest.warns(RecordWarning, match=told), pytest.raises(ZeroDivisionError):
        trainer.run()


def test_a_record_that_cannot_be_read_leaves_the_report(cache, tmp_path):
    out = tmp_path / "run"
    with forked.Running(
        arguments(out, "--steps", "3", "--noise"), cache, fault=rank_faults.record_is_broken
    ) as process:
        result = process.result(200)
    assert result.returncode == 0, result.stderr
    assert f"noise: not in the report, {out}/noise/rank00000.parquet: not a file of" in result.stdout
    report = (out / "report.html").read_text()
    assert "<h2>Loss</h2>" in report
    assert "What noise cost" not in report


class OneRank:
    """A mesh of any dimensions, of this process."""

    mesh, mesh_dim_names = torch.tensor([0]), ("shard",)

    def __getitem__(self, _: str) -> "OneRank":
        return self


def test_the_models_layers_and_nobody_elses_are_recorded(make_trainer, monkeypatch):
    """Defends: an exchange of another's layer as one of the model's, or as an error in its midst; hooks that stay."""
    trainer = make_trainer("run", "train.noise=true")
    monkeypatch.setattr("sigma_train.parallel.observe_shards", lambda *_: None)
    trainer.noise.watch(trainer.model, SimpleNamespace(rest=OneRank(), experts=OneRank()))
    layers = trainer.model.moe_layers()
    assert [len(layer._forward_pre_hooks) for layer in layers] == [1, 1]
    trainer.noise._recorder.taken()
    layers[1](torch.zeros(1, 64))
    seen = [("rows", Where.layer, True), ("rows", -1, False), ("rows", 2, False), ("others", -1, False)]
    for at, (what, layer, is_backward) in enumerate([*seen, ("sum", -1, False)]):
        told(what, layer, is_backward, 10 * at, 10 * at + 1)
    found = {
        name: series.start_ns.tolist() for (_, _, name), series in trainer.noise._recorder.taken().items()
    }
    assert found == {"a2a/1/rows/back": [0], "sum": [40], "blocked": [1, 11, 21, 31, 41]}
    trainer.noise.close()
    assert [len(layer._forward_pre_hooks) for layer in layers] == [0, 0]
    assert OBSERVERS == []
    assert Where.layer == -1


def least_ns(take: Callable[[], None], n: int) -> float:
    """Processor time of one of n: of five tries the least, as a disturbed one is longer and never shorter."""
    tries = []
    for _ in range(5):
        began = time.thread_time_ns()
        for _ in range(n):
            take()
        tries.append((time.thread_time_ns() - began) / n)
    return min(tries)


@pytest.mark.live
@pytest.mark.parametrize("preset, steps, of_many", [("tiny-96", 1, 9 * 4 + 3 * 5 + 12), ("smoke", 25, 29)])
def test_recording_takes_less_than_a_hundredth_of_a_step(
    cache, tmp_path, monkeypatch, preset, steps, of_many
):
    """Counted: rows of a step times the processor time of one, a reading of the counters, and the heartbeat's, over the
    processor time of a step.  By the wall's clock only how many beats a step has is told.

    A rank of many has two rows a collective.  `of_many`: of tiny-96 nine a layer where tokens have several experts,
    three for the shards of each of four blocks and the rest, a dozen of losses, norms and loads; of smoke those of one
    of four ranks.  `steps`: in each of three turns, of which the heartbeat's least counts.

    Live: beside other work each wake of the heartbeat finds cold caches, and takes thrice as long.
    Defends: what is always on and in no sum of rows.
    """
    skip_if_unfit("before a training is recorded")
    recorder = Recorder(0)
    name = recorder.code("quantum", "forward")
    row_ns = least_ns(lambda: recorder.add(name, now_ns(), now_ns()), 20_000)
    settings = ["data.max_bytes=1000000", "model.vocab_size=512", "train.threads=1", "train.noise=true"]
    config = load_config(
        preset, None, [*settings, f"train.out={tmp_path / 'run'}"], {"train": {"steps": 3 * steps}}
    )
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("SIGMA_CACHE", cache["SIGMA_CACHE"])
    trainer = loop.Trainer(config, Console(quiet=True), resume=False)
    trainer.noise.watch(trainer.model, None)
    counters = trainer.noise._counters
    counters_ns = least_ns(counters.read, 500)
    assert len(counters._sources) >= 2
    before, spent, beats = len(trainer.noise._recorder), [], []
    n = 3 * steps
    for number in range(1, n + 1):
        if number % steps == 1 % steps:
            beats.append((now_ns(), counters._heartbeat.spent_ns))
        began = time.thread_time_ns()
        trainer.noise.begin_step(number)
        trainer._train_step()
        trainer.noise.end_step()
        spent.append(time.thread_time_ns() - began)
    beats.append((now_ns(), counters._heartbeat.spent_ns))
    lasted_ns, beaten_ns = np.diff(np.array(beats), axis=0).T
    heartbeat = float((beaten_ns / lasted_ns).min())  # of a core; a disturbed one takes more
    rows = (len(trainer.noise._recorder) - before) / n
    trainer.noise.close()
    trainer.saver.close()
    trainer.metrics.close()
    assert rows >= len(PHASES)
    a_rank_of_many = rows + 2 * of_many
    share = (row_ns * a_rank_of_many + counters_ns) / min(spent) + heartbeat
    print(
        f"{preset}: {a_rank_of_many:.0f} rows of {row_ns:.0f} ns, counters {counters_ns:.0f} ns, heartbeat "
        f"{heartbeat:.2%}: {share:.2%} of {min(spent) * 1e-6:.1f} ms"
    )
    assert share < 0.01, (min(spent), beats)


@pytest.mark.acceptance
@pytest.mark.parametrize("shards", [1, 2])
def test_groups_of_ranks_are_told_apart(cache, tmp_path, shards):
    """Defends: FSDP's own exchanges unseen, or changed by being seen; the k-th call of one group beside another's."""
    more = ["--steps", "3", "--set", "train.expert_ranks=2", "--set", f"train.shard_ranks={shards}"]
    runs = {"seen": ["--noise"]} | ({"unseen": []} if shards == 2 else {})
    for name, option in runs.items():
        args = arguments(tmp_path / name, *more, *option)
        results = forked.on_ranks(RANKS, args, cache, rank_faults.nothing)
        assert [result.returncode for result in results] == [0] * RANKS, results
    assert losses(tmp_path / "seen") == losses(tmp_path / [*runs][-1])
    found = trace.read(tmp_path / "seen" / FOLDER)
    (groups,) = found.ranks[3]["groups"].values()
    assert groups["experts"] == [2, 3]
    assert groups["copies"] == [1, 3]
    assert groups["replicas"] == ([1, 3] if shards == 2 else [0, 1, 2, 3])
    noise = step_noise(found)
    assert noise.steps == 2
    # Seen by each rank: two layers' counts, rows and answers, with two of these back.  FSDP's groups are two blocks and
    # the rest of the model.
    for rank in range(RANKS):
        in_steps = {name: len(series) for name, series in found.of(rank, "quantum")}
        assert in_steps["replicas"] == 3 * 3
        assert in_steps["experts"] == 3
        assert in_steps["a2a/1/rows/back"] == 3
        assert in_steps.get("scatter", 0) == (9 if shards == 2 else 0)
    np.testing.assert_allclose(noise.wait_s + noise.transfer_s, noise.blocked_s)


class Stopper(threading.Thread):
    """Stops a process for STOP_S every EVERY_S, once there is a step, and writes down when."""

    def __init__(self, pid: int, out: Path) -> None:
        super().__init__(daemon=True)
        self.pid, self.out, self.ends = pid, out, threading.Event()
        self.log: list[tuple[int, int]] = []

    def run(self) -> None:
        while not losses(self.out) and not self.ends.wait(0.05):
            pass
        while not self.ends.wait(EVERY_S - STOP_S):
            with contextlib.suppress(ProcessLookupError):
                began = time.monotonic_ns()
                os.kill(self.pid, signal.SIGSTOP)
                time.sleep(STOP_S)
                os.kill(self.pid, signal.SIGCONT)
                self.log.append((began, time.monotonic_ns()))


def disturbed(cache: dict[str, str], out: Path) -> tuple[StepNoise, Stopper]:
    """A training on four ranks, of which one is stopped again and again; it ends by a signal to all."""
    settings = ["--set", "train.batch_size=48", "--set", "train.eval_every=1000000"]
    args = arguments(out, "--steps", "100000", "--noise", *settings)
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(forked.Running(args, env, None, rank_faults.nothing))
            for env in forked.environments(RANKS, cache)
        ]
        stopper = Stopper(processes[DISTURBED].pid, out)
        stopper.start()
        while len(stopper.log) < STOPS or len(losses(out)) < 20:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        stopper.ends.set()
        stopper.join()
        for process in processes:
            process.send_signal(signal.SIGTERM)
        results = [process.result(200) for process in processes]
    assert [result.returncode for result in results] == [0] * RANKS, results
    return step_noise(trace.read(out / FOLDER)), stopper


@pytest.mark.live
def test_the_rank_that_is_stopped_is_named(cache, tmp_path):
    """A training of our MoE on four ranks: the record alone names the one that a log of stops is of."""
    skip_if_unfit()
    out = tmp_path / "run"
    noise, stopper = disturbed(cache, out)
    others = np.delete(noise.excess_s, DISTURBED)
    stopped_s = sum(end - begin for begin, end in stopper.log) * 1e-9
    print(
        noise.steps, noise.steps_s, len(stopper.log), noise.blame_s, noise.excess_s, stopped_s, noise.local_s
    )
    found = trace.read(out / FOLDER)
    for rank in range(RANKS):
        assert_phases_fill_the_steps(found, rank)
    assert noise.collectives > 20 * noise.steps
    np.testing.assert_allclose(noise.wait_s + noise.transfer_s, noise.blocked_s)
    if np.ptp(others) > 0.5 * stopped_s:
        pytest.skip(
            f"unfit: undisturbed ranks differ by {np.ptp(others):.2f} s, stops were {stopped_s:.2f} s"
        )
    assert noise.worst == DISTURBED
