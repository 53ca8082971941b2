"""One expert of 96 in six layers: what `balance`, `trade-off` and `token-bound` train, and what they look at.

Deviation of an expert: its tokens over an even share, less one, over the steps between two looks; of a layer, that of
its busiest and of its idlest expert (Sigma-MoE-Tiny, arXiv 2512.16248, figure 2; the first is DeepSeek's MaxVio).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sigma_train.dataset import prepare

from sigma_experiments.lab import SHORT, Lab, Run, Trained
from sigma_experiments.page import spread

LAYERS, EXPERTS = 6, 96
LOOK = 25  # steps between looks
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


def final(trained: Sequence[Trained], name: str, looks: int = 2) -> np.ndarray:
    """A statistic [seeds, layers], mean over the last looks."""
    return np.array([np.mean(each.layers(name)[1][-looks:], axis=0) for each in trained], dtype=float)


def over_time(trained: Sequence[Trained], name: str) -> tuple[list[int], np.ndarray]:
    """Steps, and a statistic [seeds, looks, layers]."""
    return trained[0].layers(name)[0], np.array([each.layers(name)[1] for each in trained], dtype=float)


def percent(values: Sequence[float]) -> str:
    return spread([100 * value for value in values], 0, " %")


def commonest_share(trained: Trained) -> float:
    """pi_max: the share of the commonest token in the training text."""
    tokens = prepare(trained.config).train.tokens
    return float(np.bincount(tokens).max() / len(tokens))


def token_bound(commonest: float, k: float = 1) -> float:
    """E pi_max / k - 1: the busiest expert's deviation at least, where equal tokens go to equal experts."""
    return max(0.0, EXPERTS * commonest / k - 1)


def seeds_of(trained: Sequence[Trained]) -> str:
    return "one seed" if len(trained) == 1 else f"{len(trained)} seeds"
