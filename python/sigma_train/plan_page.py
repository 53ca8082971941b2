"""The page of `sigma plan --page`: two models at 64 to 2,048 ranks as tables and one picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sigma_train.accelerators import Accelerator
from sigma_train.config import load_config
from sigma_train.errors import WrongInput
from sigma_train.files import atomic_file, write_text
from sigma_train.plan import USABLE, Plan, make_plan
from sigma_train.plan_cli import MEMORY_ROWS, assumptions
from sigma_train.plan_shapes import layout, shapes
from sigma_train.plan_time import ATTENTION, DENSE, EXPERTS, MEMORY, OPTIMIZER, ROUTER, Shares
from sigma_train.plan_wire import EXCHANGE, REPLICAS, SHARDING, SMALL
from sigma_train.report import png

RANKS = (64, 256, 1024, 2048)
STEP_TOKENS = 1 << 24  # of all ranks: the same step on more of them
LOADS = (1.25, 1.5, 2, 3, 4)
PUBLISHED_RANKS, PUBLISHED_MFU = (
    2048,
    0.2108,
)  # of SIGMA (arXiv 2512.13488): its model and machine, its way of counting


@dataclass(frozen=True)
class Model:
    preset: str
    title: str
    expert_ranks: tuple[int, ...]


MODELS = (
    Model("sigma-moe-tiny", "Sigma-MoE-Tiny-like, 20 B", (8, 16, 32)),
    Model("sigma-moe-200b", "SIGMA-MoE-like, 200 B", (16, 32, 64)),
)
PARTS = {
    DENSE: "#1f77b4", ATTENTION: "#6baed6", ROUTER: "#c6dbef", EXPERTS: "#2ca02c", MEMORY: "#98df8a",
    OPTIMIZER: "#bcbd22", EXCHANGE: "#d62728", SHARDING: "#ff9896", REPLICAS: "#9467bd", SMALL: "#7f7f7f",
}  # fmt: skip


def sweep(device: Accelerator, shares: Shares) -> dict[Model, list[Plan]]:
    """Every model on every number of ranks and size of a group of experts, with steps of the same tokens."""
    found: dict[Model, list[Plan]] = {}
    for model in MODELS:
        config = load_config(model.preset, None, [])
        sizes, t = shapes(config), config.train
        for ranks in RANKS:
            accum = STEP_TOKENS // (ranks * t.batch_size * t.seq_len)
            step = config.model_copy(update={"train": t.model_copy(update={"grad_accum": accum})})
            for expert_ranks in model.expert_ranks:
                where = layout(step, ranks, expert_ranks, device.node_ranks)
                found.setdefault(model, []).append(make_plan(step, sizes, where, device, shares, (1, *LOADS)))
    return found


def write_page(path: Path, device: Accelerator, shares: Shares) -> Path:
    """Write `path`, a markdown file, and its picture beside it; returns `path`.

    Raises: WrongInput if it is no .md in a folder that is there.
    """
    if path.suffix != ".md":
        raise WrongInput(f"--page must name a .md file, found {path}")
    if not path.parent.is_dir():
        raise WrongInput(f"--page: there is no folder {path.parent}")
    plans = sweep(device, shares)
    with atomic_file(path.with_suffix(".png")) as file:
        file.write(png(figure(plans, device)))
    write_text(path, text(plans, device, path))
    return path


def text(plans: dict[Model, list[Plan]], device: Accelerator, path: Path) -> str:
    how = f"sigma plan --page {path.as_posix()} --accelerator {device.name}"
    first = next(iter(plans.values()))[0]
    parts = [
        f"# Two models on 64 to 2,048 ranks of {device.name}, on paper",
        f"A model on paper, made by `{how}` from shares of the peak that kernels were measured at on one GPU "
        "and from link speeds as datasheets state them. Nothing of it has run at that size. "
        f"How it counts, and what of it is tested: [sigma plan](../plan.md).\n\n![MFU and time]({path.stem}.png)",
        "\n".join(f"- {line}" for line in assumptions(first)[:-1]),
        f"Each step is of {STEP_TOKENS:,} tokens, on any number of ranks: fewer ranks take more micro-steps. bf16, "
        "as `sigma train` computes: f32 weights, gathers and gradients; no activation is computed again. "
        "MFU with nothing hidden, with FSDP's messages hidden behind computing (expected), and with all messages "
        "hidden.",
    ]
    for model, found in plans.items():
        parts += [f"## {model.title}", _about(model, found), _table(found), _crowds(found)]
    parts.append(
        f"## Beside it\n\nSIGMA (arXiv 2512.13488) publishes {PUBLISHED_MFU:.2%} MFU at {PUBLISHED_RANKS:,} "
        "accelerators for its 200 B model. That is another model, machine and program, with a count of FLOPs that is "
        "not known here: it is theirs, and no check of these figures."
    )
    return "\n\n".join(parts) + "\n"


def _about(model: Model, found: Sequence[Plan]) -> str:
    p, last = found[0], found[-1]
    t = p.config.train
    kinds = ", ".join(
        f"{MEMORY_ROWS[key][0]} {getattr(last.memory, key) / 1e9:.1f}"
        for key in MEMORY_ROWS
        if getattr(last.memory, key) >= 5e7
    )
    return (
        f"`--preset {model.preset}`: {p.shapes.total / 1e9:.2f} B parameters, {p.shapes.active_in_layers / 1e9:.3f} B "
        f"of the layers active a token; {t.batch_size} x {t.seq_len:,} tokens of a rank and micro-step. On "
        f"{last.layout.ranks:,} ranks, {last.layout.expert_ranks} to a set of experts, a rank holds, GB: {kinds}."
    )


def _table(found: Sequence[Plan]) -> str:
    head = (
        "| ranks | share experts | micro-steps | GB a rank | fits | step, s | tokens/s | nothing hidden | expected | "
        "all hidden | most of it |"
    )
    rows = [head, "|---" * 11 + "|"]
    for p in found:
        mfu = (p.mfu(s) for s in (p.times.in_order, p.times.expected, p.times.overlapped))
        cells = (
            f"{p.layout.ranks:,}", p.layout.expert_ranks, p.config.train.grad_accum, f"{p.memory.total / 1e9:.0f}",
            "yes" if p.fits else "no", f"{p.times.expected:.2f}", f"{p.tokens / p.times.expected:,.0f}",
            *(f"{x:.1%}" for x in mfu), p.times.bound,
        )  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    usable = USABLE * found[0].device.memory_gb
    misfit = " Where it does not fit the times are of a machine with more memory." if not all(
        p.fits for p in found
    ) else ""  # fmt: skip
    return "\n".join(rows) + f"\n\nIt fits in {usable:.0f} GB, nine tenths of the memory.{misfit}"


def _crowds(found: Sequence[Plan]) -> str:
    """Of the largest number of ranks."""
    rows = [
        "| share experts | " + " | ".join(f"{load:g} x" for load in LOADS) + " |",
        "|---" * (len(LOADS) + 1) + "|",
    ]
    for p in found:
        if p.layout.ranks == RANKS[-1]:
            over = [s / p.times.expected for load, s in p.crowds if load in LOADS]
            rows.append(f"| {p.layout.expert_ranks} | " + " | ".join(f"{x:.2f}" for x in over) + " |")
    return (
        f"A step over the balanced one on {RANKS[-1]:,} ranks, where in every layer the busiest expert has so many "
        "times the mean:\n\n" + "\n".join(rows)
    )


def figure(plans: dict[Model, list[Plan]], device: Accelerator) -> Figure:
    """Above MFU over ranks, below where the time of a step goes; a column a model."""
    result, panels = plt.subplots(
        2, len(plans), figsize=(7.2 * len(plans), 10), gridspec_kw={"height_ratios": (1, 1.05)}
    )
    for column, (model, found) in enumerate(plans.items()):
        _draw_mfu(panels[0][column], model, found)
        _draw_parts(panels[1][column], model, found)
    result.suptitle(
        f"A model on paper: {STEP_TOKENS:,} tokens a step on {device.name}, from measured kernel shares and stated "
        "link speeds.\nNothing of it has run at that size.",
        fontsize=12,
    )
    handles, labels = panels[1][0].get_legend_handles_labels()
    result.legend(handles, labels, loc="lower center", ncol=5, fontsize=9, frameon=False)
    result.tight_layout(rect=(0, 0.06, 1, 1))
    return result


def _draw_mfu(axes: Axes, model: Model, found: Sequence[Plan]) -> None:
    for number, expert_ranks in enumerate(model.expert_ranks):
        line = [p for p in found if p.layout.expert_ranks == expert_ranks]
        x = [p.layout.ranks for p in line]
        low, middle, high = (
            [p.mfu(getattr(p.times, name)) for p in line] for name in ("in_order", "expected", "overlapped")
        )
        color, fits = f"C{number}", "" if all(p.fits for p in line) else ", does not fit"
        axes.plot(x, middle, "o-", color=color, label=f"{expert_ranks} ranks share the experts{fits}")
        axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    if model.preset == "sigma-moe-200b":
        axes.plot(PUBLISHED_RANKS, PUBLISHED_MFU, "*", color="black", markersize=13, linestyle="",
                  label="SIGMA's published 21.08 %: theirs, no check")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [f"{ranks:,}" for ranks in RANKS])
    axes.set_ylim(0, 0.42)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(
        xlabel="ranks", ylabel="MFU: FLOPs of the model over those of the peak",
        title=f"{model.title}\nline: FSDP's messages hidden; band: from nothing to everything hidden",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower left")


def _draw_parts(axes: Axes, model: Model, found: Sequence[Plan]) -> None:
    """Shares of the expected time, a bar for each layout."""
    labels = [f"{p.layout.ranks:,}\n/ {p.layout.expert_ranks}" for p in found]
    gap = 0.6  # between numbers of ranks
    x = [i + gap * (i // len(model.expert_ranks)) for i in range(len(found))]
    bottom = [0.0] * len(found)
    for part, color in PARTS.items():
        heights = [p.times.exposed.get(part, 0.0) / p.times.expected for p in found]
        axes.bar(x, heights, 0.85, bottom=bottom, color=color, label=part)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    for place, p in zip(x, found, strict=True):
        axes.annotate(f"{p.times.expected:.3g} s", (place, 1.0), xytext=(0, 3), textcoords="offset points",
                      ha="center", fontsize=8)  # fmt: skip
    axes.set_xticks(x, labels, fontsize=8)
    axes.set_ylim(0, 1.06)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="ranks / those that share the experts", ylabel="share of a step's time",
             title="Where the time of a step goes")  # fmt: skip
