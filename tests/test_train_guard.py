"""Steps that are not fit to be learned from: told, left out, gone back on; what remains is as if they had not been."""

import dataclasses
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import rank_faults
import torch
from rich.console import Console
from sigma_train import loop, selfcheck
from sigma_train import step as one_step
from sigma_train.checkpoint import latest_checkpoint, load_checkpoint
from sigma_train.config import GuardConfig, load_config
from sigma_train.guard import Diverged, Guard, spike
from sigma_train.metrics import read_metrics
from sigma_train.selfcheck import Corrupted
from test_train_learning import SMALL  # noqa: F401 - of make_trainer

backends = import_module("sigma_kernels.backends")  # the package's attribute of that name is the function
EIGHT = ("train.steps=8", "train.save_every=3", "train.eval_every=100")


def rows(run: Path, name: str) -> dict[int, object]:
    return {row["step"]: row[name] for row in read_metrics(run / "metrics.jsonl") if name in row}


def poison(
    monkeypatch: pytest.MonkeyPatch, trainer: loop.Trainer, step: int, factor: float, times: int = 1
) -> None:
    """Multiply the gradients of a step, so many times that it is computed."""
    left, clip = [times], one_step.clip

    def hurt(model, most):
        if trainer.step == step and left[0]:
            left[0] -= 1
            for p in model.parameters():
                p.grad.mul_(factor)
        return clip(model, most)

    monkeypatch.setattr(one_step, "clip", hurt)


