"""Matryoshka MoE (arXiv 2509.26520): one model for every k, against specialists that were trained at one.

All go on from one checkpoint of k = 2, for the same tokens: at a fixed k, or at a k drawn for each step, for each
micro-batch, or for each layer of one.  Each is then measured at every k, the fixed ones too, beyond the largest k
of training as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from sigma_train import elastic as el
from sigma_train.elastic_allocation import Allocation, allocate
from sigma_train.expert_counts import ExpertCounts
from sigma_train.model import flops_per_token

from sigma_experiments import sparse
from sigma_experiments.lab import SHORT, Lab, Run, Trained
from sigma_experiments.page import Page, draw, spread, table

TRAINED, BEYOND = (1, 2, 3, 4), (5, 6)
MEAN_K = 2.5  # what a uniform draw has, and the budget of the search
LAYERS = 4
BASE = {
    "model.vocab_size": 257,  # bytes
    "model.num_layers": LAYERS,
    "model.num_experts": 8,
    "model.top_k": 2,
    "router.normalize": True,
    "router.normalize_one": True,
    "router.balance_coef": 1e-2,
    "data.max_bytes": 20_000_000,
    "optim.lr": 3e-3,
    "optim.schedule": "wsd",
    "optim.decay_fraction": 0.0,
    "optim.warmup_steps": 30,
    "train.steps": 400,
    "train.batch_size": 2,
    "train.grad_accum": 4,
    "train.eval_every": 400,
    "train.save_every": 400,
}
GOES_ON = {"optim.decay_fraction": 0.5, "optim.warmup_steps": 0, "train.init_optimizer": True}
SAMPLE = {"model.top_k": 4, "sparsity.sample": TRAINED}
ARMS: dict[str, dict[str, Any]] = {
    **{f"fixed-{k}": {"model.top_k": k} for k in TRAINED},
    "fixed-1-plain": {"model.top_k": 1, "router.normalize": False},
    **{name: {**SAMPLE, "sparsity.granularity": name} for name in ("global", "micro-batch", "layer")},
}
DRAWN = ("global", "micro-batch", "layer")
TITLES = {
    **{f"fixed-{k}": f"k = {k}" for k in TRAINED},
    "fixed-1-plain": "k = 1, weight p",
    **{
        name: f"drawn for each {what}"
        for name, what in zip(DRAWN, ("step", "micro-batch", "layer"), strict=True)
    },
}
BASE_SEED = 1000  # added to an arm's: its text comes in another order than that of the base

Curves = dict[str, np.ndarray]  # of each arm [seeds, k]


def run(lab: Lab) -> Page:
    trained = train(lab)
    work = [(name, run) for name, runs in trained.items() for run in runs]
    with lab.threads() as pool:
        measured = [*pool.map(lambda item: every_k(item[1], lab.is_short), work)]
        plans = [*pool.map(lambda one: searched(one, lab.is_short), trained["layer"])]
    by_arm: dict[str, list[list[el.Measured]]] = {}
    for (name, _), each in zip(work, measured, strict=True):
        by_arm.setdefault(name, []).append(each)
    bits = {
        name: np.array([[m.bits_per_byte for m in seed] for seed in runs]) for name, runs in by_arm.items()
    }
    cost = {name: training_flops(runs[0]) for name, runs in trained.items()}
    return Page(
        "One model for every k",
        text(trained["layer"], bits, cost, plans),
        {"loss": loss_figure(bits), "load": load_figure(by_arm)},
        data(by_arm, bits, cost, plans),
    )


def train(lab: Lab) -> dict[str, list[Trained]]:
    short = SHORT | {"train.grad_accum": 2} if lab.is_short else {}
    bases = [Run("base", BASE_SEED + seed, {**BASE, **short}) for seed in range(lab.seeds)]
    begun = lab.train(bases)
    runs = {
        name: [
            Run(name, seed, {**BASE, **GOES_ON, **short, **own, "train.init_from": str(begun[base].folder)})
            for seed, base in enumerate(bases)
        ]
        for name, own in ARMS.items()
    }
    found = lab.train([run for each in runs.values() for run in each])
    return {name: [found[run] for run in each] for name, each in runs.items()}


def every_k(trained: Trained, is_short: bool) -> list[el.Measured]:
    elastic = el.load(trained.folder)
    text = validation(elastic, is_short)
    return [el.measure(elastic, elastic.uniform(k), text) for k in TRAINED + BEYOND]


def searched(trained: Trained, is_short: bool) -> Allocation:
    elastic = el.load(trained.folder)
    return allocate(elastic, validation(elastic, is_short), MEAN_K, min(TRAINED), max(TRAINED))


def validation(elastic: el.Elastic, is_short: bool) -> list[el.Batch]:
    rows, count = (4, 2) if is_short else (32, 16)
    return [*elastic.validation.eval_batches(rows, elastic.config.train.seq_len, count)]


def training_flops(trained: Trained) -> float:
    """Of a token, on average over the steps."""
    elastic = el.load(trained.folder)
    k = ExpertCounts(trained.config).mean(0, trained.config.train.steps)
    return flops_per_token(elastic.model, trained.config, k)


def specialists(bits: Curves) -> np.ndarray:
    """[seeds, k]: at each k of training the fixed run's loss; at 1 of that way to weigh which is better on average."""
    ways = [bits["fixed-1"][:, 0], bits["fixed-1-plain"][:, 0]]
    best = min(ways, key=lambda way: way.mean())
    return np.stack([best, *(bits[f"fixed-{k}"][:, k - 1] for k in TRAINED[1:])], axis=1)


