"""`sigma train --nproc N`: the same run on one, two and four ranks, and one that loses a rank."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from sigma_train.checkpoint import latest_checkpoint, load_checkpoint
from sigma_train.metrics import read_metrics
from support import SIGMA, assert_one_sentence, sigma

pytestmark = pytest.mark.timeout(300)


def arguments(ranks: int, out: Path, *more: str) -> list[str]:
    """A run of eight sequences a step, whose balance loss is that of all of them."""
    settings = {
        "router.balance": "global",
        "train.batch_size": 8 // ranks,
        "train.save_every": 4,
        "optim.eps": 1e-2,  # so that Adam's step depends on the size of a gradient, whose factor P would else be lost
        "train.eval_every": 4,
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["train", "--preset", "smoke", *overrides, "--nproc", str(ranks), "--out", str(out), *more]


def rows(out: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in read_metrics(out / "metrics.jsonl") if name in row}


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory) -> Path:
    """Twelve steps on one rank, without torchrun."""
    out = tmp_path_factory.mktemp("ranks") / "whole"
    command = [part for part in arguments(1, out, "--steps", "12") if part not in ("--nproc", "1")]
    result = sigma(*command, env=cache)
    assert result.returncode == 0, result.stderr
    return out


def assert_same_run(got: Path, want: Path) -> None:
    """To the rounding of f32, which twelve steps have not yet made large; each expert's tokens exactly."""
    for name, bound in (("loss", 1e-5), ("val_bits_per_byte", 1e-5), ("grad_norm", 1e-3)):
        of_got, of_want = rows(got, name), rows(want, name)
        assert of_got.keys() == of_want.keys()
        assert all(abs(of_got[step] - of_want[step]) <= bound * of_want[step] for step in of_want), name
    assert rows(got, "load") == rows(want, "load")


@pytest.mark.parametrize("ranks", [4])  # two: the runs below that lose one of them
def test_the_same_run_on_several_ranks(cache, tmp_path, whole, ranks):
    """Defends: gradients of experts summed where they are averaged, tokens left out, a norm or counts of one rank."""
    result = sigma(*arguments(ranks, tmp_path / "run", "--steps", "12"), env=cache)
    assert result.returncode == 0, result.stderr
    assert f"{ranks} ranks" in result.stdout
    assert result.stdout.count("report: ") == 1, "every rank speaks"
    assert_same_run(tmp_path / "run", whole)


def test_a_run_goes_on_with_another_number_of_ranks(cache, tmp_path, whole):
    """Two ranks, then four, then one: a checkpoint is of the whole model, and each rank takes its part."""
    out, more = tmp_path / "run", ("--steps", "12", "--resume")
    for ranks in (2, 4):
        result = sigma(*arguments(ranks, out, *more, "--set", "train.time_budget_s=0.05"), env=cache)
        assert result.returncode == 0, result.stderr
        assert "time budget" in result.stdout, "the run was over before its budget"
    result = sigma(*arguments(1, out, *more), env=cache)
    assert result.returncode == 0, result.stderr
    assert "resumed" in result.stdout
    assert rows(out, "load") == rows(whole, "load")
    ends = [load_checkpoint(latest_checkpoint(run / "checkpoints")) for run in (out, whole)]
    for name, got in ends[0].model_state.items():
        want = ends[1].model_state[name]
        assert (got - want).norm() <= 1e-3 * want.norm(), name
    assert ends[0].optim_state["state"].keys() == ends[1].optim_state["state"].keys()


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_that_loses_a_rank_goes_on_by_itself(cache, tmp_path, whole, number):
    """Killed, or stuck until the others have waited too long; nothing is lost but steps since the last checkpoint."""
    out = tmp_path / "run"
    command = [*SIGMA, *arguments(2, out, "--steps", "12", "--set", "train.rank_timeout_s=5")]
    env = {**cache, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or len(rows(out, "loss")) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process_of(1, out), number)
    done = len(rows(out, "loss"))
    assert done < 12, "the signal came after the work was done"
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert "resumed" in stdout
    assert "all ranks start again from the newest checkpoint, 1 of 3 times" in stderr
    assert_same_run(out, whole)


def test_experts_that_cannot_be_shared_out_are_refused(cache, tmp_path):
    result = sigma(*arguments(2, tmp_path / "run", "--set", "model.num_experts=7"), env=cache)
    message = "model.num_experts must be a multiple of the 2 ranks of this run, found 7"
    refused = "the ranks refused their input, as said above"
    assert_one_sentence(result, 2, f"{message}\nerror: {refused}")
