"""The end of a run as pictures and one offline page: loss curves, expert load over time, throughput, a sample."""

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from sigma_train import ledger_view, routing_view
from sigma_train.account import Account
from sigma_train.events import FILE, read_events
from sigma_train.files import atomic_file, write_text
from sigma_train.metrics import read_metrics
from sigma_train.step_noise import FOLDER

if TYPE_CHECKING:
    from sigma_noise.step_causes import Late
    from sigma_noise.steps import StepNoise

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2530}
img{max-width:100%}pre{background:#f4f6f8;padding:1rem;overflow-x:auto;white-space:pre-wrap;font-size:13px}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}table{border-collapse:collapse;margin:1rem 0;font-size:14px}
td,th{padding:.1rem .8rem .1rem 0;text-align:left}td:nth-child(2),td:nth-child(3){text-align:right}"""


def write_report(run: Path, sample: str, noise: "tuple[StepNoise, Late | None] | None" = None) -> Path:
    """Write report.html and its PNGs into the folder of a run; returns the page's path."""
    rows = list(read_metrics(run / "metrics.jsonl"))
    figures = {"Loss": loss_figure(rows), "Throughput": throughput_figure(rows)}
    if any("load" in row for row in rows):
        figures["Expert load"] = routing_view.loads(rows)
    if routing_view.looks(rows):
        figures["Deviation from an even load"] = routing_view.deviations(rows)
        figures["Routing"] = routing_view.maps(rows)
    time = Account(read_events(run / FILE)).totals() if (run / FILE).exists() else None
    if time is not None:  # not of a run that ended before there were ledgers
        figures["Time"] = ledger_view.figure(time)
    if any("layers" in row for row in rows):
        figures["Layers"] = layers_figure(rows)
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(run.name)}</title><style>{STYLE}</style>"
    ]
    parts.append(f"<h1>{html.escape(run.name)}</h1>")
    validations = [row for row in rows if "val_bits_per_byte" in row]
    if validations:
        bits, tokens = validations[-1]["val_bits_per_byte"], validations[-1]["tokens"]
        parts.append(f"<p>Validation: {bits:.4f} bits per byte after {tokens:,} tokens.</p>")
    for title, figure in figures.items():
        content = png(figure)
        with atomic_file(run / f"{title.lower().replace(' ', '-')}.png") as file:
            file.write(content)
        data = base64.b64encode(content).decode()
        parts.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}">')
    if time is not None:
        parts.append(ledger_view.page(time))
    if noise is not None:
        from sigma_noise import steps_view

        parts.append(f"<h2>What noise cost</h2>{steps_view.page(*noise)}")
    parts.append(f"<h2>Sample</h2><pre>{html.escape(sample)}</pre>")
    parts.append(f"<h2>Settings</h2><pre>{html.escape((run / 'config.toml').read_text())}</pre>")
    write_text(run / "report.html", "\n".join(parts))
    return run / "report.html"


def noise_of(run: Path) -> "tuple[StepNoise, Late | None] | None":
    """What noise cost and why, of what `train.noise` recorded; None where no step is whole on every rank."""
    if not (run / FOLDER).is_dir():
        return None
    from sigma_noise import parts, step_causes, steps  # pyarrow and scipy, which other runs do without

    if not parts.has_any(run / FOLDER):
        return None
    trace = parts.read(run / FOLDER)
    return (steps.step_noise(trace), step_causes.late(trace)) if steps.has_steps(trace) else None


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def loss_figure(rows: list[dict[str, Any]]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    left.plot(*zip(*train, strict=True), linewidth=1)
    left.set(xlabel="step", ylabel="training loss, nats per token")
    val = [(row["step"], row["val_bits_per_byte"]) for row in rows if "val_bits_per_byte" in row]
    if val:
        right.plot(*zip(*val, strict=True), marker="o", color="tab:orange")
    right.set(xlabel="step", ylabel="validation, bits per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def throughput_figure(rows: list[dict[str, Any]]) -> Figure:
    figure, axes = plt.subplots(figsize=(11, 3))
    speed = [(row["step"], row["tokens_per_s"]) for row in rows if "tokens_per_s" in row]
    if speed:
        axes.plot(*zip(*speed, strict=True))
    axes.set(xlabel="step", ylabel="tokens per second")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    return figure


def layers_figure(rows: list[dict[str, Any]]) -> Figure:
    """One map a quantity: layers down, steps across, each column as wide as the interval it ends; red: no number."""
    rows = [row for row in rows if "layers" in row]
    # A run may have got another interval, and layers of a dense model no router.
    all_names = set.intersection(*(set(row["layers"]) for row in rows))
    of = {
        name: np.array([row["layers"][name] for row in rows], dtype=float).T for name in all_names - {"steps"}
    }
    gradients = [of[name] for name in of if name.endswith("_gradient_norm")]
    maps = {"residual stream after the layer, rms": of["residual_rms"]}
    maps["norm of the layer's gradient"] = np.sqrt(sum(np.square(norm) for norm in gradients))
    if "router_entropy" in of:
        maps["largest |logit| of the router"] = of["router_logit_largest"]
        maps["entropy of the router over log E: 0 decided, 1 undecided"] = of["router_entropy"]
    steps = [row["step"] for row in rows]
    edges = [steps[0] - rows[0]["layers"]["steps"], *steps]
    layers = len(of["residual_rms"])
    height = min(3.5, 0.9 + 0.25 * layers)
    figure, grid = plt.subplots(len(maps), 1, figsize=(11, height * len(maps)), sharex=True, squeeze=False)
    for (title, values), axes in zip(maps.items(), grid[:, 0], strict=True):
        shown = values[np.isfinite(values) & (values > 0)]
        low, high = (shown.min(), shown.max()) if shown.size else (1.0, 1.0)
        norm = Normalize(0, 1) if "entropy" in title else LogNorm(low, high)
        axes.set_facecolor("red")
        image = axes.pcolormesh(
            edges,
            np.arange(layers + 1) - 0.5,
            np.ma.masked_invalid(np.maximum(values, low)),  # zero has no logarithm
            cmap="viridis",
            norm=norm,
        )
        axes.set(title=title, ylabel="layer")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.invert_yaxis()
        ticks = None if "entropy" in title else LogLocator(subs=(1, 2, 5))
        figure.colorbar(image, ax=axes, ticks=ticks, format="%g").minorticks_off()
    grid[-1, 0].set_xlabel("step")
    figure.tight_layout()
    return figure
