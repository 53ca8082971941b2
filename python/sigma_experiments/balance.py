"""The collapse of lower layers under plain loss, and what is tried against it.

Plain loss E sum_i f_i p_i is least where p is uniform, however uneven f is (Sigma-MoE-Tiny, arXiv 2512.16248, figures 2
to 4).  Beside it: the schedule, whose lower layers begin with several experts, once switched to one late and once left
as it is; the selection bias of Wang et al. 2024; the Top-1 loss.  All see the same tokens; schedule and staying are one
run, bit for bit, until the switch.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from sigma_train.errors import Failure

from sigma_experiments import sparse
from sigma_experiments.lab import Lab, Trained
from sigma_experiments.page import Page, draw, spread, table

ARMS = {
    "plain": {},
    "schedule": sparse.SCHEDULE,
    "stay": {"model.top_k": sparse.EARLY},
    "bias": {"router.balance": "bias", "router.bias_rate": 1e-2},
    "top1": {"router.balance": "top1", "router.top1_temperature": 0.1},
}
TITLES = {
    "plain": "plain loss, k = 1",
    "schedule": f"plain loss, k = {sparse.EARLY}, then 1",
    "stay": f"plain loss, k = {sparse.EARLY} throughout",
    "bias": "selection bias, rate 0.01",
    "top1": "Top-1 loss, temperature 0.1",
}

SHAPES = ("balance loss E sum f p", "entropy of p", "entropy of f", "deviation of f over chance")


def run(lab: Lab) -> Page:
    trained = sparse.by_arm(
        lab.train([r for name, settings in ARMS.items() for r in sparse.arm(name, lab, settings)])
    )
    must_be_one_run(trained["schedule"], trained["stay"])
    commonest, bound = sparse.commonest(trained["plain"][0]), sparse.bounds(trained["plain"][0])[0]
    return Page(
        "One expert of 96: balance, layer by layer",
        text(trained, commonest, bound),
        {"deviation": deviation_figure(trained, bound), "layers": layers_figure(trained, bound)},
        {
            "commonest_token_share": commonest,
            "arms": {name: sparse.data(runs) for name, runs in trained.items()},
        },
    )


def must_be_one_run(schedule: list[Trained], stay: list[Trained]) -> None:
    """Raises: Failure if staying and switching are not of one checkpoint."""
    for one, other in zip(schedule, stay, strict=True):
        until = switch_step(one)
        losses = [
            [row["loss"] for row in each.rows if "loss" in row and row["step"] <= until]
            for each in (one, other)
        ]
        if losses[0] != losses[1]:
            raise Failure(f"experiment: {one.run.name} and {other.run.name} differ before step {until}")


def switch_step(trained: Trained) -> int:
    """The last step before it."""
    return round(sparse.SWITCH * trained.config.train.steps)


def text(trained: dict[str, list[Trained]], commonest: float, bound: float) -> str:
    config = trained["plain"][0].config
    rows = []
    for name, runs in trained.items():
        most, least = sparse.final(runs, "load_most"), sparse.final(runs, "load_least")
        dead = sparse.final(runs, "experts_dead")
        rows.append(
            [
                TITLES[name],
                *(sparse.percent(most[:, layer]) for layer in (0, 1, sparse.LAYERS - 1)),
                sparse.percent(least[:, 0]),
                spread(dead.sum(1), 0),
                spread(sparse.final_bits(runs), 4),
            ]
        )
    columns = [
        "balance",
        "busiest expert, layer 0",
        "layer 1",
        f"layer {sparse.LAYERS - 1}",
        "idlest, layer 0",
        "experts without a token, all layers",
        "validation, bits per byte",
    ]
    lowest_and_highest = (0, sparse.LAYERS - 1)
    evenness = [
        [
            TITLES[name],
            *(
                spread(values[:, layer], digits)
                for values, digits in shapes(runs)
                for layer in lowest_and_highest
            ),
        ]
        for name, runs in trained.items()
    ]
    lost = np.subtract(*(sparse.final_bits(trained[name]) for name in ("schedule", "stay")))
    t = config.train
    return f"""
{sparse.described(trained)}, mean [lowest, highest]. Hidden size {config.model.hidden_size}, steps of
{t.batch_size * t.seq_len:,} tokens, vocabulary {config.model.vocab_size:,}. Deviations from an even share are those of
the last {2 * config.guard.stats_every} steps. k = {sparse.EARLY} over the layers goes to 1 at {sparse.SWITCH:.0%}
of the steps; the run that switches and the one that stays have, until then, equal losses bit for bit, which is checked:
they go on from one state.

