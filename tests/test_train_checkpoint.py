"""Checkpoints of which each rank writes its part, in a thread: whole or absent, for any number of ranks."""

import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import forked
import pytest
import rank_faults as faults
import torch
from sigma_train import loop
from sigma_train import step as one_step
from sigma_train.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from sigma_train.metrics import read_metrics
from sigma_train.saver import Saver
from sigma_train.sharded import Metadatas, Writer
from test_train_learning import SMALL  # noqa: F401 - of make_trainer
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

AT = ("train.save_every=2", "train.eval_every=100")


def run(
    ranks: int,
    out: Path,
    cache: dict[str, str],
    *more: str,
    steps: int = 6,
    fault: Callable[[], None] = faults.nothing,
) -> list[CompletedProcess[str]]:
    """So many steps of eight sequences, saved every second, begun or gone on with; what each rank ended with."""
    settings = [
        *AT, "router.balance=bias", "train.eval_batches=1", f"train.batch_size={8 // ranks}", "optim.eps=1e-2",
        "train.rank_timeout_s=60", "train.threads=1", "guard.stats_every=1",
        "data.max_bytes=200000", *more,
    ]  # fmt: skip
    overrides = [part for setting in settings for part in ("--set", setting)]
    args = ["train", "--preset", "smoke", "--steps", str(steps), *overrides, "--out", str(out), "--resume"]
    return forked.on_ranks(ranks, args, cache, fault)


def codes(results: list[CompletedProcess[str]]) -> list[int]:
    return [result.returncode for result in results]


def rows(out: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in read_metrics(out / "metrics.jsonl") if name in row}


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory) -> Path:
    """The run of one process that nothing befalls."""
    out = tmp_path_factory.mktemp("checkpoint") / "whole"
    results = run(1, out, cache)
    assert codes(results) == [0], results
    return out


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_two_then_four_ranks_then_one_are_the_same_run(cache, tmp_path, whole):
    """Defends: parts that only as many ranks can read; ranks that go on from different checkpoints, where a bit flipped
    in a file that one of them looks at; experts that others have placed, taken for those of other numbers.
    """
    out = tmp_path / "run"
    two_steps = ["train.time_budget_s=1000", "train.save_every=1", "train.place_every=1"]
    results = run(2, out, cache, *two_steps, fault=faults.budget_of_two_steps)
    assert codes(results) == [0, 0], results
    assert rows(out, "experts_moved")[1] > 0
    flip(out / "checkpoints" / "step-00000002" / "__1_0.distcp")
    results = run(4, out, cache, "train.time_budget_s=1e-9", "train.save_every=1")
    assert codes(results) == [0] * 4, results
    told = f"checkpoint {out}/checkpoints/step-00000002 is damaged: the sha256 of __1_0.distcp differs"
    assert [result.stderr.count(told) for result in results] == [1, 0, 0, 0]
    assert resumed_at(results) == 1
    parts = sorted(path.name for path in (out / "checkpoints" / "step-00000002").iterdir())
    assert parts == [
        ".metadata",
        "__0_0.distcp",
        "__1_0.distcp",
        "__2_0.distcp",
        "__3_0.distcp",
        "state.json",
    ]
    results = run(1, out, cache)
    assert codes(results) == [0], results
    assert resumed_at(results) == 2
    for name, bound in (("loss", 1e-5), ("grad_norm", 1e-3)):
        got, want = rows(out, name), rows(whole, name)
        assert got.keys() == want.keys()
        assert all(abs(got[step] - want[step]) <= bound * want[step] for step in want), name
    assert rows(out, "load") == rows(whole, "load")
    ends = [load_checkpoint(latest_checkpoint(run / "checkpoints")) for run in (out, whole)]
    for got, want in zip(*(end.model_state | end.optim_state for end in ends), strict=True):
        assert got == want
    for name, x in ends[0].optim_state.items():
        want = ends[1].optim_state[name]
        assert (x - want).norm() <= 1e-2 * want.norm(), name


def resumed_at(results: list[CompletedProcess[str]]) -> int:
    return int(re.search(r"resumed.*at\s+step\s+(\d+)", results[0].stdout, re.DOTALL)[1])