def weights(trainer: loop.Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_step_without_a_number_is_left_out(make_trainer, monkeypatch, policy):
    """Defends: a NaN in weights or moments, a step repeated that is not to be, one left out that is.

    Leaving the fifth step out and going back to the third and leaving it out then end in the same weights.
    """
    trainer = make_trainer(policy, *EIGHT, f"guard.on_nonfinite={policy}")
    poison(monkeypatch, trainer, 4, math.nan)
    trainer.run()
    assert trainer.guard.passed_over == {4}
    assert sorted(rows(trainer.out, "loss")) == [1, 2, 3, 4, 6, 7, 8]
    told = " ".join(map(str, rows(trainer.out, "guard").values()))
    assert f"{policy}: step 5 is left out, loss " in told
    assert ("back from step 4 to 3" in told) == (policy == "rollback")
    other = make_trainer("other", *EIGHT)
    other.guard.passed_over = {4}
    other.run()
    assert all(map(torch.equal, weights(trainer), weights(other)))
    assert (
        trainer.tokens_seen
        == other.tokens_seen
        == 7 * trainer.config.train.batch_size * trainer.config.train.seq_len
    )


def test_a_run_that_left_a_step_out_resumes_as_if_it_had_not_ended(make_trainer, monkeypatch):
    """Defends: what the guard knows lost with the process: steps left out, a lower rate."""
    settings = (*EIGHT, "guard.on_nonfinite=lower_rate")
    whole = make_trainer("whole", *settings)
    poison(monkeypatch, whole, 2, math.inf)
    whole.run()
    assert whole.guard.rate_scale == 0.5
    monkeypatch.undo()
    monkeypatch.setattr(loop, "dense_tokens_per_s", lambda config: 1.0)
    cut = make_trainer("cut", *settings)
    poison(monkeypatch, cut, 2, math.inf)
    monkeypatch.setattr(cut, "_save", lambda save=cut._save: (save(), setattr(cut, "_stop", cut.step == 6)))
    cut.run()
    assert cut.step == 6
    again = loop.Trainer(cut.config, Console(quiet=True), True)
    again.run()
    assert again.guard.state() == whole.guard.state()
    assert all(map(torch.equal, weights(again), weights(whole)))
    assert rows(whole.out, "lr")[8] == pytest.approx(0.5 * loop.learning_rate(7, whole.config))


def test_a_step_that_never_gets_better_ends_the_run(make_trainer, monkeypatch):
    """Defends: a run that goes back for ever."""
    trainer = make_trainer("run", *EIGHT, "guard.on_nonfinite=rollback", "guard.most=2")
    clip = one_step.clip

    def hurt(model, most):
        if trainer.step >= 4:
            next(model.parameters()).grad.fill_(math.nan)
        return clip(model, most)

    monkeypatch.setattr(one_step, "clip", hurt)
    with pytest.raises(
        Diverged, match=r"^step 7: .*; 2 steps were left out before, guard.most allows no more$"
    ):
        trainer.run()
    assert load_checkpoint(latest_checkpoint(trainer.checkpoints)).step == 6


def test_without_a_checkpoint_there_is_no_way_back(make_trainer, monkeypatch):
    trainer = make_trainer("run", *EIGHT, "guard.on_nonfinite=rollback")
    poison(monkeypatch, trainer, 1, math.nan)
    with pytest.raises(Diverged, match=r"^step 2: there is no checkpoint to go back to"):
        trainer.run()


@pytest.mark.parametrize("policy, left_out", [("keep", set()), ("skip", {24})])
def test_a_spike_is_told(make_trainer, monkeypatch, policy, left_out):
    """Defends: a spike that passes unseen, or widens what is usual."""
    trainer = make_trainer("run", "train.steps=26", "train.eval_every=100", f"guard.on_spike={policy}")
    poison(monkeypatch, trainer, 24, 1e4)
    trainer.run()
    assert trainer.guard.passed_over == left_out
    (told,) = rows(trainer.out, "guard").values()
    assert "the gradient norm is" in told
    assert told.startswith("kept: loss " if policy == "keep" else "skip: step 25 is left out, loss ")


def test_deviations_are_robust():
    """Defends: a measure that former spikes blunt, or that calls the noise of a still run a spike."""
    usual = [2.0 * math.exp(0.1 * math.sin(7.3 * i)) for i in range(100)]
    assert spike(2.1, deque(usual)) < 2
    assert spike(20.0, deque(usual)) > 10
    assert spike(20.0, deque([*usual, *[1e6] * 10])) > 10
    assert spike(2.0 * math.exp(0.2), deque([2.0] * 50)) < 5, "a run that stands still"
    assert spike(0.001, deque(usual)) < 0, "less is no spike"
    assert spike(1e9, deque(usual[:19])) == 0, "too few"


def test_spikes_are_judged_as_of_the_state_that_was_saved():
    guard, other = Guard(GuardConfig(on_spike="skip")), Guard(GuardConfig(on_spike="skip"))
    for i in range(150):
        assert guard.trouble(3.0 - i / 100, 1.0 + i % 3 / 10) is None
    other.load(json.loads(json.dumps(guard.state())))
    assert other.trouble(1.5, 500.0) == guard.trouble(1.5, 500.0) != None  # noqa: E711


def test_a_number_that_one_rank_lacks_is_met_by_all(cache, tmp_path):
    """Defends: ranks of which one goes back and the others wait for it; experts and shards not gone back on."""
    out, common = tmp_path / "run", ["--preset", "smoke", "--steps", "8", "--set", "train.save_every=3"]
    common += ["--set", "guard.on_nonfinite=rollback", "--set", "train.rank_timeout_s=60"]
    common += ["--set", "guard.check_every=2", "--set", "router.balance=bias"]
    args = ["train", *common, "--set", "train.batch_size=4", "--out", str(out)]
    results = forked.on_ranks(2, args, cache, rank_faults.no_number_in_an_experts_gradient)
    assert [result.returncode for result in results] == [0, 0], results
    result = results[0]
    assert "rollback: step 6 is left out" in result.stdout
    first = "the first gradient back from the loss that is not is that of expert 4 of layers.0.mlp.experts"
    assert f"; the forward is finite, {first}.gate_up_proj (rank 1)" in result.stdout
    assert "back from step 5 to 3" in result.stdout
    (one,) = forked.on_ranks(
        1, ["train", *common, "--out", str(tmp_path / "one")], cache, rank_faults.nothing
    )
    assert one.returncode == 0, one.stderr
    want, got = (rows(run, "loss") for run in (tmp_path / "one", out))
    assert sorted(got) == [1, 2, 3, 4, 5, 7, 8]
    assert all(abs(got[step] - want[step]) <= 1e-4 * want[step] for step in (1, 2, 3, 4, 5))
    assert all(abs(got[step] - want[step]) <= 0.05 * want[step] for step in (7, 8)), "one step fewer"


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_sound_machine_is_not_accused(make_trainer, dtype):
    """Defends: a bound that the dtype exceeds; each expert of each layer has its turn."""
    trainer = make_trainer(dtype, "train.steps=2", "guard.check_every=1", f"train.dtype={dtype}")
    trainer.run()
    for turn in range(2 * trainer.config.model.num_experts):
        assert selfcheck.wrong_expert(trainer.model, trainer.config, turn, turn) is None


@pytest.fixture
def faulty() -> Iterator[Callable[[str, Callable], None]]:
    """faulty(op, hurt): what the CPU's row of this operation gives goes through `hurt`."""
    before = {}

    def spoil(op: str, hurt: Callable) -> None:
        before[op] = backends._tables[op]
        (row,) = (row for row in before[op] if row.name == "cpu")
        run = lambda *args, **kwargs: hurt(row.run(*args, **kwargs), *args)  # noqa: E731
        backends.register_table(op, [dataclasses.replace(row, run=run)])

    yield spoil
    for op, rows_before in before.items():
        backends.register_table(op, rows_before)


def test_a_flipped_sign_in_one_experts_output_is_found(make_trainer, faulty):
    def hurt(out, x, index, *rest):
        out[(index == 3).any(1)] *= -1
        return out

    trainer = make_trainer("run", "train.steps=20", "guard.check_every=2", "train.save_every=2")
    faulty("moe_experts_inference", hurt)
    with pytest.raises(Corrupted, match=r"^step 12: rank 0: layer 0, expert 3: the output is off by "):
        trainer.run()
    assert load_checkpoint(latest_checkpoint(trainer.checkpoints)).step == 10


@pytest.mark.parametrize("place, name", [(0, "of x"), (3, "of down"), (2, "of gate_up")])
def test_a_wrong_number_in_a_gradient_is_found(make_trainer, faulty, place, name):
    def hurt(grads, *_):
        grads[place].view(-1)[7] += 0.1
        return grads

    trainer = make_trainer("run", "train.steps=4", "guard.check_every=4")
    trainer.run()
    faulty("moe_experts_backward", hurt)
    assert f"{name} is off by " in selfcheck.wrong_expert(trainer.model, trainer.config, 0, 0)


def test_a_weight_that_is_no_number_is_named(make_trainer, monkeypatch):
    trainer = make_trainer("run", "train.steps=4", "guard.check_every=1")
    record = trainer._record

    def hurt(**row):
        record(**row)
        trainer.model.layers[1].mlp.router.weight.data[0, 0] = math.inf

    monkeypatch.setattr(trainer, "_record", hurt)
    with pytest.raises(
        Corrupted, match=r"^step 1: rank 0: layers.1.mlp.router.weight holds what is no finite"
    ):
        trainer.run()


def test_a_rank_that_holds_other_numbers_is_named(make_trainer):
    trainer = make_trainer("run", "router.balance=bias", "guard.check_every=1")

    def gathered(own):
        return [own, (own[0], {**own[1], "layers.1.mlp.router.expert_bias": 7}), own]

    with pytest.raises(
        Corrupted, match=r"^step 3: rank 1 holds another layers.1.mlp.router.expert_bias than the"
    ):
        selfcheck.check(trainer.model, trainer.config, 3, SimpleNamespace(size=3, rank=0, gathered=gathered))


def test_the_ranks_that_disagree_are_not_named_where_none_is_in_the_majority(make_trainer):
    trainer = make_trainer("run", "router.balance=bias", "guard.check_every=1")

    def gathered(own):
        return [(own[0], {**own[1], "layers.1.mlp.router.expert_bias": 7}), own]

    with pytest.raises(
        Corrupted, match=r"^step 3: the ranks hold different layers.1.mlp.router.expert_bias$"
    ):
        selfcheck.check(trainer.model, trainer.config, 3, SimpleNamespace(size=2, rank=0, gathered=gathered))


def test_a_step_replayed_is_judged_as_it_was_the_first_time(make_trainer, monkeypatch):
    """Defends: sound steps called spikes after a rollback, by what lower steps after them left in the history."""
    settings = (
        "train.steps=34",
        "train.save_every=22",
        "train.eval_every=100",
        "guard.on_nonfinite=rollback",
    )
    trainer = make_trainer("run", *settings, "guard.on_spike=rollback")
    poison(monkeypatch, trainer, 30, math.nan)
    trainer.run()
    other = make_trainer("other", *settings)
    other.guard.passed_over = {30}
    other.run()
    assert trainer.guard.passed_over == {30}
    assert trainer.guard.state()["seen"] == other.guard.state()["seen"]


def test_nothing_is_saved_that_was_not_checked(make_trainer, monkeypatch):
    """Defends: a checkpoint between two checks with what the next check finds."""
    trainer = make_trainer("run", *EIGHT, "guard.check_every=4", "guard.on_nonfinite=skip")
    record = trainer._record

    def hurt(**row):
        record(**row)
        if trainer.step == 5:
            trainer.model.norm.weight.data[0] = math.inf

    monkeypatch.setattr(trainer, "_record", hurt)
    with pytest.raises(Corrupted, match=r"^step 6: rank 0: norm.weight holds what is no finite number"):
        trainer.run()
    assert load_checkpoint(latest_checkpoint(trainer.checkpoints)).step == 3


def test_a_factor_in_bf16_is_found_and_a_dead_expert_is_not_accused(make_trainer, faulty):
    trainer = make_trainer("run", "train.steps=4", "guard.check_every=4", "train.dtype=bf16")
    with torch.no_grad():
        for p in trainer.model.moe_layers()[0].experts.parameters():
            p[0] = 0
    assert selfcheck.wrong_expert(trainer.model, trainer.config, 0, 0) is None
    faulty("moe_experts_inference", lambda out, *_: out * 1.15)
    assert "the output is off by" in selfcheck.wrong_expert(trainer.model, trainer.config, 1, 0)


def test_a_stopped_run_resumes_with_another_policy(make_trainer, monkeypatch):
    stopped = make_trainer("run", *EIGHT)
    poison(monkeypatch, stopped, 4, math.nan, times=2)
    with pytest.raises(Diverged, match=r"resume with another guard.on_nonfinite or guard.on_spike"):
        stopped.run()
    config = load_config("smoke", None, [], stopped.config.model_dump() | {"guard": {"on_nonfinite": "skip"}})
    again = loop.Trainer(config, Console(quiet=True), True)
    again.run()
    assert again.step == 8
