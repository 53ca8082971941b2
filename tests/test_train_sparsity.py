"""[sparsity]: how many experts a token goes to changes within a run, by a schedule or by draws."""

import shutil

import numpy as np
import pytest
from sigma_train.config import ConfigError, ConfigWarning, load_config
from sigma_train.evaluate import evaluate
from sigma_train.expert_counts import ExpertCounts
from sigma_train.loop import Trainer
from sigma_train.metrics import read_metrics
from sigma_train.model import flops_per_token

from sigma_kernels import nn as sk_nn

SMALL = [
    "data.max_bytes=200000",
    "train.batch_size=2",
    "train.steps=8",
    "train.save_every=4",
    "train.eval_every=8",
]
SWITCH = "sparsity.phases=[[0, [4, 2]], [0.75, [1, 1]]]"  # from step 6 of 8, the first being 0


def rows(trainer: Trainer) -> list[dict]:
    return [row for row in read_metrics(trainer.out / "metrics.jsonl") if "loss" in row]


def rows_a_token(trainer: Trainer) -> list[list[float]]:
    """Of each step and layer, by the counts: what the kernels were given."""
    tokens = trainer.config.train.batch_size * trainer.config.train.seq_len * trainer.config.train.grad_accum
    return [[sum(layer) / tokens for layer in row["load"]] for row in rows(trainer)]


def test_k_changes_within_a_run(make_trainer):
    """Defends: a schedule that needs a restart, or is off by a step."""
    trainer = make_trainer("run", SWITCH)
    assert trainer.model.active_parameters() == trainer.model.active_parameters([4, 2])
    assert trainer.model.active_parameters() > trainer.model.active_parameters([1, 1])
    trainer.run()
    assert rows_a_token(trainer) == [[4, 2]] * 6 + [[1, 1]] * 2
    assert [(row["step"], row["top_k"]) for row in rows(trainer) if "top_k" in row] == [(7, [1, 1])]
    assert all(0 < row["loss"] < 10 for row in rows(trainer))


def test_a_run_that_goes_on_is_at_the_same_k(make_trainer, tmp_path):
    """Defends: a switch that a checkpoint forgets."""
    whole = make_trainer("whole", SWITCH)
    whole.run()
    shutil.copytree(tmp_path / "whole", tmp_path / "again", ignore=shutil.ignore_patterns("step-*8"))
    again = make_trainer("again", SWITCH, resume=True)
    assert again.step == 4
    again.run()
    assert [row["loss"] for row in rows(again)] == [row["loss"] for row in rows(whole)]


def test_what_comes_may_change_and_what_was_may_not(make_trainer, tmp_path):
    """Staying against switching from one checkpoint."""
    make_trainer("base", SWITCH).run()
    ignored = shutil.ignore_patterns("step-*8")
    for name in ("stays", "switches", "other"):
        shutil.copytree(tmp_path / "base", tmp_path / name, ignore=ignored)
    stays = make_trainer("stays", "model.top_k=[4, 2]", resume=True)
    stays.run()
    assert rows_a_token(stays) == [[4, 2]] * 8
    early = make_trainer("switches", "sparsity.phases=[[0, [4, 2]], [5, [1, 1]]]", resume=True)
    early.run()
    assert rows_a_token(early) == [[4, 2]] * 5 + [[1, 1]] * 3
    with pytest.raises(ConfigError, match=r"sparsity\.phases was"):
        make_trainer("other", "sparsity.phases=[[0, [4, 2]], [3, [1, 1]]]", resume=True)


def test_drawn_counts_are_the_samplers(make_trainer):
    """Defends: ranks or restarts that draw anew; a validation at the last draw."""
    drawn = ["sparsity.sample=[1, 2, 4]", "model.top_k=2"]
    trainer = make_trainer("run", *drawn)
    trainer.run()
    sampler = sk_nn.ExpertCountSampler((1, 2, 4), seed=trainer.config.train.seed)
    assert rows_a_token(trainer) == [list(sampler.sample(step, 0, 2)) for step in range(8)]
    assert len({tuple(k) for k in rows_a_token(trainer)}) > 2
    assert [moe.router.top_k for moe in trainer.model.moe_layers()] == [2, 2]
    (bits,) = (
        row["val_bits_per_byte"]
        for row in read_metrics(trainer.out / "metrics.jsonl")
        if "val_bits_per_byte" in row
    )
    assert evaluate(trainer.model, trainer.data.val, trainer.config) == bits
    trainer.model.set_top_k([4, 1])
    assert evaluate(trainer.model, trainer.data.val, trainer.config) != bits


def test_micro_batches_draw_for_themselves(make_trainer):
    trainer = make_trainer(
        "run", "sparsity.sample=[1, 4]", "train.grad_accum=3", 'sparsity.granularity="micro-batch"'
    )
    trainer.run()
    sampler = sk_nn.ExpertCountSampler((1, 4), "micro-batch", seed=trainer.config.train.seed)
    want = [[sum(sampler.sample(step, micro, 1)[0] for micro in range(3)) / 3] * 2 for step in range(8)]
    np.testing.assert_allclose(rows_a_token(trainer), want)


