"""Orthogonal growth against training from scratch (arXiv 2510.08008): more layers by two plans, more experts by copies.

Published: later is better (figure 5), interposition overtakes the stack once the small model has had a Chinchilla
budget, 1 % of noise beats none and a lot, and growth beats scratch by extra FLOPs and is no worse by total ones.
Beside that the small model is trained on without growth.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from sigma_train.grow_run import Reading
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_norms import norm_seam, planned_profile, weight_norm_profile
from torch import Tensor

from sigma_experiments import grown
from sigma_experiments.grown import KINDS, Curve, Size
from sigma_experiments.lab import Lab
from sigma_experiments.page import Page, draw, spread, table

COLORS = {"interposition": "C0", "stack": "C1", "wide": "C2", "scratch": "black", "small": "gray"}


def run(lab: Lab) -> Page:
    size = grown.BRIEF if lab.is_short else grown.FULL
    curves, checkpoints = grown.train(lab, size)
    profiles = [weight_norm_profile(Reading(path).weights()) for path in checkpoints]
    seams = {kind: [seam(profile, kind) for profile in profiles] for kind in KINDS}
    return Page(
        "Orthogonal growth against scratch",
        text(curves, size, seams),
        {
            "depth": depth_figure(curves, size),
            "sunk": sunk_figure(curves, size),
            "width": width_figure(curves, size),
        },
        data(curves, size, seams) | {"norms": [profile.tolist() for profile in profiles]},
    )


def seam(profile: Tensor, kind: str) -> float:
    """The steepest fall of norms of the grown model, in mean steps of the small one's."""
    planned = planned_profile(profile, getattr(LayerGrowthPlan, kind)(len(profile)))
    return norm_seam(planned).fall / float(profile.diff().abs().mean())


def scratch_of(name: str) -> str:
    return "scratch-wide" if name.startswith("wide") else "scratch-deep"


def same_of(name: str, size: Size) -> str:
    """The arm that does not grow where this one does."""
    point = size.points[-1] if name.startswith("wide") else int(name.rpartition("-")[2])
    return grown.same_as(point)


def compared(curves: dict[str, list[Curve]], name: str, size: Size) -> dict[str, list[float]]:
    """Bits per byte of each seed at growth and at the end, and of the others by the same extra or total FLOPs."""
    triples = list(zip(*(curves[n] for n in (name, same_of(name, size), scratch_of(name))), strict=True))
    return {
        "begin": [one.begin for one, _, _ in triples if one.begin is not None],
        "end": [one.bits[-1] for one, _, _ in triples],
        "not_grown_equal_extra": [same.at(one.extra) for one, same, _ in triples],
        "scratch_equal_extra": [scratch.at(one.extra) for one, _, scratch in triples],
        "scratch_equal_total": [scratch.at(one.sunk + one.extra) for one, _, scratch in triples],
    }


def arms_of(curves: dict[str, list[Curve]]) -> list[str]:
    """Those that grow."""
    return [name for name in curves if name.startswith((*KINDS, "wide"))]


def title(name: str, size: Size) -> str:
    kind, _, what = name.partition("-")
    if kind == "wide":
        return f"twice the experts, noise {what}"
    return f"{kind} after {int(what) / size.points[-1]:.0%} of the small one's steps"


def text(curves: dict[str, list[Curve]], size: Size, seams: dict[str, list[float]]) -> str:
    small = curves["small"][0].trained.config
    rows = []
    for name in arms_of(curves):
        found = compared(curves, name, size)
        rows.append([title(name, size), *(spread(found[key], 4) for key in found)])
    columns = [
        "growth",
        "at growth",
        "after the extra FLOPs",
        "not grown, equal extra",
        "scratch, equal extra",
        "scratch, equal total",
    ]
    beside = []
    for point in size.points:
        ends = [[curve.bits[-1] for curve in curves[f"{kind}-{point}"]] for kind in KINDS]
        differences = [one - other for one, other in zip(*ends, strict=True)]
        beside.append([f"{point / size.points[-1]:.0%}", spread(differences, 4)])
    deepest = curves[f"stack-{size.points[-1]}"][0]
    extra, sunk = deepest.extra, deepest.sunk
    seeds = len(curves["small"])
    active, budget = grown.chinchilla_flops(small)
    of_budget = ", ".join(f"{curves[f'stack-{point}'][0].sunk / budget:.2f}" for point in size.points)
    tokens = size.steps * small.train.batch_size * small.train.seq_len
    return f"""
A small model of {small.model.num_layers} layers and {small.model.num_experts} experts, {small.model.layer_top_k[0]} of
them a token, hidden size {small.model.hidden_size}, is trained on {tokens:,} tokens of Python source
({sunk:.2g} FLOPs) at a constant rate. At points of it its layers are doubled, at the last its experts as well; the
optimizer starts anew, and each grown model has {extra:.2g} extra FLOPs. Not grown is the small model with as many more,
its optimizer anew and on the same text as the grown ones; the grown shape from scratch passes them on its way to the
total of both. Validation in bits per byte, lower is better;
{seeds} seed{"s" * (seeds > 1)}, mean [lowest, highest].

One Chinchilla budget of the small model's N = {active:,} active parameters is F_c = 6 N (20 N) = {budget:.3g} FLOPs.
The points of growth are at {of_budget} F_c, attention's products counted; by 6 N a token, as the paper
counts, the last is at {tokens / (20 * active):.2f}.

{table(columns, rows)}

![Validation over extra and total FLOPs](growth-depth.png)

Twice the layers. Left by extra FLOPs, which leave out what the small model had cost, right by all. A thin line a seed.

![Validation over sunk FLOPs](growth-sunk.png)

What the same extra FLOPs make of a model, over what had been spent before. Interposition less stack, of each seed:

{table(["grown after", "interposition - stack, bits per byte"], beside)}

The steepest fall of the layers' norms, in mean steps between the small model's layers:
{spread(seams["interposition"], 1)} after interposition, {spread(seams["stack"], 1)} after a stack.

![Twice the experts](growth-width.png)

Twice the experts, by noise on the copies, in standard deviations of their weights.
"""


