"""Language neurons as pictures, of what is in neurons.json and ablation.json."""

from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sigma_neurons.taxonomy import KINDS

COLORS = {"specific": "tab:red", "related": "tab:orange", "general": "tab:blue"}
WIDEST = 8  # inches
DOUBLINGS = 2  # of a share, either way, that colours tell apart


def kinds_figure(profiles: Any) -> Figure:
    """[runs, L, 3]: how many neurons of each kind a layer has; of several runs their mean, from least to most."""
    profiles = np.array(profiles)
    runs, layers = len(profiles), np.arange(profiles.shape[1])
    figure, grid = plt.subplots(1, 3, figsize=(11, 3.2), sharex=True)
    for axes, kind, values in zip(grid, KINDS, np.moveaxis(profiles, 2, 0), strict=True):
        mean = values.mean(0)
        around = np.stack([mean - values.min(0), values.max(0) - mean]) if runs > 1 else None
        axes.bar(layers, mean, yerr=around, color=COLORS[kind], capsize=2)
        axes.set(title=f"{kind}: {mean.sum():,.0f}", xlabel="layer", ylim=(0, max(values.max(), 1) * 1.1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, axis="y")
    grid[0].set_ylabel("neurons" if runs == 1 else "neurons, mean of runs")
    figure.tight_layout()
    return figure


def languages_figure(neurons: dict[str, Any]) -> Figure:
    """Where the specific and related neurons of each language are."""
    counts = np.array(neurons["layers"]["languages"])  # [L, K]
    figure, axes = plt.subplots(figsize=(_width(counts.shape[1]), max(2.2, 0.32 * len(counts) + 1.2)))
    image = axes.imshow(counts, aspect="auto", cmap="viridis")
    _label(axes, neurons["languages"], range(len(counts)))
    axes.set(ylabel="layer")
    figure.colorbar(image, label="neurons")
    return figure


def routing_figure(neurons: dict[str, Any]) -> Figure:
    """Each expert's share of a language's tokens over its mean share of all languages, layer by layer."""
    share = np.array(neurons["share"])  # [experts of all sites, K]
    sites = neurons["sites"]
    parts = np.split(share, np.cumsum([site["experts"] for site in sites])[:-1])
    shown = [(site, part) for site, part in zip(sites, parts, strict=True) if site["experts"] > 1]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.1 * columns + 1, 2.8 * rows), squeeze=False, layout="constrained"
    )
    image = None
    for axes, (site, part) in zip(grid.flat, shown, strict=False):
        ratio = np.log2(np.maximum(part, 1e-12) / np.maximum(part.mean(1, keepdims=True), 1e-12))
        image = axes.imshow(ratio, aspect="auto", cmap="RdBu_r", vmin=-DOUBLINGS, vmax=DOUBLINGS)
        _label(axes, neurons["languages"], None)
        axes.set_title(f"layer {site['layer']}", fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid.flat[len(shown) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("expert")
    bar = figure.colorbar(image, ax=grid, label="share over the mean of languages", extend="both")
    bar.set_ticks(
        range(-DOUBLINGS, DOUBLINGS + 1), labels=[f"{2.0**n:g}" for n in range(-DOUBLINGS, DOUBLINGS + 1)]
    )
    return figure


def matrix_figure(name: str, of_set: Mapping[str, Any]) -> Figure:
    """The rise of each language without each language's neurons, and without as many random ones, in one scale.

    of_set: languages, neurons (how many, by language), rise and random [K, K].
    """
    rise, at_random = np.array(of_set["rise"]), np.array(of_set["random"])
    limit = max(np.abs(rise).max(), np.abs(at_random).max(), 1e-6)
    K = len(of_set["languages"])
    figure, grid = plt.subplots(
        1, 2, figsize=(2 * _width(K), 0.45 * K + 1.6), sharey=True, layout="constrained"
    )
    for axes, values, title in (
        (grid[0], rise, f"without {name}"),
        (grid[1], at_random, "as many random neurons"),
    ):
        image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        _label(axes, of_set["languages"], [f"{row}: {n:.0f}" for row, n in of_set["neurons"].items()])
        axes.set(title=title, xlabel="loss of")
        if K <= 10:
            _write_values(axes, values, limit)
    grid[0].set_ylabel("neurons of, and how many")
    figure.colorbar(image, ax=grid, label="rise, bits per byte")
    return figure


def _write_values(axes: Axes, values: np.ndarray, limit: float) -> None:
    for (i, j), value in np.ndenumerate(values):
        color = "white" if abs(value) > 0.6 * limit else "black"
        axes.text(
            j, i, f"{round(float(value), 3) + 0.0:.3f}", ha="center", va="center", fontsize=7, color=color
        )


def _label(axes: Axes, languages: list[str], rows: Any) -> None:
    axes.set_xticks(range(len(languages)), languages, rotation=90 if len(languages) > 8 else 0, fontsize=8)
    if rows is not None:
        axes.set_yticks(range(len(rows)), rows, fontsize=8)


def _width(columns: int) -> float:
    return min(max(4.0, 0.55 * columns + 1.5), WIDEST)
