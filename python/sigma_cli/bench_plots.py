"""Two pictures of a run of `sigma bench`: each layer under the machine's roofs, and time over T and over E."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from sigma_cli.bounds import fastest_bounds

DTYPES = ("f32", "bf16")
BAND = 0.42  # of the height of a roofline is for the labels
DODGE = 1.07  # points of one intensity stand side by side, this factor apart

Race = dict[str, Any]


def pictures(document: dict[str, Any]) -> dict[str, Figure]:
    """Name and figure of each that the races give points for."""
    drawn = {"roofline": roofline(document), "scaling": scaling(document)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def subtitle(document: dict[str, Any]) -> str:
    about = document["environment"]
    if gpu := document.get("device"):
        return f"{gpu['name']}, {gpu['runtime']}, {about['date']}"
    return f"{about['cpu']}, ISA {about['isa']}, {about['threads']} threads, {about['date']}"


def timed(race: Race, kind: str, name: str | None = None) -> list[dict[str, Any]]:
    """Candidates of a kind that have a time, fastest first."""
    found = [
        c for c in race["candidates"] if c["kind"] == kind and "median_s" in c and name in (None, c["name"])
    ]
    return sorted(found, key=lambda c: c["median_s"])


def of(races: Sequence[Race], group: str, load: str | None = None) -> list[Race]:
    return [r for r in races if r["group"] == group and load in (None, r["load"])]


def roofline(document: dict[str, Any]) -> Figure | None:
    """Forward of every shape, balanced: FLOPs per byte of weights against GF/s, ours and the best peer."""
    races = {
        d: of(document["races"], f"layer/forward/{d}", "balanced")
        + of(document["races"], f"decode/forward/{d}")
        for d in DTYPES
    }
    races = {d: rs for d, rs in races.items() if any("dense" in fastest_bounds(r) for r in rs)}
    if not races:
        return None
    figure, panels = plt.subplots(1, len(races), figsize=(8.5 * len(races), 8.5), squeeze=False)
    for axes, (dtype, group) in zip(panels[0], races.items(), strict=True):
        draw_roofline(axes, dtype, group)
    figure.suptitle(f"The expert layer's forward under the measured roofs\n{subtitle(document)}", fontsize=12)
    figure.tight_layout()
    for axes in panels[0]:
        name_slope(axes)  # last, since its angle depends on the layout
    return figure


def draw_roofline(axes: Axes, dtype: str, races: Sequence[Race]) -> None:
    bounds = [(race, fastest_bounds(race)) for race in races]
    dense = max(r["flops"] / b["dense"]["median_s"] / 1e9 for r, b in bounds if "dense" in b)
    read = max(r["moved"] / c["median_s"] / 1e9 for r in races for c in timed(r, "bound", "read"))
    points = dodged(sorted(races, key=lambda r: (r["flops"] / r["moved"], r["shape"])))
    speeds = [
        r["flops"] / c["median_s"] / 1e9 for r in races for k in ("ours", "peer") for c in timed(r, k)[:1]
    ]
    left = min(x for x, _ in points) / 1.8
    right = max(max(x for x, _ in points) * 1.8, 3 * dense / read)
    lowest, top = min([*speeds, left * read]) / 1.2, max(dense, *speeds) * 2.2
    bottom = lowest / (top / lowest) ** (BAND / (1 - BAND))  # the labels stand below the lowest point
    ridge = dense / read
    axes.plot([left, ridge, right], [left * read, dense, dense], color="black", linewidth=1.5)
    axes.annotate(f"dense rate, measured: {dense:.0f} GF/s", (right, dense), xytext=(-4, 5),
                  textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top), title=dtype,
             xlabel="FLOP per byte of weights", ylabel="GF/s")  # fmt: skip
    places = apart([math.log(x / left) / math.log(right / left) for x, _ in points], 0.043)
    for number, ((x, race), place) in enumerate(zip(points, places, strict=True)):
        color = plt.get_cmap("tab20")(number * 2 % 20 + number * 2 // 20)
        ys = [race["flops"] / c["median_s"] / 1e9 for k in ("ours", "peer") for c in timed(race, k)[:1]]
        axes.plot([x] * len(ys), ys, color=color, linewidth=1, alpha=0.7)
        axes.plot(x, ys[0], marker="o", markersize=9, color=color)
        best = timed(race, "peer")[:1]
        if best:
            axes.plot(x, ys[1], marker="o", markersize=8, markerfacecolor="white", color=color, linestyle="")
        peer = f" ({best[0]['name']})" if best else ""
        axes.annotate(
            f"{label(race)}{peer}", (x, min(ys)), xytext=(place, 0.015), textcoords="axes fraction", rotation=90,
            ha="center", va="bottom", fontsize=7.5, color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 5,
                        "relpos": (0.5, 1)},
        )  # fmt: skip
    axes.grid(which="major", alpha=0.25)
    axes.legend(
        handles=[
            Line2D([], [], marker="o", markersize=9, color="dimgray", linestyle="", label="sigma"),
            Line2D([], [], marker="o", markersize=8, markerfacecolor="white", color="dimgray", linestyle="",
                   label="the fastest peer, named in the label"),
        ],
        loc="upper left",
        fontsize=9,
    )  # fmt: skip


def name_slope(axes: Axes) -> None:
    """The name of the slanted roof, above and along it, where an octave of it is in view."""
    (left, ridge, _), (low, high, _) = axes.lines[0].get_data()
    if ridge < 2 * max(left, axes.get_xlim()[0]):
        return
    (x0, y0), (x1, y1) = axes.transData.transform([(left, low), (ridge, high)])
    axes.annotate(f"read bandwidth, measured: {low / left:.1f} GB/s", (math.sqrt(left * ridge), math.sqrt(low * high)),
                  xytext=(-5, 7), textcoords="offset points", rotation=math.degrees(math.atan2(y1 - y0, x1 - x0)),
                  rotation_mode="anchor", ha="center", fontsize=9)  # fmt: skip


def label(race: Race) -> str:
    sizes = race["sizes"]
    name = race["shape"].split("-E")[0]
    return f"{name} T={sizes['T']} k={sizes['k']}" if name == "decode" else name


def dodged(races: Sequence[Race]) -> list[tuple[float, Race]]:
    """(intensity, race) with those that would hide one another moved a little to the right."""
    out: list[tuple[float, Race]] = []
    for race in races:
        x = race["flops"] / race["moved"]
        out.append((max(x, out[-1][0] * DODGE) if out else x, race))
    return out


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising places in 0..1, moved so that neighbours are at least `gap` apart."""
    out = [max(place, gap / 2 + i * gap) for i, place in enumerate(places)]
    for i in range(1, len(out)):
        out[i] = max(out[i], out[i - 1] + gap)
    limit = 1 - gap / 2
    for i in range(len(out) - 1, -1, -1):
        out[i] = min(out[i], limit)
        limit = out[i] - gap
    return out


