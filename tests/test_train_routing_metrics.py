"""What a run says of its routing: each value is that of the definition, and none of it changes the run."""

import io
import math
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from sigma_train import probe, routing_statistics
from sigma_train.load_limits import cv_floor, most_bound, most_floor
from sigma_train.metrics import deviations
from sigma_train.progress import RunLine, in_lines, loads
from sigma_train.routing_statistics import of_limits, of_loads, of_routers, sharpness, top1_sums
from test_train_guard import rows
from test_train_sparsity import SMALL  # noqa: F401 - of make_trainer

from sigma_kernels.nn import load_balancing_loss, top1_balancing_loss

SHORT = ("train.steps=6", "train.save_every=3", "train.eval_every=100", "train.batch_size=2")


def test_loads_of_known_counts():
    """Defends: a deviation without its sign, a spread of a sample, an entropy in nats, a dead expert passed over."""
    counts = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [8, 8, 0, 0]])
    got = {name: x.tolist() for name, x in (of_loads(counts) | of_limits(counts, 16, 0.375)).items()}
    assert got["load_most"] == [0, 3, 1]
    assert got["load_least"] == [0, -1, -1]
    assert got["load_cv"] == pytest.approx([0, math.sqrt(3), 1])
    assert got["load_entropy"] == pytest.approx([1, 0, 0.5])
    assert got["experts_dead"] == [0, 3, 2]
    assert got["load_most_bound"] == pytest.approx([4 * 0.375 - 1] * 3)
    twice = of_limits(2 * counts, 16, 0.375)  # two experts a token
    assert twice["load_most_bound"].tolist() == pytest.approx([4 * 0.375 / 2 - 1] * 3)
    assert twice["load_cv_floor"].tolist() == pytest.approx([math.sqrt((4 / 2 - 1) / 16)] * 3)


def test_the_loss_and_the_entropies_tell_the_two_ways_to_its_minimum_apart():
    """The study's finding: 1 where p is even and the load is not, as where both are, and as where the load alone is."""
    even, spiked = torch.full((4,), 0.25), torch.tensor([0.7, 0.1, 0.1, 0.1])
    p = torch.stack([even, even, spiked, spiked])
    counts = torch.tensor([[5, 5, 5, 5], [17, 1, 1, 1], [5, 5, 5, 5], [14, 2, 2, 2]])
    ones = torch.ones(4, dtype=torch.float64)
    sums = {"router_tokens": 20 * ones, "router_p": 20.0 * p.double(), "router_square": ones}
    sums |= {"router_entropy": ones, "router_top1": 10 * ones}
    got = of_routers(sums, ones, counts)
    assert got["balance_loss"].tolist() == pytest.approx([1, 1, 1, 4 * (0.49 + 3 * 0.01)])
    assert got["router_entropy_of_mean"][:2].tolist() == pytest.approx([1, 1])
    assert got["router_entropy_of_mean"][2] == pytest.approx(
        torch.special.entr(spiked).sum().item() / math.log(4)
    )
    assert got["router_top1"].tolist() == [0.5] * 4
    assert "top1_loss" not in got


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_sharpness_by_blocks(monkeypatch, score):
    logits = 3 * torch.randn(50, 7)
    p = logits.double().softmax(-1) if score == "softmax" else logits.double().sigmoid()
    p = p / p.sum(-1, keepdim=True)
    for block in (1, 21, 1 << 18):
        monkeypatch.setattr(routing_statistics, "BLOCK", block)
        got = sharpness(logits, score)
        assert got.entropy == pytest.approx(torch.special.entr(p).sum().item(), rel=1e-5)
        assert got.top1 == pytest.approx(p.amax(-1).sum().item(), rel=1e-5)
        q, largest = top1_sums(logits, 0.3)
        of_loss = 7 * (q / 50).square().sum() / (largest / 50)
        assert of_loss.item() == pytest.approx(top1_balancing_loss(logits.double(), 0.3).item(), rel=1e-5)


def test_limits_have_the_studys_values():
    """+332 % for the commonest token of 4.5 % at k = 1, nothing at k = 8; 22 % and +55 to 65 % at 2,048 tokens."""
    assert most_bound(96, 1, 0.045) == pytest.approx(3.32)
    assert most_bound(96, 8, 0.045) == pytest.approx(-0.46)
    assert cv_floor(96, 2048, 1) == pytest.approx(math.sqrt(96 / 2048), rel=1 / 96)
    assert 0.55 < most_floor(96, 2048, 1) < 0.65
    assert cv_floor(96, 2048, 96) == most_floor(96, 2048, 96) == 0, "all have all tokens"


