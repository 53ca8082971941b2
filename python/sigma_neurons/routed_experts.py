"""Experts by language from routing alone: the score of neurons, of each expert's share of a language's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sigma_neurons.scores import entropy, language_neuron_score
from sigma_neurons.stats import ActivationStats
from sigma_neurons.taxonomy import NeuronTaxonomy, Score, classify_by_lape, classify_neurons, search_lambda


@dataclass(frozen=True)
class RoutedExperts:
    """Of all layers that have several: places, [site, expert of the site] of each; p [experts, K]."""

    places: list[list[int]]
    p: Tensor
    top_rate: float
    kinds: NeuronTaxonomy

    @property
    def score(self) -> Tensor:
        lam = self.kinds.lam
        return entropy(self.p) if lam is None else language_neuron_score(self.p, lam)

    def figures(self, languages: Sequence[str]) -> dict[str, Any]:
        """As JSON has it."""
        own = [self.kinds.of_language(k, "specific", "related") for k in range(len(languages))]
        return {
            "top_rate": self.top_rate,
            **self.kinds.figures(languages),
            "places": self.places,
            "score": self.score.tolist(),
            "named": {
                name: [self.places[i] for i in mask.nonzero().flatten().tolist()]
                for name, mask in zip(languages, own, strict=True)
            },
        }


def routed_experts(stats: ActivationStats, top_rate: float, score: Score) -> RoutedExperts | None:
    """None where no layer has several experts, between which tokens could go apart.

    As small a share is selected as of neurons, but one at least, by a lambda and a tau of their own; lambda is 0 where
    entropy alone selects a general one.
    """
    places = [[i, e] for i, site in enumerate(stats.sites) if site.experts > 1 for e in range(site.experts)]
    if not places:
        return None
    p = stats.routing()[torch.tensor([s.experts > 1 for s in stats.sites for _ in range(s.experts)])]
    rate = max(top_rate, 1 / len(p))
    if score == "lape":
        return RoutedExperts(places, p, rate, classify_by_lape(p, rate))
    return RoutedExperts(places, p, rate, classify_neurons(p, search_lambda(p, rate) or 0.0, rate))
