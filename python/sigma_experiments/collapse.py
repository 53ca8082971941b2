"""A collapse of lower layers that lasts, and what is tried against it: bytes, a weak loss (arXiv 2512.16248).

`balance` has a vocabulary whose commonest token is 2 % of the text, and a loss of ten times the published
coefficient.  Here the vocabulary is that of `bias`, and plain loss has the published coefficient: layers are uneven to
the end.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sigma_experiments import bias, sparse
from sigma_experiments.bias import times_share
from sigma_experiments.lab import Lab, Trained
from sigma_experiments.page import Page, draw, spread, table

PUBLISHED, STRONG = 1e-3, 1e-2  # coefficients


def arm(balance: str, coefficient: float, more: dict[str, Any]) -> dict[str, Any]:
    return bias.COMMON | {"router.balance": balance, "router.balance_coef": coefficient} | more


TOP1 = {"router.top1_temperature": 0.1}
ARMS = {
    "schedule": arm("global", PUBLISHED, sparse.SCHEDULE),
    "plain": arm("global", PUBLISHED, {}),
    "top1": arm("top1", PUBLISHED, TOP1),
    "top1-strong": arm("top1", STRONG, TOP1),
}
TITLES = {
    "schedule": f"plain loss, {PUBLISHED:g}, k = {sparse.EARLY}, then 1",
    "plain": f"plain loss, {PUBLISHED:g}",
    "top1": f"Top-1 loss, {PUBLISHED:g}",
    "top1-strong": f"Top-1 loss, {STRONG:g}",
}
SHOWN = (0, 1, 2, sparse.LAYERS - 1)  # layers


def run(lab: Lab) -> Page:
    arms = {name: ARMS[name] for name in ARMS if not lab.is_short or name in ("schedule", "plain")}
    trained = sparse.by_arm(
        lab.train([r for name, settings in arms.items() for r in sparse.arm(name, lab, settings)])
    )
    return Page(
        "A collapse that lasts, one expert of 96",
        text(trained),
        {"steps": steps_figure(trained)},
        {name: sparse.data(runs) for name, runs in trained.items()},
    )


def text(trained: dict[str, list[Trained]]) -> str:
    rows = []
    for name, runs in trained.items():
        most = sparse.final(runs, "load_most")
        rows.append([
            TITLES[name],
            *(times_share(most[:, layer]) for layer in SHOWN),
            sparse.percent(sparse.final(runs, "load_least")[:, 0]),
            spread(sparse.final(runs, "experts_dead").sum(1), 0),
            spread(sparse.final(runs, "router_entropy_of_mean")[:, 0], 4),
            spread(sparse.final_bits(runs), 4),
        ])  # fmt: skip
    columns = (
        "balance, coefficient",
        "busiest expert of layer 0, times its share",
        *(f"layer {layer}" for layer in SHOWN[1:]),
        "idlest, layer 0",
        "experts without a token, all layers",
        "entropy of p over log E, layer 0",
        "validation, bits per byte",
    )
    first = next(iter(trained.values()))[0]
    t, looked = first.config.train, 2 * first.config.guard.stats_every
    early = {name: before_switch(trained[name]) for name in ("schedule", "plain")}
    return f"""
{sparse.described(trained)}, mean [lowest, highest]. {t.steps} steps of {t.batch_size * t.seq_len:,} tokens; of
a vocabulary of {first.config.model.vocab_size} the commonest is {sparse.commonest(first):.0%} of the text: an
expert that takes it alone has {1 + sparse.bounds(trained["plain"][0])[0]:.0f} times its share. Loads are those of the
last {looked} steps. The schedule goes to k = 1 at {sparse.SWITCH:.0%} of the steps; the Top-1 loss has temperature
{TOP1["router.top1_temperature"]:g}.

{table(columns, rows)}

![Load over steps](collapse-steps.png)

The busiest expert of layer 0 and of the highest layer, and below the idlest ones; a thin line a seed. Green: the
schedule's switch. Over the {looked} steps before it the busiest expert of layer 0 has {early["schedule"]}
with the schedule, whose k is {sparse.EARLY[0]} there, and {early["plain"]} without.
"""


def before_switch(runs: list[Trained]) -> str:
    """The busiest and the idlest expert of layer 0 at the last two looks before the schedule's switch."""
    looks = np.array(sparse.over_time(runs, "load_most")[0]) <= sparse.SWITCH * runs[0].config.train.steps
    most, least = (
        sparse.over_time(runs, key)[1][:, looks, 0][:, -2:].mean(1) for key in ("load_most", "load_least")
    )
    return f"{times_share(most)} times its share, the idlest {sparse.percent(least)},"


def steps_figure(trained: dict[str, list[Trained]]) -> Figure:
    figure, grid = plt.subplots(2, len(trained), figsize=(3.4 * len(trained), 5.5), sharex=True, sharey="row")
    for (busiest, idlest), (name, runs) in zip(grid.T, trained.items(), strict=True):
        for axes, key in ((busiest, "load_most"), (idlest, "load_least")):
            steps, values = sparse.over_time(runs, key)
            for layer, color in ((0, "tab:red"), (sparse.LAYERS - 1, "tab:blue")):
                draw(axes, steps, 1 + values[:, :, layer], color, f"layer {layer}")
            if name == "schedule":
                axes.axvline(sparse.SWITCH * runs[0].config.train.steps, color="tab:green", linewidth=1)
            axes.grid(alpha=0.3)
        sparse.scale_by_factors(busiest)
        busiest.set_title(TITLES[name], fontsize=9)
        idlest.set_xlabel("step")
    grid[0][0].set_ylabel("busiest expert, times its share")
    grid[1][0].set_ylabel("idlest expert, times its share")
    grid[0][0].legend(fontsize=8)
    figure.tight_layout()
    return figure
