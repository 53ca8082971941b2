"""`sigma train --nproc N`: the same run on one rank and on two, and one that loses a rank."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import rank_faults
from sigma_train.account import Account
from sigma_train.checkpoint import latest_checkpoint, load_checkpoint
from sigma_train.events import FILE, Begin, Spent, read_events
from sigma_train.metrics import read_metrics
from support import sigma

pytestmark = pytest.mark.timeout(300)


def arguments(ranks: int, out: Path, *more: str) -> list[str]:
    """A run of eight sequences a step, whose balance loss is that of all of them."""
    settings = {
        "router.balance": "global",
        "train.batch_size": 8 // ranks,
        "train.save_every": 4,
        "optim.eps": 1e-2,  # so that Adam's step depends on the size of a gradient, whose factor P would else be lost
        "train.eval_every": 4,
        "guard.stats_every": 1,
        "train.threads": 1,  # ranks by the cores, as the launcher would have it
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["train", "--preset", "smoke", *overrides, "--nproc", str(ranks), "--out", str(out), *more]


def without_a_launcher(args: list[str]) -> list[str]:
    at = args.index("--nproc")
    return args[:at] + args[at + 2 :]


def rows(out: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in read_metrics(out / "metrics.jsonl") if name in row}


def of_one(out: Path, cache: dict[str, str], *more: str) -> Path:
    """The run on one rank."""
    args = without_a_launcher(arguments(1, out, *more))
    result = sigma(*args, env=cache, fault=rank_faults.nothing)
    assert result.returncode == 0, result.stderr
    return out


def assert_same_run(got: Path, want: Path) -> None:
    """To the rounding of f32, which a dozen steps have not yet made large; each expert's tokens exactly."""
    for name, bound in (("loss", 1e-5), ("val_bits_per_byte", 1e-5), ("grad_norm", 1e-3)):
        of_got, of_want = rows(got, name), rows(want, name)
        assert of_got.keys() == of_want.keys()
        assert all(abs(of_got[step] - of_want[step]) <= bound * of_want[step] for step in of_want), name
    assert rows(got, "load") == rows(want, "load")
    assert_same_layers(got, want)


def assert_same_layers(got: Path, want: Path) -> None:
    """Statistics are of all ranks, to rounding; choices of the probe from the second look of a start on."""
    of_got, of_want = rows(got, "layers"), rows(want, "layers")
    assert of_got.keys() == of_want.keys() != set()
    looks = 0
    for step, layers in of_want.items():
        assert of_got[step].keys() == layers.keys()
        changes, of_whole = of_got[step].pop("routing_changes"), layers.pop("routing_changes")
        assert changes in (of_whole, [None, None])
        looks += changes != [None, None]
        for name, values in layers.items():
            assert of_got[step][name] == pytest.approx(values, rel=1e-3), (step, name)
    assert looks >= len(of_want) / 2


def test_two_ranks_then_one_are_the_same_run(cache, tmp_path):
    """Defends: gradients of experts summed where they are averaged, tokens left out, a norm or counts of one rank.

    A checkpoint is of the whole model, and each rank takes its part.
    """
    out, more = tmp_path / "run", ("--steps", "6")
    whole = of_one(tmp_path / "whole", cache, *more)
    args = without_a_launcher(arguments(2, out, *more, "--set", "train.time_budget_s=1000"))
    results = forked.on_ranks(2, args, cache, rank_faults.budget_of_two_steps)
    assert [result.returncode for result in results] == [0, 0], results
    assert "2 ranks" in results[0].stdout
    assert results[0].stdout.count("report: ") == 1
    assert not results[1].stdout, "every rank speaks"
    assert "time budget" in results[0].stdout, "the run was over before its budget"
    args = without_a_launcher(arguments(1, out, *more, "--resume"))
    result = sigma(*args, env=cache, fault=rank_faults.nothing)
    assert result.returncode == 0, result.stderr
    assert "resumed" in result.stdout
    for name, bound in (("loss", 1e-5), ("grad_norm", 1e-3)):
        got, want = rows(out, name), rows(whole, name)
        assert got.keys() == want.keys()
        assert all(abs(got[step] - want[step]) <= bound * want[step] for step in want), name
    assert rows(out, "load") == rows(whole, "load")
    assert_same_layers(out, whole)
    ends = [load_checkpoint(latest_checkpoint(run / "checkpoints")) for run in (out, whole)]
    for name, got in ends[0].model_state.items():
        want = ends[1].model_state[name]
        assert (got - want).norm() <= 1e-3 * want.norm(), name
    assert ends[0].optim_state.keys() == ends[1].optim_state.keys()