@pytest.mark.parametrize("E, T, k", [(96, 2048, 1), (96, 4096, 8), (96, 512, 1), (8, 512, 4)])
def test_floors_are_what_chance_leaves(E, T, k):
    """Defends: choices with replacement, a normal deviate in a binomial's place; of 50 draws, to their error."""
    chance = np.random.default_rng(0)
    keys = (chance.random((T, E)) for _ in range(50))
    shares = np.stack(
        [np.bincount(np.argpartition(x, k - 1)[:, :k].ravel(), minlength=E) * E / T / k for x in keys]
    )
    assert cv_floor(E, T, k) == pytest.approx(np.sqrt(shares.var(1).mean()), rel=0.08)
    assert most_floor(E, T, k) == pytest.approx(shares.max(1).mean() - 1, rel=0.08)


def test_the_commonest_token(make_trainer):
    """Defends: a share of one block; a row at every start."""
    trainer = make_trainer("run", *SHORT, "guard.stats_every=2")
    _, counts = np.unique(np.asarray(trainer.data.train.tokens), return_counts=True)
    assert trainer.data.train.commonest == counts.max() / counts.sum()
    trainer.run()
    make_trainer("run", *SHORT, "guard.stats_every=2", resume=True).run()
    assert rows(trainer.out, "commonest_token") == {1: trainer.data.train.commonest}
    bound = 8 * trainer.data.train.commonest - 1
    assert rows(trainer.out, "layers")[6]["load_most_bound"] == pytest.approx([bound] * 2, rel=1e-4)


def test_the_commonest_token_by_blocks(make_trainer, monkeypatch):
    data = make_trainer("run", *SHORT).data.val
    monkeypatch.setattr("sigma_train.dataset.COUNT_BLOCK", 1000)
    assert data.num_tokens > 2000
    assert data.commonest == np.bincount(data.tokens).max() / data.num_tokens


@pytest.mark.parametrize("balance", ["top1", "loss"])
def test_losses_are_the_functions_of_the_whole_step(make_trainer, balance):
    """Defends: a mean over micro-batches, the counts of the interval, the loss at another temperature."""
    settings = ("train.grad_accum=2", "router.top1_temperature=0.3", f"router.balance={balance}")
    trainer = make_trainer("run", *SHORT, *settings, "guard.stats_every=2")
    logits = [[], []]
    for moe, seen in zip(trainer.model.moe_layers(), logits, strict=True):
        moe.register_forward_hook(lambda moe, *_, seen=seen: seen.append(moe.last_logits.detach()))
    trainer._train_step()
    for seen in logits:
        seen.clear()
    trainer.step = 1
    row = trainer._train_step()
    for layer, seen in enumerate(logits):
        of_step, counts = torch.cat(seen[:2]).double(), torch.tensor(row["load"][layer])
        want = load_balancing_loss(of_step, counts).item()
        assert row["layers"]["balance_loss"][layer] == pytest.approx(want, rel=1e-5)
        if balance == "top1":
            want = top1_balancing_loss(of_step, 0.3).item()
            assert row["layers"]["top1_loss"][layer] == pytest.approx(want, rel=1e-5)
        else:
            assert "top1_loss" not in row["layers"]


def test_how_many_choices_are_the_bias(make_trainer):
    trainer = make_trainer("run", *SHORT, "router.balance=bias", "guard.stats_every=1", "model.top_k=2")
    seen, layers = [], trainer.model.moe_layers()
    for moe in layers:
        moe.router.expert_bias.copy_(torch.linspace(0, 0.4, len(moe.router.expert_bias)))
        moe.register_forward_hook(lambda moe, *_: seen.append((moe.last_logits, moe.last_routing.indices)))
    row = trainer._train_step()
    for layer in range(len(layers)):
        of_step = seen[layer :: len(layers)][: trainer.config.train.grad_accum]
        best = torch.cat([logits.topk(2).indices for logits, _ in of_step])
        chosen = torch.cat([indices for _, indices in of_step])
        want = 1 - (chosen[:, :, None] == best[:, None, :]).any(2).double().mean().item()
        assert 0.05 < want < 1
        assert row["layers"]["bias_overruled"][layer] == pytest.approx(want, rel=1e-5)


