"""How the load of experts and the routers' choices went, layer by layer over a run, as three figures.

`loads` is of every step.  The others are of the rows of metrics.jsonl that have `layers`, and mark the steps at which
`top_k` changed.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Rows = list[dict[str, Any]]
PERCENT = FuncFormatter(lambda share, _: f"{share:,.0%}")
SIGNED = FuncFormatter(lambda share, _: f"{share:+,.0%}" if share else "0")
FORMATS = {"load_most": SIGNED, "load_least": SIGNED, "routing_changes": PERCENT}
TICKS = (-1, -0.5, 0, 0.5, 1, 3, 10, 30, 100, 300, 1000)
COLUMNS = 4  # of layers side by side
LINES = 8  # of loads, below each other at the width of the page; of more layers COLUMNS stand side by side
MAPS = {
    "load_most": "busiest expert, from an even share",
    "load_least": "idlest expert, from an even share",
    "load_entropy": "entropy of the load f, over log E",
    "router_entropy_of_mean": "entropy of the mean probabilities p, over log E",
    "experts_dead": "experts without a token since the last look",
    "routing_changes": "choices that changed since the last look",
}


def looks(rows: Rows) -> Rows:
    """The rows that have statistics of routing: none of a dense model, nor of a program that had none."""
    return [row for row in rows if "load_entropy" in row.get("layers", {})]


def loads(rows: Rows) -> Figure:
    """A map a layer: experts up, steps across, the load relative to an even share; grey: the step was left out."""
    steps, load = zip(*((row["step"], row["load"]) for row in rows if "load" in row), strict=True)
    _, layers, E = np.shape(load)
    share = np.full((steps[-1] - steps[0] + 1, layers, E), np.nan)
    share[np.subtract(steps, steps[0])] = load / np.mean(load, axis=2, keepdims=True)
    figure, plots = side_by_side(layers, 1 if layers <= LINES else COLUMNS)
    extent = (steps[0] - 1, steps[-1], -0.5, E - 0.5)
    for layer, axes in enumerate(plots):
        axes.set_facecolor("lightgrey")
        image = axes.imshow(
            share[:, layer].T, aspect="auto", vmin=0, vmax=3, cmap="viridis", origin="lower", extent=extent
        )
        axes.set_title(f"layer {layer}", fontsize=9, pad=3)
    for axes in figure.axes:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("expert")
    figure.colorbar(image, ax=plots, label="load, in even shares (3 and more)", fraction=0.03, pad=0.02)
    return figure


def side_by_side(layers: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A plot a layer, in lines of so many; steps are named below the lowest of each column."""
    columns = min(columns, layers)
    lines = -(-layers // columns)
    size = (11, 1 + 1.7 * max(lines, 1.5))
    figure, grid = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    # By hand: "constrained" takes seconds for 56 layers.
    figure.subplots_adjust(0.08, 0.5 / size[1], 0.99, 1 - 0.6 / size[1], wspace=0.05, hspace=0.25)
    for axes in grid.flat[layers:]:
        axes.remove()
    for axes in grid.flat[layers - columns : layers]:
        axes.set_xlabel("step")
        axes.tick_params(labelbottom=True)
        axes.xaxis.set_major_locator(whole_numbers(prune="upper" if columns > 1 else None))
    return figure, list(grid.flat[:layers])


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
        shown = np.ma.masked_invalid(values)
        image = axes.pcolormesh(edges, np.arange(layers + 1) - 0.5, shown, **colours(name, values))
        axes.set_title(title, fontsize=10)
        ticks = whole_numbers() if name == "experts_dead" else None
        figure.colorbar(image, ax=axes, ticks=ticks, format=FORMATS.get(name)).minorticks_off()
        mark_switches(axes, rows, "deepskyblue")
    grid[0, 0].invert_yaxis()
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(whole_numbers())
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
    """A plot a layer, linear up to one even share more or less and logarithmic above."""
    seen = looks(rows)
    layers = len(seen[0]["layers"]["load_most"])
    figure, plots = side_by_side(layers, COLUMNS)
    for layer, axes in enumerate(plots):
        draw_layer(axes, seen, layer)
        mark_switches(axes, rows, "grey")
    names = ("load_most", "load_most_bound")
    scale(plots[0], max(x for row in seen for name in names for x in row["layers"][name]))
    handles, labels = plots[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=5, fontsize=9, frameon=False)
    return figure


def draw_layer(axes: Axes, seen: Rows, layer: int) -> None:
    """Its busiest and its idlest expert, what chance leaves, and what the commonest token forces where it does."""

    def plot(name: str, label: str, **style: Any) -> None:
        values = [row["layers"][name][layer] for row in seen]
        values = [x if x > 0 or not name.endswith("bound") else np.nan for x in values]
        axes.plot([row["step"] for row in seen], values, label=label, **style)

    axes.axhline(0, color="black", linewidth=0.6)
    marker = "." if len(seen) == 1 else None
    plot("load_most", "busiest expert", color="tab:red", linewidth=1.2, marker=marker)
    plot("load_least", "idlest expert", color="tab:blue", linewidth=1.2, marker=marker)
    plot("load_most_floor", "busiest by chance", color="tab:green", linestyle=":", marker=marker)
    forced = r"commonest token alone: $E\,\pi/k-1$"
    plot("load_most_bound", forced, color="tab:orange", linestyle="--", marker=marker)
    axes.set_title(f"layer {layer}", fontsize=9, pad=3)
    axes.grid(alpha=0.3)


def scale(axes: Axes, largest: float) -> None:
    top = 1.4 * max(1, largest)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(-1.1, top)
    axes.set_yticks([tick for tick in TICKS if tick <= top])
    axes.yaxis.set_major_formatter(SIGNED)
    axes.minorticks_off()


def whole_numbers(prune: str | None = None) -> MaxNLocator:
    return MaxNLocator("auto", integer=True, min_n_ticks=1, prune=prune)


def mark_switches(axes: Axes, rows: Rows, colour: str) -> None:
    """Between the last step of one k and the first of the next, which has `top_k` in its row."""
    for n, row in enumerate(row for row in rows if "top_k" in row):
        label = "$k$ changes" if n == 0 else None
        axes.axvline(row["step"] - 1, color=colour, linestyle="-.", linewidth=1, label=label)
