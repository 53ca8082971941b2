"""What `guide-languages` measures, and the arithmetic of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sigma_neurons.ablation import Deactivation
from sigma_neurons.identified import LEAST_ROUTED, Identified, Probability, identify
from sigma_neurons.matrices import mean_of
from sigma_neurons.overlap import overlap
from sigma_neurons.stats import ActivationStats
from sigma_neurons.taxonomy import KINDS, Kind
from torch import Tensor

TOP_RATE = 0.05
JUDGED = 1  # batches of validation text of each language
WAYS: dict[str, tuple[Probability, float | None]] = {  # probability, tau
    "joint": ("joint", None),
    "conditional": ("conditional", 0.5),
}
HALF = "the other half of the text"
PARTS = ("understanding", "reasoning", "output", "vocabulary")
CLAIMS = (
    "specific and related: more in understanding than in reasoning",
    "specific and related: more in output than in reasoning",
    "general: fewest in output",
    "general: most in vocabulary",
)


@dataclass(frozen=True)
class Before:
    """Of one training.  halves: counts on every other window of the text, each by itself."""

    halves: tuple[ActivationStats, ActivationStats]
    found: Mapping[str, Identified]  # of WAYS, on both halves
    matrices: Mapping[str, Deactivation]


@dataclass(frozen=True)
class After:
    """Of a training that went on.  stats: counts on the first half of the text; bits: as `Found.bits`."""

    stats: ActivationStats
    bits: float


def identified(stats: ActivationStats, way: str) -> Identified:
    probability, tau = WAYS[way]
    return identify(stats, TOP_RATE, probability, tau=tau)


class Found:
    """Of all seeds; `after` by what the trainings went on with.

    moves: of each way, on the other half of the text and after each arm, `move` of each seed from the first half.
    """

    def __init__(self, before: Sequence[Before], after: Mapping[str, Sequence[After]]) -> None:
        self.before, self.after, self.ways = before, after, tuple(WAYS)
        self.languages = before[0].halves[0].languages
        self._first = {way: [identified(each.halves[0], way) for each in before] for way in WAYS}
        self.moves = {way: self._moves(way) for way in WAYS}

    @property
    def bits(self) -> list[float]:
        """Per byte of validation text of each seed, the mean of all languages."""
        return [float(each.matrices["joint"].base.mean()) for each in self.before]

    def totals(self, way: str, kind: Kind) -> list[int]:
        return [int(each.found[way].kinds.of_kind(kind).sum()) for each in self.before]

    def half_totals(self, way: str, kind: Kind) -> list[int]:
        """On the first half of the text."""
        return [int(each.kinds.of_kind(kind).sum()) for each in self._first[way]]

    def size(self, way: str, language: int, kind: Kind) -> float:
        return float(np.mean([int(each.found[way].mask(language, kind).sum()) for each in self.before]))

    def profiles(self, way: str) -> np.ndarray:
        """[seeds, L, 3]."""
        return np.stack([each.found[way].profile().numpy() for each in self.before])

    def claims(self, way: str) -> list[tuple[bool, ...]]:
        """Of each seed which of CLAIMS show."""
        return [claims(profile) for profile in self.profiles(way)]

    def matrices(self, way: str) -> list[Deactivation]:
        return [each.matrices[way] for each in self.before]

    def matrix(self, way: str) -> dict[str, Any]:
        return mean_of(self.matrices(way))

    def untold(self) -> np.ndarray:
        """[seeds, L]: % of the neurons without a conditional probability, as some language seldom goes there."""
        shares = [
            [float((routed < LEAST_ROUTED).any(0).double().mean()) for routed in both.stats.routed]
            for both in (each.found["conditional"] for each in self.before)
        ]
        return 100 * np.array(shares)

    def routing_distances(self) -> tuple[np.ndarray, np.ndarray]:
        """[seeds, L] both: of two languages on average, of one language on two halves of its text."""
        apart, same = [], []
        for each in self.before:
            first, second = map(shares, each.halves)
            apart.append(_mean_of_pairs(distances(first, first)))
            same.append(distances(first, second).diagonal(dim1=1, dim2=2).mean(1))
        return torch.stack(apart).numpy(), torch.stack(same).numpy()

    def nearest(self) -> list[str]:
        """Of each language the one whose tokens go to the most similar experts, over all layers and seeds."""
        of_seeds = [shares(each.found["joint"].stats) for each in self.before]
        mean = torch.stack([distances(each, each).mean(0) for each in of_seeds]).mean(0)
        return [self.languages[i] for i in mean.fill_diagonal_(2).argmin(1).tolist()]

    def _moves(self, way: str) -> dict[str, list[list[float]]]:
        then = {HALF: [each.halves[1] for each in self.before]}
        then |= {name: [one.stats for one in of_arm] for name, of_arm in self.after.items()}
        return {
            name: [
                move(first, identified(stats, way))
                for first, stats in zip(self._first[way], of_seeds, strict=True)
            ]
            for name, of_seeds in then.items()
        }


def move(first: Identified, then: Identified) -> list[float]:
    """% of the first's that are kept, % of the second's that were there, and what each kind gains."""
    of_languages = [
        overlap(
            *({*one.mask(k, "specific", "related").nonzero().flatten().tolist()} for one in (first, then))
        )
        for k in range(len(first.stats.languages))
    ]
    both = sum(each.both for each in of_languages)
    sizes = sum(each.first for each in of_languages), sum(each.second for each in of_languages)
    gains = [int(then.kinds.of_kind(kind).sum()) - int(first.kinds.of_kind(kind).sum()) for kind in KINDS]
    return [*(100 * both / max(size, 1) for size in sizes), *gains]


def parts_of(layers: int) -> list[list[int]]:
    """Layers of each of PARTS: the last alone, the others in three."""
    return [part.tolist() for part in np.array_split(np.arange(layers - 1), 3)] + [[layers - 1]]


def claims(profile: np.ndarray) -> tuple[bool, ...]:
    """Of [L, 3] which of CLAIMS show, each by the mean of a part's layers."""
    own, general = np.array(
        [[profile[part, :2].sum(1).mean(), profile[part, 2].mean()] for part in parts_of(len(profile))]
    ).T
    return (
        bool(own[0] > own[1]),
        bool(own[2] > own[1]),
        bool(general[2] < general[[0, 1, 3]].min()),
        bool(general[3] > general[:3].max()),
    )


def shares(stats: ActivationStats) -> Tensor:
    """[L, E, K]: the share of a language's choices that each expert has, of layers with as many experts each."""
    share = stats.routing().view(len(stats.sites), -1, len(stats.languages))
    return share / share.sum(1, keepdim=True)


def distances(one: Tensor, other: Tensor) -> Tensor:
    """[L, K, K] of shares [L, E, K]: half the sum of differences over experts."""
    return (one[..., :, None] - other[..., None, :]).abs().sum(1) / 2


def _mean_of_pairs(values: Tensor) -> Tensor:
    """[L] of [L, K, K], without the diagonal, which is 0."""
    K = values.shape[-1]
    return values.sum((1, 2)) / (K * (K - 1))
