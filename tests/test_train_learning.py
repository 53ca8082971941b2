"""What a step of the trainer computes: every part of a layer learns, and each setting does what its page says."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from sigma_train import loop
from sigma_train.checkpoint import latest_checkpoint, load_checkpoint
from sigma_train.config import load_config
from sigma_train.loop import Trainer
from sigma_train.metrics import read_metrics
from sigma_train.optim import learning_rate

SMALL = ["data.max_bytes=200000", "train.batch_size=4", "optim.warmup_steps=0"]


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in read_metrics(trainer.out / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize(
    "part", ["experts.gate_up_proj", "experts.down_proj", "router.weight", "post_attention_layernorm.weight"]
)
def test_every_part_of_the_layer_learns(make_trainer, part):
    """Defends: a gradient that is zero or of the wrong sign, of the one part that may move: the rest is frozen.

    The norm before the experts learns by their gradient of x alone: the router's weights are zero then, so that
    nothing comes back through it.
    """
    large = ["model.init_std=0.2", "model.expert_init_std=0.3", "router.output_scale=4.0", "optim.lr=0.05"]
    trainer = make_trainer(
        "run", *large, "router.balance=none", "optim.weight_decay=0.0", "optim.schedule=wsd"
    )
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_(name.endswith(part))
        if name.endswith("router.weight"):
            parameter.data.mul_("norm" not in part)
    first, *_, last = [trainer._train_step()["loss"] for _ in range(25)]  # step 0 each time: one batch
    assert last < first - 0.5


def test_accumulated_micro_steps_equal_a_larger_batch(make_trainer):
    settings = ["router.balance=none", "router.z_coef=0.1"]  # the balance loss is not linear in its tokens
    whole = make_trainer("whole", *settings, "train.batch_size=8")
    parts = make_trainer("parts", *settings, "train.batch_size=2", "train.grad_accum=4")
    for _ in range(2):
        want, got = whole._train_step(), parts._train_step()
        assert got["load"] == want["load"]
        assert got["tokens"] == want["tokens"]
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        whole.step += 1
        parts.step += 1


def aux_loss(trainer: Trainer) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The loss that the routers add, and (logits, counts) of each layer."""
    inputs, _ = trainer.data.train.batch(0, 4, 64, 0)
    trainer.model(inputs)
    layers = [(moe.last_logits.double(), moe.last_routing.counts) for moe in trainer.model.moe_layers()]
    assert len(layers) == 2
    return trainer.one_step.balance_loss(), layers


def test_z_loss_by_hand(make_trainer):
    trainer = make_trainer("run", "router.z_coef=0.5", "router.balance=none")
    got, layers = aux_loss(trainer)
    want = sum(0.5 * logits.exp().sum(-1).log().square().mean() for logits, _ in layers)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("balance", ["loss", "global"])
def test_balance_loss_by_hand(make_trainer, balance):
    trainer = make_trainer("run", f"router.balance={balance}", "router.balance_coef=0.25")
    got, layers = aux_loss(trainer)
    want = sum(0.25 * 8 * (counts / 256 * logits.softmax(-1).mean(0)).sum() for logits, counts in layers)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_global_balance_of_one_process_is_that_of_each_micro_step(make_trainer):
    settings = ["train.steps=3", "router.balance_coef=1.0"]
    trainers = {
        name: make_trainer(name, *settings, f"router.balance={name}") for name in ("loss", "global", "none")
    }
    for trainer in trainers.values():
        trainer.run()
    assert losses(trainers["global"]) == losses(trainers["loss"])
    assert losses(trainers["global"]) != losses(trainers["none"])


def test_scales_of_the_learning_rate_reach_the_weights(make_trainer):
    """Adam's first step is lr * sign(gradient), so that its size shows the rate."""
    trainer = make_trainer(
        "run", "optim.lr=1e-3", "optim.expert_lr_scale=0.5", "optim.router_lr_scale=4.0",
        "optim.weight_decay=0.0", "optim.eps=1e-30", "train.steps=100",
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer._train_step()
    for name, parameter in trainer.model.named_parameters():
        scale = 0.5 if ".experts." in name else 4.0 if ".router." in name else 1.0
        moved = (parameter.detach() - before[name]).abs().max().item()
        assert moved == pytest.approx(scale * 1e-3, rel=1e-3), name


def test_a_time_budget_ends_the_run(make_trainer, monkeypatch):
    """A clock that a step moves by 10 s: steps begin at 0, 10 and 20 s, and none after 25 s."""
    clock = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    trainer = make_trainer("run", "train.time_budget_s=25.0", "train.log_every=1000")
    step = trainer._train_step

    def slow_step():
        clock[0] += 10
        return step()

    trainer._train_step = slow_step
    trainer.run()
    assert len(losses(trainer)) == 3
    assert not trainer.is_stopped
    assert load_checkpoint(latest_checkpoint(trainer.checkpoints)).step == 3


def test_a_signal_before_the_first_step_is_saved_as_it_says(make_trainer, monkeypatch, capsys):
    """Defends: "saved" where nothing is; such a run goes on as if nothing had been."""
    cut = make_trainer("cut", "train.steps=2")
    said = []
    monkeypatch.setattr(cut.line, "say", lambda text, style="": said.append(text))
    monkeypatch.setattr(type(cut.line), "__enter__", lambda line: line)
    run = cut._run
    monkeypatch.setattr(cut, "_run", lambda dense: (os.kill(os.getpid(), signal.SIGTERM), run(dense)))
    cut.run()
    assert said == ["stopped at step 0; saved, continue with --resume"]
    assert load_checkpoint(latest_checkpoint(cut.checkpoints)).step == 0
    whole, again = make_trainer("whole", "train.steps=2"), Trainer(cut.config, Console(quiet=True), True)
    for trainer in (whole, again):
        trainer.run()
    assert losses(again) == losses(whole)


def test_a_signal_while_ranks_agree_is_not_lost(make_trainer, monkeypatch):
    """Defends: a stop that comes after this rank has said that there is none."""
    trainer = make_trainer("run", "train.steps=3")
    ranks = SimpleNamespace(
        **{name: getattr(trainer.ranks, name) for name in ("rank", "size", "is_first", "first")}
    )

    def summed(*values):
        if len(values) == 3 and trainer.step == 1:
            trainer._on_signal()
        return [float(value) for value in values]

    ranks.summed = summed
    trainer.ranks = ranks
    trainer.run()
    assert trainer.is_stopped
    assert len(losses(trainer)) == 2


def test_cosine_by_hand():
    config = load_config("smoke", None, ["optim.lr=1.0", "optim.warmup_steps=10", "train.steps=110"])
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.55)
    assert learning_rate(110, config) == pytest.approx(0.1)


def test_wsd_by_hand():
    settings = ["optim.lr=1.0", "optim.warmup_steps=10", "train.steps=100", "optim.schedule=wsd"]
    config = load_config("smoke", None, [*settings, "optim.decay_fraction=0.2", "optim.min_lr_ratio=0.1"])
    rates = {0: 0.1, 9: 1.0, 10: 1.0, 50: 1.0, 80: 1.0, 85: 0.775, 90: 0.55, 99: 0.145, 100: 0.1}
    assert {step: learning_rate(step, config) for step in rates} == pytest.approx(rates)
