"""One expert of 96 in six layers: what `balance`, `bias`, `collapse`, `trade-off` and `token-bound` train and look at.

Deviation of an expert: its tokens over an even share, less one, over the steps between two looks; of a layer, that of
its busiest and of its idlest expert (Sigma-MoE-Tiny, arXiv 2512.16248, figure 2; the first is DeepSeek's MaxVio).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from sigma_experiments.lab import SHORT, Lab, Run, Trained
from sigma_experiments.page import spread

LAYERS, EXPERTS = 6, 96
LOOK = 25  # steps between looks
EARLY = (8, 6, 4, 2, 1, 1)  # experts a token in each layer, before the schedule's switch
SWITCH = 0.6  # of the steps
SCHEDULE = {"sparsity.phases": [[0, EARLY], [SWITCH, (1,) * LAYERS]]}
BASE = {
    "model.vocab_size": 1024,
    "model.num_layers": LAYERS,
    "model.num_experts": EXPERTS,
    "model.top_k": 1,
    "router.score": "sigmoid",  # the losses read softmax, as in the published scripts of the model's team
    "router.balance": "global",
    "router.balance_coef": 1e-2,
    "data.max_bytes": 20_000_000,
    "optim.lr": 3e-3,
    "optim.schedule": "wsd",
    "optim.warmup_steps": 30,
    "train.steps": 300,
    "train.batch_size": 32,
    "train.eval_every": 100,
    "train.eval_batches": 20,
    "train.save_every": 300,
    "guard.stats_every": LOOK,
}

SERIES = (
    "load_most",
    "load_least",
    "load_cv",
    "load_cv_floor",
    "load_entropy",
    "experts_dead",
    "router_entropy_of_mean",
    "router_entropy",
    "balance_loss",
)


def arm(name: str, lab: Lab, settings: Mapping[str, Any]) -> list[Run]:
    """A run a seed."""
    short = SHORT | {"guard.stats_every": 2} if lab.is_short else {}
    return [Run(name, seed, {**BASE, **settings, **short}) for seed in range(lab.seeds)]


def by_arm(trained: Mapping[Run, Trained]) -> dict[str, list[Trained]]:
    found: dict[str, list[Trained]] = {}
    for run, each in trained.items():
        found.setdefault(run.arm, []).append(each)
    return found


def final_bits(trained: Sequence[Trained]) -> list[float]:
    """Bits per byte of each seed's last validation."""
    return [each.validation[-1][1] for each in trained]


def final(trained: Sequence[Trained], name: str) -> np.ndarray:
    """A statistic [seeds, layers], mean over the last two looks."""
    return np.array([np.mean(each.layers(name)[1][-2:], axis=0) for each in trained], dtype=float)


def over_time(trained: Sequence[Trained], name: str) -> tuple[list[int], np.ndarray]:
    """Steps, and a statistic [seeds, looks, layers]."""
    return trained[0].layers(name)[0], np.array([each.layers(name)[1] for each in trained], dtype=float)


def data(trained: Sequence[Trained], *more: str) -> dict[str, object]:
    """Of an arm, as JSON: the last and all validations of each seed, SERIES and `more` [seeds, looks, layers]."""
    validations = [list(zip(*each.validation, strict=True)) for each in trained]
    return {
        "bits_per_byte": final_bits(trained),
        "validation_steps": validations[0][0],
        "validation_bits_per_byte": [bits for _, bits in validations],
        "steps": over_time(trained, SERIES[0])[0],
        **{name: over_time(trained, name)[1].tolist() for name in (*SERIES, *more)},
    }


def draw_layers(axes: Axes, values: np.ndarray, **style: Any) -> None:
    """A statistic [seeds, layers]: its mean, and bars from the lowest to the highest seed."""
    error = np.abs(np.stack([values.min(0), values.max(0)]) - values.mean(0))
    axes.errorbar(np.arange(values.shape[1]), values.mean(0), error, marker="o", capsize=2, **style)


def scale_by_factors(axes: Axes) -> None:
    """Logarithmic, with 1, 2 and 5 of each power written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def percent(values: Sequence[float]) -> str:
    return spread([100 * value for value in values], 0, " %")


def commonest(trained: Trained) -> float:
    """pi_max: the share of the commonest token in the training text."""
    return next(row["commonest_token"] for row in trained.rows if "commonest_token" in row)


def bounds(trained: Trained) -> list[float]:
    """E pi_max / k - 1 of each layer at the last look, at least 0 (`load_limits.most_bound`)."""
    return [max(0.0, bound) for bound in trained.layers("load_most_bound")[1][-1]]


def described(trained: Mapping[str, Sequence[Trained]]) -> str:
    """The size of every arm, and how many seeds of each."""
    runs = next(iter(trained.values()))
    t = runs[0].config.train
    tokens = t.steps * t.batch_size * t.seq_len
    return f"{LAYERS} layers of {EXPERTS} experts, {tokens:,} tokens of Python source a run; {seeds_of(runs)}"


def seeds_of(trained: Sequence[Trained]) -> str:
    return "one seed" if len(trained) == 1 else f"{len(trained)} seeds"
