"""How the load of experts and the routers' choices went, layer by layer over a run, as two figures.

Both are of the rows of metrics.jsonl that have `layers`, and mark the steps at which `top_k` changed.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Rows = list[dict[str, Any]]
PERCENT = FuncFormatter(lambda share, _: f"{share:+,.0%}" if share else "0")
COLUMNS = 4  # of layers side by side
MAPS = {
    "load_most": "busiest expert, from an even share",
    "load_least": "idlest expert, from an even share",
    "load_entropy": "entropy of the load f, over log E",
    "router_entropy_of_mean": "entropy of the mean probabilities p, over log E",
    "experts_dead": "experts without a token since the last look",
    "routing_changes": "choices that changed since the last look",
}


def has_routing(rows: Rows) -> bool:
    return any("load_entropy" in row.get("layers", {}) for row in rows)


def maps(rows: Rows) -> Figure:
    """Layers down, steps across, each column as wide as the interval it ends; grey: there was no look before."""
    seen = looks(rows)
    layers = len(seen[0]["layers"]["load_most"])
    height = min(3.2, 1.2 + 0.16 * layers)
    figure, grid = plt.subplots(
        3, 2, figsize=(11, 3 * height), sharex=True, sharey=True, layout="constrained"
    )
    edges = [seen[0]["step"] - seen[0]["layers"]["steps"], *(row["step"] for row in seen)]
    for (name, title), axes in zip(MAPS.items(), grid.flat, strict=True):
        values = np.array([row["layers"][name] for row in seen], dtype=float).T  # [layers, looks]
        axes.set_facecolor("lightgrey")
        image = axes.pcolormesh(
            edges, np.arange(layers + 1) - 0.5, np.ma.masked_invalid(values), **colours(name, values)
        )
        axes.set_title(title, fontsize=10)
        bar = figure.colorbar(image, ax=axes)
        if name.startswith(("load_most", "load_least", "routing")):
            bar.ax.yaxis.set_major_formatter(PERCENT)
        bar.ax.minorticks_off()
        mark_switches(axes, rows, "white")
    grid[0, 0].invert_yaxis()
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return figure


def colours(name: str, values: np.ndarray) -> dict[str, Any]:
    """Dark is even, or quiet."""
    largest = np.nanmax(values, initial=0)
    if name == "load_most":
        return {"cmap": "inferno", "norm": SymLogNorm(1, vmin=0, vmax=max(1, largest))}
    if name == "load_least":
        return {"cmap": "inferno_r", "norm": Normalize(-1, 0)}
    if "entropy" in name:
        return {"cmap": "inferno_r", "norm": Normalize(min(0.9, np.nanmin(values, initial=1)), 1)}
    return {"cmap": "inferno", "norm": Normalize(0, largest or 1)}


def deviations(rows: Rows) -> Figure:
    """A plot a layer: its busiest and its idlest expert, what chance leaves, and what the commonest token forces.

    Linear up to one even share more or less, logarithmic above.
    """
    seen = looks(rows)
    steps = [row["step"] for row in seen]
    layers = len(seen[0]["layers"]["load_most"])
    columns = min(COLUMNS, layers)
    lines = -(-layers // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(11, 1 + 1.7 * max(lines, 1.5)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for layer, axes in enumerate(grid.flat):
        if layer >= layers:
            axes.set_visible(False)
            continue
        of = {
            name: [row["layers"][name][layer] for row in seen]
            for name in seen[0]["layers"]
            if name.startswith("load_")
        }
        axes.axhline(0, color="black", linewidth=0.6)
        axes.plot(steps, of["load_most"], color="tab:red", linewidth=1.2, label="busiest expert")
        axes.plot(steps, of["load_least"], color="tab:blue", linewidth=1.2, label="idlest expert")
        axes.plot(steps, of["load_most_floor"], color="tab:green", linestyle=":", label="busiest by chance")
        bound = [x if x > 0 else np.nan for x in of["load_most_bound"]]
        axes.plot(
            steps, bound, color="tab:orange", linestyle="--", label="commonest token alone: $E\\,\\pi/k-1$"
        )
        mark_switches(axes, rows, "grey")
        axes.set_title(f"layer {layer}", fontsize=9, pad=3)
        axes.grid(alpha=0.3)
    scale(
        grid[0, 0],
        [x for row in seen for name in ("load_most", "load_most_bound") for x in row["layers"][name]],
    )
    below = layers - columns
    for layer, axes in enumerate(grid.flat[:layers]):
        if layer >= below:
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=9, frameon=False)
    return figure


def scale(axes: Axes, values: list[float]) -> None:
    axes.set_yscale("symlog", linthresh=1, linscale=1)
    axes.set_ylim(-1.1, 1.4 * max(1, *values))
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_yticks(
        [t for t in (-1, -0.5, 0, 0.5, 1, 3, 10, 30, 100, 300, 1000) if t <= 1.4 * max(1, *values)]
    )
    axes.minorticks_off()


def looks(rows: Rows) -> Rows:
    return [row for row in rows if "load_entropy" in row.get("layers", {})]


def mark_switches(axes: Axes, rows: Rows, colour: str) -> None:
    for n, step in enumerate(row["step"] for row in rows if "top_k" in row):
        label = "$k$ changes" if n == 0 else None
        axes.axvline(
            step - 1, color=colour, linestyle="-.", linewidth=1, label=label
        )  # the first so, after step - 1