def scaling(document: dict[str, Any]) -> Figure | None:
    """Time over the dense bound's, over T and over E: ours, the best peer, and what reading the weights costs."""
    directions = ("forward", "forward+backward")
    sweeps = {
        "sweep-T": ("T", "tokens T, at E=96, top-1, H=1024, I=512"),
        "sweep-E": ("E", "experts E, top-1, at T=2048 and constant bytes of weights"),
    }
    groups = {
        (s, d, t): sorted(of(document["races"], f"{s}/{d}/{t}"), key=lambda r, s=s: r["sizes"][sweeps[s][0]])
        for s in sweeps
        for d in directions
        for t in DTYPES
    }
    rows = [d for d in directions if any(len(groups[s, d, t]) > 1 for s in sweeps for t in DTYPES)]
    columns = [s for s in sweeps if any(len(groups[s, d, t]) > 1 for d in rows for t in DTYPES)]
    if not rows:
        return None
    figure, panels = plt.subplots(
        len(rows), len(columns), figsize=(7.5 * len(columns), 5 * len(rows)), squeeze=False
    )
    for i, direction in enumerate(rows):
        for j, sweep in enumerate(columns):
            size, what = sweeps[sweep]
            draw_scaling(panels[i][j], size, {t: groups[sweep, direction, t] for t in DTYPES})
            panels[i][j].set(
                xlabel=what, title=direction, ylabel="time / time of a dense layer of the same FLOPs"
            )
    figure.suptitle(f"What sparsity costs: time relative to a dense layer\n{subtitle(document)}", fontsize=12)
    figure.tight_layout()
    return figure


def draw_scaling(axes: Axes, size: str, by_dtype: dict[str, list[Race]]) -> None:
    ticks: set[int] = set()
    for number, (dtype, races) in enumerate(by_dtype.items()):
        curves: dict[str, list[tuple[int, float]]] = {}
        for race in races:
            dense = fastest_bounds(race)["dense"]["median_s"]
            for name, candidates in (
                (f"sigma, {dtype}", timed(race, "ours")),
                (f"fastest peer, {dtype}", timed(race, "peer")),
                (f"reading the weights once, {dtype}", timed(race, "bound", "read")),
            ):
                if candidates:
                    point = race["sizes"][size], candidates[0]["median_s"] / dense
                    curves.setdefault(name, []).append(point)
            ticks.add(race["sizes"][size])
        for (name, points), style in zip(curves.items(), ("o-", "o--", ":"), strict=False):
            axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=name, markersize=5,
                      markerfacecolor="white" if style == "o--" else f"C{number}")  # fmt: skip
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sorted(ticks), [f"{t:,}" for t in sorted(ticks)])
    axes.minorticks_off()
    low, high = max(axes.get_ylim()[0], 0.4), axes.get_ylim()[1]
    axes.set_ylim(low, high)
    steps = [s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= s <= high]
    axes.set_yticks(steps)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    x, side = (0, "left") if size == "T" else (1, "right")  # where the curves are far from it
    axes.annotate("dense", (x, 1), xycoords=("axes fraction", "data"), xytext=(4 if x == 0 else -4, -11),
                  textcoords="offset points", ha=side, fontsize=9)  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
