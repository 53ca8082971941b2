"""The selection bias (Wang et al. 2024) in lower layers, where Sigma-MoE-Tiny reports that it fails: at several rates.

b_i += rate sign(mean load - load_i): arXiv 2512.16248, figure 3, has a busiest expert of layer 0 near 40 times its
share and an idlest without a token after 2,000 steps at rate 0.001.  The vocabulary is of bytes, so that the commonest
token alone is many experts' share.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sigma_experiments import sparse
from sigma_experiments.lab import Lab, Trained
from sigma_experiments.page import Page, draw, spread, table

RATES = (1e-4, 1e-3, 1e-2)
STEPS = 1000
COMMON = {
    "model.vocab_size": 257,  # every byte and the end of text
    "router.balance": "bias",
    "train.steps": STEPS,
    "train.batch_size": 16,
    "train.eval_every": STEPS // 2,
    "train.save_every": STEPS,
    "guard.stats_every": 2 * sparse.LOOK,
}


def run(lab: Lab) -> Page:
    arms = {f"bias-{rate:g}": COMMON | {"router.bias_rate": rate} for rate in RATES}
    if lab.is_short:
        del arms["bias-0.001"]
    trained = sparse.by_arm(
        lab.train([r for name, more in arms.items() for r in sparse.arm(name, lab, more)])
    )
    return Page(
        "The selection bias at several rates, one expert of 96",
        text(trained),
        {"rates": rates_figure(trained)},
        {name: sparse.data(runs, "bias_spread", "bias_overruled") for name, runs in trained.items()},
    )


def rate_of(runs: list[Trained]) -> float:
    return runs[0].config.router.bias_rate


def text(trained: dict[str, list[Trained]]) -> str:
    rows = []
    for runs in trained.values():
        most, least = (sparse.over_time(runs, key)[1] for key in ("load_most", "load_least"))
        reached = sparse.over_time(runs, "bias_spread")[1]
        half, last = len(most[0]) // 2 - 1, -1
        rows.append([
            f"{rate_of(runs):g}",
            *(times_share(most[:, at, 0]) for at in (half, last)),
            *(times_share(most[:, at, 1:].mean(1)) for at in (half, last)),
            sparse.percent(least[:, last, 0]),
            *(spread(reached[:, at, 0], 2) for at in (half, last)),
            spread(sparse.final_bits(runs), 4),
        ])  # fmt: skip
    columns = (
        "rate",
        "busiest expert of layer 0, times its share, half-way",
        "at the end",
        "of the other layers, half-way",
        "at the end",
        "idlest, layer 0",
        "widest bias less least, layer 0, half-way",
        "at the end",
        "validation, bits per byte",
    )
    first = next(iter(trained.values()))
    t = first[0].config.train
    return f"""
{sparse.described(trained)}, mean [lowest, highest]. {t.steps} steps of {t.batch_size * t.seq_len:,} tokens; of
a vocabulary of {first[0].config.model.vocab_size} the commonest is {sparse.commonest(first[0]):.0%} of the text: an
expert that takes it alone has {1 + sparse.bounds(first[0])[0]:.0f} times its share. No balance loss.

{table(columns, rows)}

![Load and bias over steps](bias-rates.png)

Above the busiest expert of layer 0 and the mean of the others', then the widest bias less the least, in layer 0; a
thin line a seed. Grey: twice the rate times the steps, the fastest that two biases can part. Scores are of (0, 1), so
that a bias of 1 decides alone. Below the share of choices that the bias made, where the scores alone would have made
another, mean of the seeds; of the last two looks, layer by layer:

{choices_by_layer(trained)}
"""


def choices_by_layer(trained: dict[str, list[Trained]]) -> str:
    rows = [
        [f"{rate_of(runs):g}", *map(sparse.percent, sparse.final(runs, "bias_overruled").T)]
        for runs in trained.values()
    ]
    return table(("rate", *(f"layer {layer}" for layer in range(sparse.LAYERS))), rows)


def times_share(deviations: np.ndarray) -> str:
    return spread(list(1 + deviations), 1)


def rates_figure(trained: dict[str, list[Trained]]) -> Figure:
    figure, grid = plt.subplots(3, len(trained), figsize=(12, 7.5), sharex=True, sharey="row", squeeze=False)
    for (load, bias, share), runs in zip(grid.T, trained.values(), strict=True):
        steps, most = sparse.over_time(runs, "load_most")
        for values, color, label in (
            (1 + most[:, :, 0], "tab:red", "layer 0"),
            (1 + most[:, :, 1:].mean(2), "tab:orange", "mean of the others"),
        ):
            draw(load, steps, values, color, label)
        load.axhline(1 + sparse.bounds(runs[0])[0], color="black", linestyle="--", linewidth=0.8,
                     label="commonest token alone")  # fmt: skip
        sparse.scale_by_factors(load)
        load.set_title(f"rate {rate_of(runs):g}")
        load.grid(alpha=0.3)
        steps, reached = sparse.over_time(runs, "bias_spread")
        draw(bias, steps, reached[:, :, 0], "tab:blue")
        bias.plot(steps, [2 * rate_of(runs) * step for step in steps], color="gray", linewidth=0.8)
        bias.grid(alpha=0.3)
        steps, overruled = sparse.over_time(runs, "bias_overruled")
        for layer in range(sparse.LAYERS):
            shade = plt.colormaps["viridis"](layer / sparse.LAYERS)
            share.plot(steps, overruled[:, :, layer].mean(0), color=shade, label=f"layer {layer}")
        share.set_xlabel("step")
        share.grid(alpha=0.3)
    grid[0][0].set_ylabel("busiest expert, times its share")
    grid[1][0].set_ylabel("widest bias less least")
    grid[1][0].set_ylim(0, 1.5)
    grid[2][0].set_ylabel("share of choices\nthat the bias made")
    grid[2][0].set_ylim(0, 1)
    grid[2][0].legend(fontsize=8, ncols=2)
    grid[0][0].legend(fontsize=8)
    figure.tight_layout()
    return figure
