"""Statistics of each layer are those of the definition in f64, and what goes wrong is named where it began."""

import math
from collections import defaultdict
from contextlib import nullcontext

import forked
import pytest
import rank_faults
import torch
from rich.console import Console
from sigma_train import step as one_step
from sigma_train.guard import Diverged
from sigma_train.layer_statistics import square_and_largest
from sigma_train.loop import Trainer
from sigma_train.metrics import read_metrics
from sigma_train.origin import gradients_backward
from sigma_train.report import layers_figure, png
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train_guard import rows
from test_train_learning import SMALL  # noqa: F401 - of make_trainer
from torch import Tensor

OF_ROUTING = {
    *("load_most", "load_least", "load_cv", "load_entropy", "experts_dead"),
    *("load_cv_floor", "load_most_floor", "load_most_bound", "balance_loss", "routing_changes"),
}
TWO = ("train.steps=2", "train.grad_accum=2", "train.batch_size=2", "train.eval_every=100")


class Naive:
    """Outputs and gradients of one step, kept whole."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.outputs: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        self.logits: dict[int, list[Tensor]] = defaultdict(list)
        self.gradients: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
        for i, block in enumerate(trainer.model.layers):
            for name, module in (("attention", block.self_attn), ("mlp", block.mlp), ("residual", block)):
                module.register_forward_hook(lambda m, _, out, key=(name, i): self._keep(key, m, out))
        clip = one_step.clip

        def keep_gradients(model, most):
            for i, block in enumerate(model.layers):
                for name, p in block.named_parameters():
                    group = "norms" if p.dim() == 1 else "mlp" if name.startswith("mlp.") else "attention"
                    group = next((part for part in ("router", "experts") if f"mlp.{part}." in name), group)
                    self.gradients[group, i].append(p.grad.double().flatten())
            return clip(model, most)

        monkeypatch.setattr(one_step, "clip", keep_gradients)

    def _keep(self, key, module, out) -> None:
        if not torch.is_grad_enabled():  # the probe of routing_changes is no part of the step
            return
        self.outputs[key].append(out.detach().double().flatten())
        if hasattr(module, "last_logits"):
            self.logits[key[1]].append(module.last_logits.detach().double())

    def values(self, score: str, layers: int) -> dict[str, list[float]]:
        want = defaultdict(list)
        for i in range(layers):
            for name in ("attention", "mlp", "residual"):
                x = torch.cat(self.outputs[name, i])
                want[f"{name}_rms"].append(x.square().mean().sqrt())
                want[f"{name}_largest"].append(x.abs().max())
                want[f"{name}_nonfinite"].append(0)
            for group, layer in self.gradients:
                if layer == i:
                    g = torch.cat(self.gradients[group, i])
                    want[f"{group}_gradient_norm"].append(g.norm())
                    want[f"{group}_gradient_largest"].append(g.abs().max())
            if i in self.logits:
                logits = torch.cat(self.logits[i])
                scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
                p = scores / scores.sum(-1, keepdim=True)
                uniform = math.log(p.shape[1])
                want["router_logit_largest"].append(logits.abs().max())
                want["router_logsumexp_rms"].append(logits.logsumexp(-1).square().mean().sqrt())
                want["router_entropy_of_mean"].append(torch.special.entr(p.mean(0)).sum() / uniform)
                want["router_entropy"].append(torch.special.entr(p).sum(-1).mean() / uniform)
                want["router_top1"].append(p.amax(-1).mean())
        return want


@pytest.mark.parametrize(
    "settings, score",
    [
        (("optim.grad_clip=0.01", "model.init_std=0.2"), "softmax"),
        (("router.aux_score=sigmoid", "router.score=sigmoid"), "sigmoid"),
        (("train.dtype=bf16",), "softmax"),
        (("model.num_experts=1",), None),
        (("model.num_experts=1", "train.dtype=bf16"), None),
    ],
    ids=["f32", "sigmoid", "bf16", "dense", "dense-bf16"],
)
def test_statistics_are_those_of_the_definition(make_trainer, monkeypatch, settings, score):
    """Defends: gradients after clipping, a micro-batch or a layer left out, probabilities of another score."""
    trainer = make_trainer("run", *TWO, *settings, "guard.stats_every=1")
    naive = Naive(trainer, monkeypatch)
    row = trainer._train_step()
    want, got = naive.values(score, 2), row["layers"]
    assert got.keys() == want.keys() | (OF_ROUTING if score else set()) | {"steps"}
    for name, values in want.items():
        assert got[name] == pytest.approx([float(value) for value in values], rel=1e-5), name


def test_loads_are_of_the_whole_interval(make_trainer):
    """Defends: the loads of the last step alone; steps of before going back counted twice."""
    trainer = make_trainer("run", "train.steps=7", "train.save_every=100", "guard.stats_every=3")
    trainer.run()
    load, layers = rows(trainer.out, "load"), rows(trainer.out, "layers")
    assert sorted(layers) == [3, 6]
    for end, values in layers.items():
        counts = torch.tensor([load[step] for step in range(end - 2, end + 1)]).sum(0).double()
        relative = counts / counts.mean(1, keepdim=True) - 1
        assert values["steps"] == 3
        assert values["load_most"] == pytest.approx(relative.amax(1).tolist(), rel=1e-5)
        assert values["load_least"] == pytest.approx(relative.amin(1).tolist(), rel=1e-5)
        assert values["experts_dead"] == (counts == 0).sum(1).tolist()
    whole = trainer.layers
    counts = [torch.tensor([2, 0, 1, 1, 0, 0, 0, 0])] * 2
    whole.row(8, counts, trainer.ranks)
    whole.row(2, counts, trainer.ranks)  # gone back
    assert whole._steps == 1
    assert torch.equal(whole._counts, torch.stack(counts))


def hooks(trainer: Trainer) -> int:
    return sum(len(module._forward_hooks) for module in trainer.model.modules())


def test_hooks_are_there_in_steps_that_are_due_alone(make_trainer, monkeypatch):
    trainer = make_trainer("run", "train.steps=5", "train.eval_every=2", "guard.stats_every=2")
    seen, cross_entropy = {}, trainer.one_step._cross_entropy

    def look(number, micro):
        seen[number + 1] = hooks(trainer)
        return cross_entropy(number, micro)

    monkeypatch.setattr(trainer.one_step, "_cross_entropy", look)
    monkeypatch.setattr(trainer, "_validate", lambda: seen.setdefault("validation", hooks(trainer)))
    trainer.run()
    assert seen == {1: 0, 2: 6, 3: 0, 4: 6, 5: 0, "validation": 0}
    monkeypatch.setattr(trainer.one_step, "_cross_entropy", lambda number, micro: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer._train_step()
    assert hooks(trainer) == 0


def test_a_run_is_the_same_with_statistics_and_may_resume_with_others(make_trainer):
    """Defends: a number of the run that statistics change."""
    plain = make_trainer("plain", "train.steps=4", "train.save_every=2")
    plain.run()
    looked = make_trainer("looked", "train.steps=4", "train.save_every=2", "guard.stats_every=1")
    looked.run()
    assert all(map(torch.equal, plain.model.parameters(), looked.model.parameters()))
    config = plain.config.model_copy(
        update={"guard": plain.config.guard.model_copy(update={"stats_every": 3})}
    )
    again = Trainer(config, Console(quiet=True), True)
    again.metrics.close()
    assert again.step == 4


def test_statistics_are_on_the_board_and_in_the_report(make_trainer):
    trainer = make_trainer("run", "train.steps=4", "guard.stats_every=2")
    trainer.run()
    board = EventAccumulator(str(trainer.out / "tensorboard")).Reload()
    layers = rows(trainer.out, "layers")
    for name in layers[4].keys() - {"steps"}:
        for layer in (0, 1):
            events = board.Scalars(f"{name}/layer_{layer}")
            assert [event.step for event in events] == ([2, 4] if name != "routing_changes" else [4])
            assert events[-1].value == pytest.approx(layers[4][name][layer], rel=1e-5)
    figure = layers_figure(list(read_metrics(trainer.out / "metrics.jsonl")))
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title] == [
        "residual stream after the layer, rms",
        "norm of the layer's gradient",
        "largest |logit| of the router",
        "entropy of the router over log E: 0 decided, 1 undecided",
    ]


@pytest.mark.parametrize("rms", [[None, 0.0], [None, None], [1.0, 1.0]])
def test_values_that_have_no_colour_are_drawn(make_trainer, rms):
    """No number, and zero, which has no logarithm; of one row."""
    trainer = make_trainer("run", "model.num_experts=1", "guard.stats_every=1")
    row = trainer._train_step()
    row["layers"]["residual_rms"] = rms
    figure = layers_figure([{"step": 1, **row}])
    assert len([axes for axes in figure.axes if axes.get_title()]) == 2, "a dense model has no router"
    assert png(figure).startswith(b"\x89PNG")


def test_norms_of_numbers_that_are_none_or_too_large():
    """Defends: a sum that overflows while the numbers do not; NaN passed over by a maximum."""
    x = torch.randn(7, 33)
    square, largest = square_and_largest(x)
    assert square == pytest.approx(x.double().square().sum().item(), rel=1e-6)
    assert largest == x.abs().max()
    square, largest = square_and_largest(x * 1e30)
    assert square == pytest.approx(1e60 * x.double().square().sum().item(), rel=1e-6)
    x[3, 3] = math.nan
    square, largest = square_and_largest(x)
    assert math.isnan(square)
    assert largest == math.inf


def told(trainer: Trainer) -> str:
    with pytest.raises(Diverged) as caught:
        trainer._train_step()
    return str(caught.value)


@pytest.mark.parametrize("every", [0, 1])
def test_a_weight_that_is_infinite_is_named_with_its_layer(make_trainer, every):
    """Defends: the last place that is not finite, or the first layer after it, named in place of the first."""
    trainer = make_trainer("run", "model.num_layers=4", f"guard.stats_every={every}")
    moe = trainer.model.layers[2].mlp
    with torch.no_grad():
        moe.experts.down_proj[5, 3, 3] = math.inf
        trainer.model.layers[3].input_layernorm.weight[0] = math.nan
        moe.router.weight[5] *= 100  # so that someone goes there
    message = told(trainer)
    assert (
        "; the first that is not finite is the experts' output in layer 2 (rank 0, micro-batch 1)" in message
    )
    assert ", and so is the weight expert 5 of layers.2.mlp.experts.down_proj (rank 0); no checkp" in message
    assert hooks(trainer) == 0


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("self_attn.o_proj.weight", 3e38, "attention's output in layer 1 (rank 0, micro-batch 1); no"),
        ("mlp.router.weight", 3e38, "the router's logits in layer 1 (rank 0, micro-batch 1); no"),
        ("post_attention_layernorm.weight", math.nan, "router's logits in layer 1 (rank 0, micro-batch 1), and so"),
    ],
)  # fmt: skip
def test_the_place_is_named_where_each_weight_is_a_number_too(make_trainer, name, value, words):
    trainer = make_trainer("run")
    trainer.model.layers[1].get_parameter(name).data.fill_(value)
    assert words in told(trainer)


def test_the_mlp_of_a_dense_model_is_named_in_bf16(make_trainer):
    trainer = make_trainer("run", "model.num_experts=1", "train.dtype=bf16")
    trainer.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    message = told(trainer)
    assert (
        "the MLP's output in layer 0 (rank 0, micro-batch 1), and so is the weight layers.0.mlp.down"
        in message
    )


def test_the_micro_batch_is_named(make_trainer):
    """Of a token that the first micro-batch does not have."""
    trainer = make_trainer("run", *TWO, "model.tie_embeddings=false")
    t = trainer.config.train
    first, second = (
        set(trainer.data.train.batch(micro, t.batch_size, t.seq_len, t.seed, 0, 1)[0].flatten().tolist())
        for micro in (0, 1)
    )
    trainer.model.embed_tokens.weight.data[min(second - first)] = math.nan
    assert "is the embedding (rank 0, micro-batch 2), and so is the weight embed_tokens.weight" in told(
        trainer
    )


def hurt_gradients(monkeypatch: pytest.MonkeyPatch, hurt) -> None:
    clip = one_step.clip

    def first_hurt(model, most):
        hurt(dict(model.named_parameters()))
        return clip(model, most)

    monkeypatch.setattr(one_step, "clip", first_hurt)


def test_a_gradient_is_named_where_the_forward_is_finite(make_trainer, monkeypatch):
    """Defends: the first in the order of the forward; all of them NaN after clipping by a norm that is none."""

    def hurt(of):
        of["layers.0.self_attn.q_proj.weight"].grad.fill_(math.nan)
        of["layers.1.self_attn.o_proj.weight"].grad[1, 1] = math.inf
        of["layers.1.self_attn.k_norm.weight"].grad.fill_(math.nan)

    hurt_gradients(monkeypatch, hurt)
    message = told(make_trainer("run"))
    assert (
        "; the forward is finite, the first gradient back from the loss that is not is that of layers.1"
        in message
    )
    assert " layers.1.self_attn.o_proj.weight (rank 0); no checkpoint" in message


def test_gradients_come_in_the_order_of_the_backward(make_trainer):
    """As torch itself accumulates them, in what lies on one path."""
    trainer = make_trainer("run")
    order = []
    for name, p in trainer.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    trainer.one_step.gradients(0)
    names = [name for name, _ in gradients_backward(trainer.model)]
    on_path = ("norm.weight", "input_layernorm", "o_proj", "post_attention_layernorm", "down_proj", "embed")

    def of_path(names: list[str]) -> list[str]:
        return [name for name in names if any(part in name for part in on_path) and "_norm." not in name]

    assert of_path(names) == of_path(order)
    place = {name: i for i, name in enumerate(names)}
    assert place["layers.0.self_attn.o_proj.weight"] < place["layers.0.self_attn.k_norm.weight"]
    assert place["layers.0.self_attn.k_norm.weight"] < place["layers.0.self_attn.q_proj.weight"]


def test_what_has_passed_is_said_to_have(make_trainer, monkeypatch):
    """As of a machine that computes wrong once."""
    trainer = make_trainer("run")
    cross_entropy, calls = trainer.one_step._cross_entropy, []
    monkeypatch.setattr(
        trainer.one_step,
        "_cross_entropy",
        lambda n, i: cross_entropy(n, i) * (math.nan if not calls and not calls.append(i) else 1),
    )
    assert "; computed again the loss is finite, so that what was wrong has passed; " in told(trainer)


def test_the_largest_gradient_is_named_where_each_is_a_number(make_trainer, monkeypatch):
    """A norm that overflows, and a spike."""
    trainer = make_trainer("run")
    trainer.one_step.gradients(0)
    gate = trainer.model.layers[1].mlp.experts.gate_up_proj
    gate.grad.mul_(1e4)
    assert (
        trainer.one_step.origin(0, 1.0, 1.0)
        == "100% of its square are the gradient of layers.1.mlp.experts.gate_up_proj"
    )
    trainer.optimizer.zero_grad()
    hurt_gradients(monkeypatch, lambda of: of["layers.1.mlp.router.weight"].grad.fill_(1e30))
    message = told(trainer)
    assert (
        "gradient norm inf; every number of the gradient is finite, and 100% of its square are the" in message
    )
    assert "gradient of layers.1.mlp.router.weight; " in message


def test_a_spike_that_is_kept_says_of_what_it_is(make_trainer, monkeypatch):
    trainer = make_trainer("run")
    monkeypatch.setattr(trainer.guard, "trouble", lambda loss, norm: ("keep", f"loss {loss:.6g}"))
    assert "% of its square are the gradient of " in trainer._train_step()["guard"]


def test_a_weight_of_one_rank_is_named_with_it(cache, tmp_path):
    """On two ranks; what one rank's expert spoils is in the outputs of both."""
    args = ["train", "--preset", "smoke", "--steps", "8", "--set", "train.rank_timeout_s=60"]
    args += ["--out", str(tmp_path / "run")]
    results = forked.on_ranks(2, args, cache, rank_faults.infinite_weight_of_an_expert)
    assert [result.returncode for result in results] == [1, 1], results
    result = results[0]
    place = "the first that is not finite is the experts' output in layer 1 (rank 0, micro-batch 1)"
    assert f"step 3: loss nan, gradient norm nan; {place}, and so is the weight expert 6 of" in result.stderr
    assert "expert 6 of layers.1.mlp.experts.down_proj (rank 1); no checkpoint" in result.stderr


def test_micro_steps_add_where_gradients_are_computed(make_trainer, monkeypatch):
    """As autograd's, which writes each micro-step's gradient and then adds it.

    Defends: a micro-step that is added twice or not; a context that is entered in vain.
    """
    trainer = make_trainer("run", "train.grad_accum=3", "train.batch_size=2")

    def gradients() -> tuple[list[Tensor], int]:
        with torch.profiler.profile() as record:
            trainer.one_step.gradients(0)
        found = [p.grad.clone() for p in trainer.model.parameters()]
        trainer.optimizer.zero_grad(set_to_none=True)
        return found, sum(event.name == "sigma::moe_experts_backward_" for event in record.events())

    ours, added = gradients()
    monkeypatch.setattr(one_step.sk, "accumulate_grad", nullcontext)
    theirs, none = gradients()
    assert (added, none) == (2 * len(trainer.model.moe_layers()), 0)
    for mine, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, want)
