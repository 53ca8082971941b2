"""How much of a layer's imbalance is the text's: where equal tokens go to equal experts, deviation >= E pi_max / k - 1.

pi_max is the commonest token's share, which falls as the vocabulary grows and words become tokens.  A layer that sees
more than the token can do better; the lowest sees the embedding and one layer of attention.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sigma_experiments import sparse
from sigma_experiments.lab import Lab, Trained
from sigma_experiments.page import Page, spread, table

VOCABULARIES = (512, 1024, 4096)
ACTIVE = 8  # experts a token in the lowest layer, beside one
STEPS = 150


def arm_settings() -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for size in VOCABULARIES:
        found[f"vocabulary-{size}"] = {"model.vocab_size": size}
    top_k = (ACTIVE, *(1,) * (sparse.LAYERS - 1))
    found[f"vocabulary-1024-top{ACTIVE}"] = {"model.vocab_size": 1024, "model.top_k": top_k}
    return found


def run(lab: Lab) -> Page:
    arms = list(arm_settings().items())[2 if lab.is_short else 0 :]
    shared = {"train.steps": STEPS, "train.save_every": STEPS}
    runs = [each for name, settings in arms for each in sparse.arm(name, lab, {**shared, **settings})]
    trained = sparse.by_arm(lab.train(runs))
    commonest = {name: sparse.commonest(of[0]) for name, of in trained.items()}
    bounds = {name: sparse.bounds(of[0]) for name, of in trained.items()}
    return Page(
        "The commonest token's part in imbalance",
        text(trained, commonest, bounds),
        {"layers": figure(trained, bounds)},
        {
            name: {
                "commonest_token_share": commonest[name],
                "bound": bounds[name],
                "load_most": sparse.final(of, "load_most").tolist(),
                "bits_per_byte": sparse.final_bits(of),
            }
            for name, of in trained.items()
        },
    )


def text(
    trained: dict[str, list[Trained]], commonest: dict[str, float], bounds: dict[str, list[float]]
) -> str:
    rows = []
    for name, runs in trained.items():
        most = sparse.final(runs, "load_most")
        k = runs[0].config.model.layer_top_k[0]
        rows.append(
            [
                f"{runs[0].config.model.vocab_size:,}",
                str(k),
                f"{commonest[name]:.3f}",
                f"{bounds[name][0]:+.0%}",
                sparse.percent(most[:, 0]),
                spread(most[:, 0] / bounds[name][0], 2) if bounds[name][0] else "no bound",
                sparse.percent(most[:, 1:].mean(1)),
            ]
        )
    columns = (
        "vocabulary",
        "k of layer 0",
        "pi_max",
        "bound of layer 0",
        "busiest expert, layer 0",
        "over the bound",
        "busiest expert, mean of the others",
    )
    return f"""
{sparse.described(trained)}, mean [lowest, highest]; plain loss.

{table(columns, rows)}

![Deviation and bound, layer by layer](token-bound-layers.png)

A layer below its bound sends copies of the commonest token to different experts: it sees more than the token.
"""


def figure(trained: dict[str, list[Trained]], bounds: dict[str, list[float]]) -> Figure:
    figure, grid = plt.subplots(1, len(trained), figsize=(3 * len(trained), 3.4), sharey=True, squeeze=False)
    for axes, (name, runs) in zip(grid[0], trained.items(), strict=True):
        sparse.draw_layers(axes, 100 * sparse.final(runs, "load_most"), label="busiest expert")
        limit = np.array(bounds[name]) * 100
        axes.plot(np.where(limit > 0, limit, np.nan), "k_", markersize=14, label="bound of the token")
        c = runs[0].config.model
        axes.set(title=f"vocabulary {c.vocab_size:,}, k = {c.layer_top_k[0]} in layer 0", xlabel="layer")
        axes.title.set_fontsize(9)
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    grid[0][0].set_ylabel("deviation, %")
    grid[0][0].legend(fontsize=8)
    figure.tight_layout()
    return figure