{table(columns, rows)}

Switched less stayed, bits per byte of each seed: {", ".join(f"{each:+.3f}" for each in lost)}.

![Deviation over steps](balance-deviation.png)

Busiest and idlest expert of the lowest, the second and the highest layer; a thin line a seed. Dashed: what the
commonest token alone forces on a layer in which equal tokens go to equal experts, E pi_max - 1 = {bound:+.0%}
(pi_max = {commonest:.3f}).

What tells layers apart. f is the load, p the router's mean probability, both entropies are over log E, and 1 where all
experts are equal; the deviation of f (its standard deviation over its mean) is in times that of a draw by chance. The
balance loss is that of each arm, whatever it was trained by: 1 where f or p is even, E where one expert has all.

{table(("balance", *(f"{what}, layer {layer}" for what in SHAPES for layer in lowest_and_highest)), evenness)}

![Deviation by layer](balance-layers.png)

The same at the end, layer by layer: where the entropy of p is 1 and experts are uneven all the same, the loss E sum f p
is at its least and sees nothing.
"""


def shapes(runs: list[Trained]) -> list[tuple[np.ndarray, int]]:
    """Of each of SHAPES [seeds, layers], and its digits."""
    deviation, floor = (sparse.final(runs, key) for key in ("load_cv", "load_cv_floor"))
    return [
        (sparse.final(runs, "balance_loss"), 3),
        (sparse.final(runs, "router_entropy_of_mean"), 4),
        (sparse.final(runs, "load_entropy"), 3),
        (deviation / floor, 1),
    ]


def deviation_figure(trained: dict[str, list[Trained]], bound: float) -> Figure:
    layers = (0, 1, sparse.LAYERS - 1)
    figure, grid = plt.subplots(
        len(trained), len(layers), figsize=(12, 2.3 * len(trained)), sharex=True, sharey=True, squeeze=False
    )
    for axes_row, (name, runs) in zip(grid, trained.items(), strict=True):
        for axes, layer in zip(axes_row, layers, strict=True):
            for key, color in (("load_most", "tab:red"), ("load_least", "tab:blue")):
                steps, values = sparse.over_time(runs, key)
                draw(axes, steps, 100 * values[:, :, layer], color)
            axes.axhline(100 * bound, color="black", linestyle="--", linewidth=0.8)
            axes.axhline(0, color="gray", linewidth=0.6)
            axes.set_yscale("symlog", linthresh=100)
            axes.set_yticks([-100, 0, 100, 300, 1000, 3000])
            axes.set_yticklabels(["-100", "0", "100", "300", "1000", "3000"])
            axes.set_title(f"{TITLES[name]}: layer {layer}", fontsize=9)
            axes.grid(alpha=0.3)
            if name == "schedule":
                axes.axvline(switch_step(runs[0]), color="tab:green", linewidth=1)
        axes_row[0].set_ylabel("deviation, %")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.tight_layout()
    return figure


def layers_figure(trained: dict[str, list[Trained]], bound: float) -> Figure:
    panels = (
        ("load_most", "busiest expert, deviation in %", 100),
        ("load_least", "idlest expert, deviation in %", 100),
        ("router_entropy_of_mean", "entropy of mean p over log E", 1),
        ("load_entropy", "entropy of load f over log E", 1),
    )
    figure, grid = plt.subplots(1, len(panels), figsize=(15, 3.6))
    for axes, (key, title, unit) in zip(grid, panels, strict=True):
        for color, (name, runs) in enumerate(trained.items()):
            sparse.draw_layers(axes, unit * sparse.final(runs, key), color=f"C{color}", label=name)
        axes.set(title=title, xlabel="layer")
        axes.grid(alpha=0.3)
    grid[0].axhline(100 * bound, color="black", linestyle="--", linewidth=0.8)
    sparse.scale_by_factors(grid[0])
    for axes in grid[2:]:
        axes.set_ylim(0.85, 1.01)
    grid[2].legend(fontsize=8)
    figure.tight_layout()
    return figure