def test_how_far_biases_are_apart(make_trainer):
    trainer = make_trainer("run", *SHORT, "router.balance=bias", "guard.stats_every=1")
    for _ in range(3):
        row = trainer._train_step()
        trainer.step += 1
    biases = [moe.router.expert_bias for moe in trainer.model.moe_layers()]
    assert row["layers"]["bias_spread"] == pytest.approx([float(b.max() - b.min()) for b in biases], rel=1e-5)
    assert max(row["layers"]["bias_spread"]) > 0


@pytest.mark.parametrize(
    "now, last, want",
    [
        ([[0], [1], [2], [3]], [[0], [1], [2], [0]], 0.25),
        ([[0, 1], [2, 3]], [[1, 0], [2, 1]], 0.25),  # the order of slots is no choice
        ([[3], [1]], [[3, 1], [3, 1]], 0.5),  # k has fallen: of the best of before
        ([[3, 1], [1, 3]], [[3], [3]], 0.5),
    ],
)
def test_changed_choices(now, last, want):
    assert probe.changed(torch.tensor(now), torch.tensor(last)) == want


def test_changes_are_of_fixed_tokens_since_the_last_look(make_trainer, tmp_path):
    """Defends: a probe of the step's own tokens; choices at the first look; changes over a restart or going back."""
    trainer = make_trainer("run", *SHORT, "guard.stats_every=1", "optim.lr=0.05")
    trainer.run()
    changes = {step: layers["routing_changes"] for step, layers in rows(trainer.out, "layers").items()}
    assert changes[1] == [None, None]
    assert all(0 <= share <= 1 for step in range(2, 7) for share in changes[step])
    assert max(changes[2]) > 0
    look = trainer.layers._probe
    assert look.changes(trainer.model, trainer.ranks).tolist() == [0, 0], "no weight has moved"
    inputs = look._tokens
    with torch.no_grad():
        trainer.model(inputs)
    before = [moe.last_routing.indices for moe in trainer.model.moe_layers()]
    with torch.no_grad():
        trainer.model.layers[1].mlp.router.weight.normal_()
        trainer.model(inputs)
    after = [moe.last_routing.indices for moe in trainer.model.moe_layers()]
    want = [(a != b).double().mean().item() for a, b in zip(after, before, strict=True)]
    assert look.changes(trainer.model, trainer.ranks).tolist() == pytest.approx(want)
    assert want[0] == 0 < want[1]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    again = make_trainer("run", *SHORT, "guard.stats_every=1", "optim.lr=0.05", resume=True)
    again.run()
    of_again = {step: layers["routing_changes"] for step, layers in rows(again.out, "layers").items()}
    assert of_again == changes | {4: [None, None]}
    back = again.layers.row(2, [torch.ones(8, dtype=torch.int32)] * 2, again.ranks)  # the run has gone back
    assert back["layers"]["routing_changes"] == [None, None]


def test_the_probe_is_spread_over_the_validation_text(make_trainer):
    trainer = make_trainer("run", *SHORT)
    tokens, t = trainer.layers._probe._tokens, trainer.config.train
    windows = trainer.data.val.num_windows(t.seq_len)
    assert tokens.shape == (8, t.seq_len)
    for row, window in zip(tokens, (windows * i // 8 for i in range(8)), strict=True):
        want = trainer.data.val.tokens[window * t.seq_len : (window + 1) * t.seq_len]
        assert row.tolist() == want.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ('router.balance="top1"', "train.dtype=bf16"),
        ("sparsity.sample=[1, 2]",),
        ('router.balance="bias"',),
    ],
    ids=["plain", "top1-bf16", "sampled", "bias"],
)
def test_a_run_is_the_same_with_looks_and_without(make_trainer, settings):
    """Defends: a probe that draws, that leaves k or a gradient behind, that moves a bias."""
    runs = [make_trainer(f"run{every}", *SHORT, *settings, f"guard.stats_every={every}") for every in (0, 1)]
    for trainer in runs:
        trainer.run()
    plain, looked = (
        {name: rows(t.out, name) for name in ("loss", "grad_norm", "load", "val_bits_per_byte")} for t in runs
    )
    assert plain == looked
    of_plain, of_looked = (trainer.model.state_dict() for trainer in runs)
    assert all(torch.equal(of_plain[name], of_looked[name]) for name in of_plain)