def depth_figure(curves: dict[str, list[Curve]], size: Size) -> Figure:
    figure, (by_extra, by_total) = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    last = size.points[-1]
    for kind in KINDS:
        _draw(by_extra, curves[f"{kind}-{last}"], kind, f"{kind} after {last * size.unit} steps")
        for point in size.points:
            _draw(by_total, curves[f"{kind}-{point}"], kind, kind if point == last else "", with_sunk=True)
    _draw(by_extra, curves["scratch-deep"], "scratch", "from scratch", most=curves[f"stack-{last}"][0].extra)
    _draw(by_total, curves["scratch-deep"], "scratch", "from scratch")
    _draw(by_extra, curves[grown.same_as(last)], "small", "the small model, not grown")
    _draw(by_total, curves["small"], "small", "the small model")
    by_extra.set(xlabel="extra FLOPs", ylabel="validation, bits per byte")
    by_total.set(xlabel="total FLOPs")
    return _finished(figure)


def sunk_figure(curves: dict[str, list[Curve]], size: Size) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 4.5))
    for kind in KINDS:
        of_points = [curves[f"{kind}-{point}"] for point in size.points]
        sunk = [of_point[0].sunk for of_point in of_points]
        ends = np.array([[curve.bits[-1] for curve in of_point] for of_point in of_points])  # [points, seeds]
        for seed in ends.T:
            axes.plot(sunk, seed, color=COLORS[kind], linewidth=0.6, alpha=0.6)
        axes.plot(sunk, ends.mean(1), color=COLORS[kind], marker="o", label=kind)
    extra = curves[f"stack-{size.points[-1]}"][0].extra
    equal = [curve.at(extra) for curve in curves["scratch-deep"]]
    axes.axhline(
        float(np.mean(equal)), color="black", linestyle="--", label="from scratch, the same extra FLOPs"
    )
    axes.set(xlabel="FLOPs sunk in the small model", ylabel="validation, bits per byte")
    return _finished(figure)


def width_figure(curves: dict[str, list[Curve]], size: Size) -> Figure:
    figure, axes = plt.subplots(figsize=(6, 4.5))
    names = [name for name in curves if name.startswith("wide-")]
    for number, name in enumerate(names):
        _draw(axes, curves[name], f"C{2 + number}", title(name, size))
    _draw(axes, curves[grown.same_as(size.points[-1])], "small", "not grown")
    _draw(axes, curves["scratch-wide"], "scratch", "from scratch", most=curves[names[0]][0].extra)
    axes.set(xlabel="extra FLOPs", ylabel="validation, bits per byte")
    return _finished(figure)


def _draw(
    axes, of_arm: list[Curve], color: str, label: str, with_sunk: bool = False, most: float = np.inf
) -> None:
    """A thin line a seed, a thick one of their mean; up to `most` FLOPs."""
    flops = np.array(of_arm[0].flops)
    shown = flops <= most
    x = flops[shown] + (of_arm[0].sunk if with_sunk else 0.0)
    y = np.array([curve.bits for curve in of_arm])[:, shown]
    draw(axes, x, y, COLORS.get(color, color), label or None)


def _finished(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def data(curves: dict[str, list[Curve]], size: Size, seams: dict[str, list[float]]) -> dict[str, object]:
    return {
        "curves": {
            name: [{"sunk_flops": c.sunk, "extra_flops": c.flops, "bits_per_byte": c.bits} for c in of_arm]
            for name, of_arm in curves.items()
        },
        "compared": {name: compared(curves, name, size) for name in arms_of(curves)},
        "chinchilla_flops": grown.chinchilla_flops(curves["small"][0].trained.config)[1],
        "seam": seams,
    }