def gap(bits: Curves, name: str) -> np.ndarray:
    """mean_k (loss(k) - loss of the specialist of k), of each seed."""
    return (bits[name][:, : len(TRAINED)] - specialists(bits)).mean(1)


def fall(bits: Curves, name: str) -> np.ndarray:
    """loss(1) - loss(4), of each seed."""
    return bits[name][:, 0] - bits[name][:, len(TRAINED) - 1]


def text(
    layer: Sequence[Trained], bits: Curves, cost: Mapping[str, float], plans: Sequence[Allocation]
) -> str:
    config = layer[0].config
    t = config.train
    per_step = t.batch_size * t.grad_accum * t.seq_len
    losses = [
        [TITLES[name], *(spread(list(bits[name][:, i]), 3) for i in range(len(TRAINED + BEYOND)))]
        for name in ARMS
    ]
    keys = [
        [
            TITLES[name],
            spread(list(gap(bits, name)), 4),
            spread(list(fall(bits, name)), 4),
            f"{cost[name] / cost['fixed-4']:.2f}",
        ]
        for name in ("fixed-1", "fixed-2", "fixed-3", "fixed-4", *DRAWN)
    ]
    gains = [gain for found in plans for gain in found.gains()]
    found = "; ".join(el.in_words(each.found.plan) for each in plans)
    saved = [f"{g:+.4f} ± {e:.4f} over {el.in_words(plan)}" for plan, g, e in gains]
    suite = sum(cost[f"fixed-{k}"] for k in TRAINED) / cost["layer"]
    return f"""
{LAYERS} layers of {config.model.num_experts} experts, hidden size {config.model.hidden_size}, bytes of Python source,
{sparse.seeds_of(layer)}, mean [lowest, highest]. A base of {t.steps} steps of {per_step:,} tokens at k = 2; then,
from its weights and moments, {t.steps} steps of each arm on the same text, {t.grad_accum} micro-batches a step. Weights
of the chosen are divided by their sum at every k, at 1 too; "weight p" is a specialist of one expert whose weights are
never divided, so that its router has a gradient of the task. Every arm is measured at every k on the same validation
text; no arm was trained beyond k = {max(TRAINED)}, so what stands there is extrapolation. Bits per byte:

{table(["trained at", *(f"k = {k}" for k in TRAINED), *(f"k = {k}, extrapolated" for k in BEYOND)], losses)}

![Loss at every k](matryoshka-loss.png)

Against the specialists, one for each k in 1..{max(TRAINED)}, at 1 the better of the two: what an arm loses to them on
average over these k, how much it loses from k = {max(TRAINED)} to 1, and what training on a token costs:

{table(["trained at", "mean_k (loss - specialist's)", "loss(1) - loss(4)", "FLOPs, of k = 4"], keys)}

The four specialists together took {suite:.1f} times the FLOPs of the one model whose k is drawn.

![Load at every k](matryoshka-load.png)

Expert load at every k: the busiest expert over an even share, and the entropy of the load over log E (1: even), both of
the layer where they are worst; a thin line a seed, a thick one their mean.

A k for each layer, with a mean of {MEAN_K}, searched on half of the validation batches with the model whose k is drawn
for each layer: {found}. Bits per byte that this saves on the other half over an even spread, and their standard
error: {"; ".join(saved) or "it is the even spread"}.
"""