@pytest.mark.parametrize("fault", [faults.killed_before_a_part, faults.killed_before_the_record])
def test_sigkill_within_a_save_loses_that_save_alone(cache, tmp_path, whole, fault):
    """Defends: half a checkpoint in use; what is left of it staying; other losses than of a run that was not killed."""
    out = tmp_path / "run"
    assert codes(run(1, out, cache, fault=fault)) == [-signal.SIGKILL]
    unfinished, former = names(out)
    assert unfinished.startswith(".tmp-step-00000004-")
    assert former == "step-00000002"
    again = run(1, out, cache)
    assert codes(again) == [0], again
    assert resumed_at(again) == 2
    assert names(out) == ["step-00000004", "step-00000006"]
    assert rows(out, "loss") == rows(whole, "loss")
    last = [run / "checkpoints" / "step-00000006" / "__0_0.distcp" for run in (out, whole)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_a_rank_killed_within_a_save_is_lost_to_the_others(cache, tmp_path):
    """Defends: a first rank that names a checkpoint to which a part is wanting, or waits for good."""
    out = tmp_path / "run"
    results = run(2, out, cache, fault=faults.rank_1_is_killed)
    assert codes(results) == [3, -signal.SIGKILL]
    assert results[0].stderr.startswith("error: another rank is lost: ")
    assert results[0].stderr.count("\n") == 1
    assert latest_checkpoint(out / "checkpoints").name == "step-00000002"


def test_a_disk_that_is_full_on_one_rank_ends_all_alike(cache, tmp_path):
    out = tmp_path / "run"
    results = run(2, out, cache, fault=faults.disk_of_rank_1_is_full)
    assert codes(results) == [1, 1], results
    told = f"cannot write {out}/checkpoints/step-00000004: File too large"
    assert [result.stderr for result in results] == [f"error: {told}\n", f"error: rank 1: {told}\n"]
    assert names(out) == ["step-00000002"]


class Gate:
    """Holds the writing of each checkpoint until it is opened."""

    def __init__(self) -> None:
        self.is_open, self.is_reached = threading.Event(), threading.Event()

    def open_later(self) -> None:
        threading.Timer(0.2, self.is_open.set).start()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate, write_data = Gate(), Writer.write_data

    def wait(writer, *args):
        gate.is_reached.set()
        assert gate.is_open.wait(60)
        return write_data(writer, *args)

    monkeypatch.setattr(Writer, "write_data", wait)
    yield gate
    gate.is_open.set()


def test_what_changes_after_a_save_began_is_not_in_it_and_the_next_waits(tmp_path, gate):
    """Defends: steps of the optimizer in a checkpoint of before them; two saves that write into one copy."""
    saver, weight = Saver(tmp_path, 2, in_background=True), torch.ones(3, 4)
    for step in (1, 2):
        gate.is_open.clear()
        if step == 2:
            gate.is_open.set()
        saver.save(step, {"model.w": weight}, {})
        weight.mul_(2)
        if step == 1:
            assert gate.is_reached.wait(60)
            assert not (tmp_path / "step-00000001").exists()
            gate.open_later()
    assert (tmp_path / "step-00000001").exists(), "the second began before the first was done"
    saver.wait()
    saver.close()
    for step in (1, 2):
        (w,) = load_checkpoint(tmp_path / f"step-{step:08d}").model_state.values()
        assert w.unique().tolist() == [step]


def test_what_a_killed_process_left_is_removed_at_the_start(tmp_path):
    """Defends: its staying until the first save, in a run that is looked at and not gone on with."""
    (tmp_path / ".tmp-step-00000003-1-abc").mkdir()
    save_checkpoint(tmp_path, 1, {"w": torch.ones(2)}, {}, {}, keep=1)
    (tmp_path / ".tmp-step-00000003-1-abc").mkdir()
    Saver(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_the_copy_is_made_where_it_was(tmp_path):
    """Defends: fresh pages for every save."""
    saver, seen = Saver(tmp_path, 2, in_background=True), []
    state = {"model.w": torch.ones(300, 400), "model.b": torch.ones(3)}
    for step in (1, 2, 3):
        saver.save(step, state, {})
        saver.wait()
        copy = saver._stager._state_dict_stager.stage(state)
        seen.append([x.data_ptr() for x in copy.values()])
    saver.close()
    assert seen[0] == seen[1] == seen[2]
    assert not set(seen[0]) & {x.data_ptr() for x in state.values()}


def test_sigterm_while_a_save_is_under_way(make_trainer, monkeypatch, gate):
    """Defends: "saved" before it is; the save of the last step in the way of the one before it."""
    trainer = make_trainer("run", "train.steps=8", *AT)
    save, said = trainer._save, []

    def stop():
        save()
        if trainer.step == 2:
            assert gate.is_reached.wait(60)
            os.kill(os.getpid(), signal.SIGTERM)
            gate.open_later()

    def say(text, style=""):
        said.append((text, names(trainer.out)))

    monkeypatch.setattr(trainer, "_save", stop)
    monkeypatch.setattr(trainer.line, "say", say)
    trainer.run()
    assert trainer.is_stopped
    assert said[-1] == ("stopped at step 2; saved, continue with --resume", ["step-00000002"])


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """failing(step): the disk is full when that step is written."""
    write_data = Writer.write_data

    def at(step: int) -> None:
        def fail(writer, *args):
            if writer.step == step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(writer.place))
            return write_data(writer, *args)

        monkeypatch.setattr(Writer, "write_data", fail)

    return at


@pytest.mark.parametrize("in_background", ["true", "false"])
def test_a_save_that_fails_ends_the_run_at_the_next_step(make_trainer, failing, in_background):
    trainer = make_trainer("run", "train.steps=8", f"train.async_save={in_background}", *AT)
    failing(4)
    step, began = trainer._train_step, []

    def counted():
        if trainer.saver._pending is not None:
            trainer.saver._pending[0].exception()  # the thread is done
        began.append(trainer.step)
        return step()

    trainer._train_step = counted
    with pytest.raises(OSError, match="No space left on device"):
        trainer.run()
    assert began[-1] in ((3, 4) if in_background == "true" else (3,))
    assert names(trainer.out) == ["step-00000002"]


def test_a_run_that_ends_for_another_reason_has_its_save(make_trainer, monkeypatch, gate):
    """Defends: a thread that is left to itself, or ended, when a step is not fit to be learned from."""
    trainer = make_trainer("run", "train.steps=8", *AT)
    clip = one_step.clip

    def hurt(model, most):
        if trainer.step == 2:
            gate.open_later()
            next(model.parameters()).grad.fill_(math.nan)
        return clip(model, most)

    monkeypatch.setattr(one_step, "clip", hurt)
    with pytest.raises(loop.Diverged):
        trainer.run()
    assert names(trainer.out) == ["step-00000002"]


def reseal(path: Path, **changes: object) -> None:
    """Have the record of a checkpoint say what its files are now."""
    record = json.loads((path / "state.json").read_text().partition("\n")[2])
    record["sha256"] = {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in record["sha256"]
    }
    text = json.dumps(record | changes)
    (path / "state.json").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n")


class Call:
    def __reduce__(self):
        return os.system, ("touch was-called",)


def test_metadata_that_call_something_are_refused(tmp_path, monkeypatch):
    """Defends: a checkpoint of another's making that runs what it likes."""
    monkeypatch.chdir(tmp_path)
    path = save_checkpoint(tmp_path, 1, {"w": torch.ones(2)}, {}, {}, keep=1)
    (path / ".metadata").write_bytes(pickle.dumps(Call()))
    reseal(path)
    with pytest.raises(CheckpointError, match=r"has metadata that are none: .*system is no part of it"):
        load_checkpoint(path)
    assert not (tmp_path / "was-called").exists()


@pytest.mark.parametrize("placement", [torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([0.0, 1.0])])
def test_a_placement_that_is_none_is_refused(tmp_path, placement):
    """Defends: experts of a checkpoint of another's making that are read twice, or beyond their rows."""
    weights = {"layers.0.mlp.placement": placement, "layers.0.mlp.experts.down_proj": torch.ones(2, 3, 4)}
    path = save_checkpoint(tmp_path, 1, weights, {}, {}, keep=1)
    with pytest.raises(
        CheckpointError, match=r"placement must .*, in model\.layers\.0\.mlp\.placement"
    ) as caught:
        load_checkpoint(path)
    assert str(caught.value).startswith(f"checkpoint {path}: ")


class Attribute:
    """Pickled as one of another object."""

    def __init__(self, of, name):
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def test_metadata_of_any_python_are_read(tmp_path):
    """Defends: Debian 12's Python, which pickles members of an enumeration as attributes of it, and no others."""
    written = [Attribute(_MEM_FORMAT_ENCODING, x.name) for x in _MEM_FORMAT_ENCODING]
    assert Metadatas(io.BytesIO(pickle.dumps(written))).load() == list(_MEM_FORMAT_ENCODING)
    for of, name in (_MEM_FORMAT_ENCODING, "__init__"), (torch.Size, "__new__"), (Metadata, "__class__"):
        with pytest.raises(pickle.UnpicklingError, match=f"attribute {name} of .* is no part of it"):
            Metadatas(io.BytesIO(pickle.dumps(Attribute(of, name)))).load()


def test_another_format_is_named_with_ours(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"w": torch.ones(2)}, {}, {}, keep=1)
    reseal(path, version=3)
    with pytest.raises(CheckpointError, match="step-00000001 has format 3, this program reads 4"):
        load_checkpoint(path)
