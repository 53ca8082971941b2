"""Balance against quality (left open by Sigma-MoE-Tiny, arXiv 2512.16248): each loss at several strengths.

Too little and experts stand idle, too much and tokens go where there is room: validation over the deviation of the
busiest expert, at the same tokens.  Beside the losses the schedule of `balance`, which computes more until its switch.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sigma_experiments import sparse
from sigma_experiments.lab import Lab, Trained
from sigma_experiments.page import Page, spread, table

STEPS = 150
PLAIN, TOP1, BIAS = (1e-3, 1e-2, 1e-1), (1.0, 0.1, 0.03), (1e-3, 1e-2)
SHORT = ("schedule", "none", "plain-0.01", "top1-0.1", "bias-0.01")
KINDS = {
    "plain": "plain loss, coefficient",
    "top1": "Top-1 loss, temperature",
    "bias": "selection bias, rate",
    "schedule": f"plain loss, k = {sparse.EARLY}, then 1",
    "none": "nothing",
}


def arms() -> dict[str, tuple[str, float, dict[str, Any]]]:
    """Kind, strength and settings by name."""
    found: dict[str, tuple[str, float, dict[str, Any]]] = {
        "none": ("none", 0.0, {"router.balance": "none"}),
        "schedule": ("schedule", 0.0, sparse.SCHEDULE),
    }
    for coef in PLAIN:
        found[f"plain-{coef:g}"] = "plain", coef, {"router.balance_coef": coef}
    for temperature in TOP1:
        settings = {"router.balance": "top1", "router.top1_temperature": temperature}
        found[f"top1-{temperature:g}"] = "top1", temperature, settings
    for rate in BIAS:
        found[f"bias-{rate:g}"] = "bias", rate, {"router.balance": "bias", "router.bias_rate": rate}
    return found


def run(lab: Lab) -> Page:
    chosen = arms()
    if lab.is_short:  # one of each kind
        chosen = {name: arm for name, arm in chosen.items() if name in SHORT}
    runs = [
        each
        for name, (_, _, settings) in chosen.items()
        for each in sparse.arm(name, lab, {"train.steps": STEPS, "train.save_every": STEPS, **settings})
    ]
    trained = sparse.by_arm(lab.train(runs))
    return Page(
        "Balance against quality, one expert of 96",
        text(chosen, trained),
        {"curve": curve(chosen, trained)},
        {name: sparse.data(runs) for name, runs in trained.items()},
    )


def text(chosen: dict[str, tuple[str, float, Any]], trained: dict[str, list[Trained]]) -> str:
    rows = []
    for name, runs in trained.items():
        kind, strength, _ = chosen[name]
        most = sparse.final(runs, "load_most")
        rows.append([
            f"{KINDS[kind]} {strength:g}" if strength else KINDS[kind],
            *(sparse.percent(of_layer) for of_layer in (most[:, 0], most[:, 1], most.mean(1))),
            sparse.percent(sparse.final(runs, "load_least")[:, 0]),
            spread(sparse.final(runs, "experts_dead").sum(1), 0),
            spread(sparse.final_bits(runs), 4),
        ])  # fmt: skip
    columns = (
        "balance",
        "busiest expert, layer 0",
        "layer 1",
        "mean of layers",
        "idlest, layer 0",
        "experts without a token, all layers",
        "validation, bits per byte",
    )
    return f"""
{sparse.described(trained)}, mean [lowest, highest]. The Top-1 loss has the coefficient
{sparse.BASE["router.balance_coef"]:g}, as plain loss has where nothing else is said.

{table(columns, rows)}

![Validation over deviation](trade-off-curve.png)

Each point is an arm, bars from the lowest to the highest seed; a line joins one loss at its strengths. Left the lowest
layer, right the mean of all.
"""


def curve(chosen: dict[str, tuple[str, float, Any]], trained: dict[str, list[Trained]]) -> Figure:
    figure, grid = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for axes, title in zip(grid, ("layer 0", "mean of all layers"), strict=True):
        for color, kind in enumerate(KINDS):
            names = [name for name in trained if chosen[name][0] == kind]
            centers = []
            for name in names:
                most = 100 * sparse.final(trained[name], "load_most")
                x = most[:, 0] if title == "layer 0" else most.mean(1)
                y = np.array(sparse.final_bits(trained[name]))
                bars = [np.abs([[v.min() - v.mean()], [v.max() - v.mean()]]) for v in (x, y)]
                axes.errorbar(
                    x.mean(), y.mean(), xerr=bars[0], yerr=bars[1], color=f"C{color}", marker="o", capsize=2
                )
                strength = chosen[name][1]
                label = f"{strength:g}" if strength else kind
                axes.annotate(label, (x.mean(), y.mean()), (5, 5), textcoords="offset points", fontsize=8)
                centers.append((x.mean(), y.mean()))
            if centers:
                axes.plot(*zip(*centers, strict=True), color=f"C{color}", linewidth=1, label=KINDS[kind])
        axes.set(xscale="log", xlabel="busiest expert, deviation in %", title=title)
        axes.grid(alpha=0.3, which="both")
    grid[0].set_ylabel("validation, bits per byte")
    grid[0].legend(fontsize=8)
    figure.tight_layout()
    return figure