SPARSITY = {
    "phases": ("sparsity.phases=[[0, [4, 2]], [0.5, [1, 1]]]",),
    "sample": ("sparsity.sample=[1, 2, 4]", 'sparsity.granularity="micro-batch"', "train.grad_accum=2"),
}


@pytest.mark.parametrize("kind", SPARSITY)
def test_k_changes_on_all_ranks_alike(cache, tmp_path, kind):
    """Defends: ranks that draw for themselves or switch at another step, rows sent by the k of another step."""
    settings = [part for text in SPARSITY[kind] for part in ("--set", text)]
    one, two = (tmp_path / str(ranks) for ranks in (1, 2))
    for ranks, out in ((1, one), (2, two)):
        args = without_a_launcher(arguments(ranks, out, "--steps", "4", *settings))
        results = forked.on_ranks(ranks, args, cache, rank_faults.nothing)
        assert [result.returncode for result in results] == [0] * ranks, results
    assert_same_run(two, one)
    assert rows(two, "top_k") == rows(one, "top_k")
    assert len({tuple(map(sum, load)) for load in rows(two, "load").values()}) > 1


def process_of(rank: int, out: Path) -> int:
    """The process that is this rank of the run in `out`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            words = (folder / "cmdline").read_bytes().split(b"\0")
            names = (folder / "environ").read_bytes().split(b"\0")
            if {b"sigma_train", str(out).encode()} <= set(words) and f"RANK={rank}".encode() in names:
                found.append(int(folder.name))
    (pid,) = found
    return pid


@pytest.mark.acceptance
def test_a_run_that_loses_ranks_goes_on_by_itself(cache, tmp_path):
    """One is killed, then one hangs until the others have waited too long: nothing is lost but steps since a save."""
    out = tmp_path / "run"
    args = arguments(2, out, "--steps", "12", "--set", "train.rank_timeout_s=5")
    env = {**cache, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2", "COLUMNS": "400"}
    metrics = out / "metrics.jsonl"
    with forked.Running(args, env) as process:
        for number, step in ((signal.SIGKILL, 5), (signal.SIGSTOP, 7)):
            while not metrics.exists() or len(rows(out, "loss")) < step:
                assert process.poll() is None
                time.sleep(0.01)
            while not any((out / "checkpoints").glob("step-*")):  # a slow disk is still at the first one
                assert process.poll() is None
                time.sleep(0.01)
            pid = process_of(1, out)
            os.kill(pid, number)
            assert len(rows(out, "loss")) < 12, "the signal came after the work was done"
            while Path(f"/proc/{pid}").exists():
                time.sleep(0.1)
        result = process.result(200)
    stdout, stderr = result.stdout, result.stderr
    assert result.returncode == 0, stderr
    assert stdout.count("resumed") == 2
    assert "all ranks start again from the newest checkpoint, 1 of 3 times" in stderr
    assert "all ranks start again from the newest checkpoint, 2 of 3 times" in stderr
    assert_same_run(out, of_one(tmp_path / "whole", cache, "--steps", "12"))
    assert_ledger_tells(out, stdout)


def assert_ledger_tells(out: Path, stdout: str) -> None:
    """Two interruptions, and of steps computed twice those after the newest checkpoint, no more and no fewer."""
    events = list(read_events(out / FILE))
    totals = Account(events).totals()
    begins = [i for i, e in enumerate(events) if isinstance(e, Begin)]
    reached = [max(e.step for e in events[:i] if isinstance(e, Spent) and e.step) for i in begins[1:]]
    resumed = [events[i].resumed for i in begins[1:]]
    assert resumed == [int(step) for step in re.findall(r"resumed \S+ at step (\d+)", stdout)]
    assert totals.lost_steps == sum(reached) - sum(resumed)
    assert totals.tokens == 12 * 8 * 64
    assert (totals.attempts, totals.interruptions, totals.recoveries, totals.idle) == (3, 2, 2, 0)
    assert all(events[i].restarted for i in begins[1:])
    assert totals.spent["detection"] > 0
    assert totals.spent["restart"] > 0
    assert sum(totals.spent.values()) == totals.allocated


@pytest.fixture
def long_run(cache, tmp_path) -> Iterator[tuple[forked.Running, Path]]:
    """Two ranks at work on a run that does not end by itself."""
    out = tmp_path / "run"
    with forked.Running(arguments(2, out, "--steps", "100000", "--no-report"), cache) as process:
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or len(rows(out, "loss")) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        yield process, out


def test_sigterm_reaches_all_ranks_and_they_save(long_run):
    process, out = long_run
    process.send_signal(signal.SIGTERM)
    result = process.result(100)
    assert (result.returncode, result.stderr.count("error")) == (143, 1), result.stderr
    assert "saved, continue with --resume" in result.stdout
    assert load_checkpoint(latest_checkpoint(out / "checkpoints")).step == max(rows(out, "loss"))


@pytest.mark.acceptance
def test_ranks_whose_parent_is_killed_save_and_end(long_run):
    """Defends: ranks that train on alone, and hold the folder."""
    process, out = long_run
    pids = [process_of(rank, out) for rank in (0, 1)]
    process.kill()
    until = time.monotonic() + 100
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert load_checkpoint(latest_checkpoint(out / "checkpoints")).step == max(rows(out, "loss"))


def test_two_ranks_in_bf16_with_biases_and_micro_steps(cache, tmp_path):
    """Defends: counts of one rank, which move its biases alone; tokens in f32 beside experts in bf16."""
    settings = ("router.balance=bias", "router.bias_rate=0.1", "train.grad_accum=2")
    more = ["--steps", "4", "--dtype", "bf16", *(part for text in settings for part in ("--set", text))]
    one = of_one(tmp_path / "one", cache, *more)
    two = tmp_path / "two"
    results = forked.on_ranks(2, without_a_launcher(arguments(2, two, *more)), cache, rank_faults.nothing)
    assert [result.returncode for result in results] == [0, 0], results
    want, got = (rows(run, "loss") for run in (one, two))
    assert all(abs(want[step] - got[step]) <= 1e-3 * want[step] for step in want)
    for step, layers in rows(one, "load").items():
        for want, got in zip(layers, rows(two, "load")[step], strict=True):
            moved = sum(abs(a - b) for a, b in zip(want, got, strict=True))
            assert sum(got) == sum(want) == 2 * 8 * 64
            assert moved <= 0.02 * sum(want), "more tokens have another expert than bf16's rounding moves"


@pytest.mark.acceptance
def test_by_torchrun(cache, tmp_path):
    """Defends: ranks that find each other only where we start them."""
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = without_a_launcher(arguments(2, tmp_path / "run", "--steps", "1", "--no-report"))
    result = subprocess.run(  # elsewhere: `python -m`, which torchrun starts, finds the sources of a checkout first
        [*torchrun, "-m", "sigma_train", *args[1:]],
        env=cache,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "2 ranks" in result.stdout
    assert rows(tmp_path / "run", "load").keys() == {1}


def test_an_environment_that_is_not_torchruns_is_refused(cache, tmp_path):
    result = sigma(
        "train", "--preset", "smoke", "--out", str(tmp_path / "run"), env={**cache, "WORLD_SIZE": "2"}
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: the ranks' environment is not torchrun's: ")
    assert result.stderr.count("\n") == 1


def test_what_ranks_refuse_is_refused(cache, tmp_path):
    """Defends: ranks that are started again with what they refused.  What a rank says is in test_train_mesh.py."""
    result = sigma(*arguments(2, tmp_path / "run"), env=cache, fault=rank_faults.refused_by_all_ranks)
    assert result.returncode == 2
    assert "start again" not in result.stderr
    assert result.stderr.endswith("error: the ranks refused their input, as said above\n")