def test_a_dense_model_has_no_routing(make_trainer, monkeypatch):
    """Defends: a probe of a model that has no router."""
    trainer = make_trainer("run", *SHORT, "model.num_experts=1", "guard.stats_every=1")
    monkeypatch.setattr(probe.Probe, "changes", lambda *_: pytest.fail("a probe of a dense model"))
    row = trainer._train_step()
    assert not [name for name in row["layers"] if name.startswith(("load", "rout", "expert", "bal", "bias"))]
    assert "commonest_token" not in row


def test_limits_are_of_the_k_of_the_interval(make_trainer):
    """Defends: the k of the end for an interval in which it has changed."""
    phases = "sparsity.phases=[[0, [4, 2]], [0.5, [1, 1]]]"
    trainer = make_trainer("run", *SHORT, phases, "guard.stats_every=2")
    trainer.run()
    layers, tokens = rows(trainer.out, "layers"), 2 * 2 * trainer.config.train.seq_len
    for step, ks in {2: (4, 2), 4: (2.5, 1.5), 6: (1, 1)}.items():
        assert layers[step]["load_cv_floor"] == pytest.approx([cv_floor(8, tokens, k) for k in ks], rel=1e-4)
        assert layers[step]["load_most_floor"] == pytest.approx(
            [most_floor(8, tokens, k) for k in ks], rel=1e-4
        )


def test_the_line_names_the_lowest_layer_and_the_worst():
    """Defends: the idlest expert of one layer beside the busiest of another; a lost sign; another layer's entropies;
    a look without an earlier one.
    """
    load = [[6, 2, 4, 4], [4, 4, 0, 4], [12, 4, 0, 0]]
    assert deviations(load[::2]) == [(0.5, -0.5), (2, -1)]
    quarter = (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(4)
    assert loads(load, {}) == ["L0 +50/-50%", worst := f"L2 +200/-100% H{quarter:.2f}", "3 dead"]
    assert loads([[4, 4], [4, 4]], {}) == ["L0 +0/+0% H1.00"]
    assert loads([[0, 8], [4, 4]], {}) == ["L0 +100/-100% H0.00", "1 dead"]
    look = {"router_entropy_of_mean": [0.25, 0.5, 0.999], "routing_changes": [0.1, 0.25, 0.13]}
    assert loads(load, look) == ["L0 +50/-50%", f"{worst} p1.00", "16% rerouted", "3 dead"]
    first = {"router_entropy_of_mean": [0.25, None, None], "routing_changes": [None] * 3}
    assert loads(load, first) == ["L0 +50/-50%", worst, "3 dead"]


LOAD = [[125, *[21] * 91, 12, 0, 0, 0], *[[21] * 96] * 9, [1196, *[100] * 8, 52, *[0] * 86]]
FULL = {"share": 0.93, "load": LOAD, "utilisation": 0.95, "mfu_useful": 0.4}


LOOK = {"router_entropy_of_mean": [0.99] * 11, "routing_changes": [0.3] * 11}


@pytest.mark.parametrize(("look", "rows"), [({}, 2), (LOOK, 3)], ids=["", "look"])
@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_line_fits_80_columns(is_terminal, look, rows):
    """Defends: figures cut off at the edge of a terminal, or broken in the middle; a look that is not shown."""
    console = Console(width=80, force_terminal=is_terminal, file=io.StringIO())
    with RunLine(console, 0, 100_000) as line:
        line.look(look)
        line.update(12_345, 10.1234, 1_234_567.0, **FULL)
    shown = Console(width=80, file=io.StringIO())
    shown.print(line._live.renderable)
    text = (shown if is_terminal else console).file.getvalue()
    assert len(text.splitlines()) == (rows if is_terminal else 2)
    assert max(map(len, text.splitlines())) <= 80
    assert ("p0.99  30% rerouted" in text) == bool(look)
    parts = ("loss 10.1234", "1,234,567 tokens/s", "93% of dense", "L0 +486/-100%", "util 95%", "mfu 40%")
    assert all(part in text for part in (*parts, "L10 +5506/-100% H0.35", "89 dead"))


def test_a_wide_log_has_one_line_a_step():
    parts = ["step 1/2", "loss 1.0", "L0 +50/-50%"]
    assert in_lines(parts, 100) == "step 1/2  loss 1.0  L0 +50/-50%"
    assert in_lines(parts, 20) == "step 1/2  loss 1.0\n    L0 +50/-50%"