def loss_figure(bits: Curves) -> Figure:
    """Loss over k: each arm, a thin line a seed; crosses are the specialists."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    ks = TRAINED + BEYOND
    for axes, names in zip(panels, ([f"fixed-{k}" for k in TRAINED], DRAWN), strict=True):
        for number, name in enumerate(names):
            for seed in bits[name]:
                axes.plot(ks, seed, color=f"C{number}", linewidth=0.6, alpha=0.5)
            axes.plot(ks, bits[name].mean(0), color=f"C{number}", linewidth=2, label=TITLES[name])
        axes.plot(TRAINED, specialists(bits).mean(0), "kx", markersize=8, label="specialists")
        axes.axvspan(max(TRAINED) + 0.5, max(ks) + 0.5, color="gray", alpha=0.15)
        axes.set(
            xlabel="k at inference; gray: beyond training", title="fixed k" if names != DRAWN else "k drawn"
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    panels[0].set_ylabel("bits per byte")
    figure.tight_layout()
    return figure


def load_figure(by_arm: Mapping[str, list[list[el.Measured]]]) -> Figure:
    """Load over k: fixed left, drawn right; a thin line a seed."""
    figure, grid = plt.subplots(2, 2, figsize=(12, 8), sharex=True, sharey="row")
    for number, (name, seeds) in enumerate(by_arm.items()):
        most = 100 * np.array([[max(m.load()["most"]) for m in seed] for seed in seeds])
        entropy = np.array([[min(m.load()["entropy"]) for m in seed] for seed in seeds])
        for axes, values in zip(grid[:, int(name in DRAWN)], (most, entropy), strict=True):
            draw(axes, TRAINED + BEYOND, values, f"C{number}", TITLES[name])
    for column, what in zip(grid.T, ("fixed k", "k drawn"), strict=True):
        column[0].set(title=what)
        column[1].set(xlabel="k at inference; gray: beyond training")
        for axes in column:
            axes.axvspan(max(TRAINED) + 0.5, max(BEYOND) + 0.5, color="gray", alpha=0.15)
            axes.grid(alpha=0.3)
        column[0].legend(fontsize=8)
    for axes, what in zip(
        grid[:, 0], ("busiest expert over an even share, %", "entropy over log E"), strict=True
    ):
        axes.set_ylabel(what)
    figure.tight_layout()
    return figure


def data(
    by_arm: Mapping[str, list[list[el.Measured]]],
    bits: Curves,
    cost: Mapping[str, float],
    plans: Sequence[Allocation],
) -> dict[str, Any]:
    arms = {
        name: {
            "training_flops_per_token": cost[name],
            "gap": gap(bits, name).tolist(),
            "fall": fall(bits, name).tolist(),
            "seeds": [[m.figures() for m in seed] for seed in seeds],
        }
        for name, seeds in by_arm.items()
    }
    found = [
        {
            "plan": each.found.plan,
            "tried": each.found.tried,
            "gains": each.gains_as_json(),
        }
        for each in plans
    ]
    return {"specialists": specialists(bits).tolist(), "arms": arms, "plans": found}