def test_work_is_counted_by_the_schedule(make_trainer):
    """Defends: a utilisation of FLOPs that the run does not do."""
    trainer = make_trainer("run", SWITCH)
    early, late = (flops_per_token(trainer.model, trainer.config, k) for k in ([4, 2], [1, 1]))
    assert early > late
    assert trainer.ledger.account.attempts[-1].flops == pytest.approx((6 * early + 2 * late) / 8, rel=1e-6)
    counts = ExpertCounts(load_config("smoke", None, ["sparsity.sample=[1, 2, 3]"]))
    assert counts.mean(0, 8) == (2.0, 2.0)


def test_weights_of_one_expert_are_not_divided_by_their_sum(make_trainer):
    """Defends: a router that learns nothing of the task from the switch on."""
    with pytest.warns(ConfigWarning, match="would make every routing weight 1"):
        trainer = make_trainer("run", "sparsity.phases=[[0, [4, 4]], [4, [1, 1]]]", "router.normalize=true")
    trainer.model.set_top_k([4, 4])
    assert all(moe.router.normalize for moe in trainer.model.moe_layers())
    trainer.run()
    assert not any(moe.router.normalize for moe in trainer.model.moe_layers())


def test_the_top1_loss_is_the_routers(make_trainer):
    trainer = make_trainer(
        "run", 'router.balance="top1"', "router.balance_coef=0.5", "router.top1_temperature=0.3"
    )
    inputs, _ = trainer.data.train.batch(0, 2, 64, 0, 0, 1)
    trainer.model(inputs)
    logits = [moe.last_logits for moe in trainer.model.moe_layers()]
    want = 0.5 * sum(sk_nn.top1_balancing_loss(x, 0.3) for x in logits)
    assert trainer.one_step.balance_loss().item() == pytest.approx(want.item(), rel=1e-6)
    trainer.run()
    assert all(0 < row["loss"] < 10 for row in rows(trainer))


@pytest.mark.parametrize(("settings", "words"), [
    ([SWITCH, "sparsity.sample=[1]"], "cannot both be given"),
    (["sparsity.phases=[[0, [4, 2]], [0.5, [2, 1]]]"], r"must end with model.top_k, \[1, 1\], found \[2, 1\]"),
    (["sparsity.phases=[[0, [400, 2]], [0.5, [1, 1]]]"], "must not exceed model.num_experts = 8, found 400"),
    (["sparsity.phases=[[0, [2, 2, 2]], [4, [1, 1]]]"], "must have 3 entries"),
    (["sparsity.phases=[[3, [2, 2]], [4, [1, 1]]]"], "must begin at step 0"),
    (["sparsity.phases=[[0, [2, 2]], [-1, [1, 1]]]"], "sparsity.phases must be a list of"),
    (["sparsity.sample=[4, 2]"], "sparsity.sample"),
    (["sparsity.sample=[2]", "model.num_experts=1"], "wants experts"),
])  # fmt: skip
def test_wrong_settings_are_a_sentence(settings, words):
    with pytest.raises(ConfigError, match=words) as refused:
        ExpertCounts(load_config("smoke", None, settings))
    assert "\n" not in str(refused.value)


def test_settings_come_back_from_toml():
    config = load_config("smoke", None, ["sparsity.phases=[[0, [4, 2]], [0.5, [1, 1], 0.75]]"])
    assert "phases = [[0, [4, 2]], [0.5, [1, 1], 0.75]]" in config.to_toml()
    assert ExpertCounts(config).of_step(config.train.steps) == (1, 1)


def test_a_step_that_is_left_out_turns_all_the_same(make_trainer):
    """Defends: a switch that is lost with the step it falls on; draws that stay after a step was looked into."""
    trainer = make_trainer("run", SWITCH)
    trainer.guard.passed_over.add(6)
    trainer.run()
    told = [row for row in read_metrics(trainer.out / "metrics.jsonl") if "top_k" in row]
    assert [(row["step"], row["top_k"], row["guard"]) for row in told] == [(7, [1, 1], "left out")]
    drawn = make_trainer("drawn", "sparsity.sample=[1, 4]", "model.top_k=2")
    loss, norm, _ = drawn.one_step.gradients(0)
    drawn.one_step.origin(0, loss, norm)
    assert [moe.router.top_k for moe in drawn.model.moe_layers()] == [2, 2]


def test_a_run_that_goes_on_begins_at_its_k(make_trainer):
    make_trainer("run", "sparsity.phases=[[0, [4, 2]], [100, [1, 1]]]").run()
    again = make_trainer("run", "sparsity.phases=[[0, [4, 2]], [100, [1, 1]]]", resume=True)
    assert [moe.router.top_k for moe in again.model.moe_layers()] == [4, 2]
