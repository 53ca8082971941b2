"""Neurons of a run by language: chosen from its counts, and told as JSON has it."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from sigma_train.errors import WrongInput
from torch import Tensor

from sigma_neurons.routed_experts import routed_experts
from sigma_neurons.stats import ActivationStats
from sigma_neurons.taxonomy import (
    Kind,
    NeuronTaxonomy,
    Score,
    classify_by_lape,
    classify_neurons,
    stage_profile,
)

Probability = Literal["joint", "conditional"]
LEAST_ROUTED = 100  # tokens of each language at an expert, for a conditional probability


@dataclass(frozen=True)
class Identified:
    """stats with the kinds of its neurons by p [N, K]."""

    stats: ActivationStats
    probability: Probability
    top_rate: float
    p: Tensor
    kinds: NeuronTaxonomy

    @property
    def score(self) -> Score:
        return "lape" if self.kinds.lam is None else "finer"

    @property
    def layers(self) -> Tensor:
        return self.stats.layer_of_neurons()

    def profile(self) -> Tensor:
        """[L, 3]: specific, related, general by layer."""
        return stage_profile(self.kinds, self.layers)

    def by_layer(self) -> Tensor:
        """[L, K]: of each layer the specific and related neurons of each language."""
        rows = [
            torch.bincount(
                self.layers[self.mask(k, "specific", "related")], minlength=int(self.layers.max()) + 1
            )
            for k in range(len(self.stats.languages))
        ]
        return torch.stack(rows, dim=1)

    def mask(self, language: int, *kinds: Kind) -> Tensor:
        return self.kinds.of_language(language, *kinds)

    def names(self, mask: Tensor) -> list[list[int]]:
        """[site, expert of the site, unit] of each neuron of a mask."""
        site = self.stats.site_of_neurons()
        begins = torch.tensor([0, *(s.size for s in self.stats.sites)]).cumsum(0)
        units = torch.tensor([s.units for s in self.stats.sites])
        found = mask.nonzero().flatten()
        inside, own = found - begins[site[found]], units[site[found]]
        return torch.stack([site[found], inside // own, inside % own], dim=1).tolist()

    def figures(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        languages, stats = self.stats.languages, self.stats
        experts = routed_experts(stats, self.top_rate, self.score)
        return {
            "languages": list(languages),
            "tokens": stats.tokens.tolist(),
            "probability": self.probability,
            "score": self.score,
            "top_rate": self.top_rate,
            "neurons": len(self.p),
            **self.kinds.figures(languages),
            "layers": {
                "kinds": self.profile().tolist(),
                "languages": self.by_layer().tolist(),
            },
            "sites": [
                {"name": s.name, "layer": s.layer, "experts": s.experts, "units": s.units}
                for s in stats.sites
            ],
            "share": stats.routing().tolist(),  # of each language's tokens, expert by expert
            "experts": None if experts is None else experts.figures(languages),
            "named": {
                name: self.names(self.mask(k, "specific", "related")) for k, name in enumerate(languages)
            },
        }


def identify(
    stats: ActivationStats,
    top_rate: float,
    probability: Probability = "joint",
    lam: float | None = None,
    tau: float | None = None,
    score: Score = "finer",
) -> Identified:
    """Raises: WrongInput if no lambda fits, none is selected, or nothing can be told for want of tokens."""
    must_fit(score, lam, tau)
    p = stats.joint() if probability == "joint" else stats.conditional(LEAST_ROUTED)
    if not p.any():
        raise WrongInput(
            f"neurons: no expert has {LEAST_ROUTED} tokens of each language; count more batches"
            if probability == "conditional"
            else "neurons: no neuron was ever active"
        )
    if not round(len(p) * top_rate):
        raise WrongInput(f"neurons: a share of {top_rate} of {len(p)} neurons selects none; raise it")
    kinds = classify_by_lape(p, top_rate) if score == "lape" else classify_neurons(p, lam, top_rate, tau)
    return Identified(stats, probability, top_rate, p, kinds)


def must_fit(score: Score, lam: float | None, tau: float | None) -> None:
    """Raises: WrongInput if LAPE is given what it has not."""
    for name, value in (("lambda", lam), ("tau", tau)):
        if score == "lape" and value is not None:
            raise WrongInput(
                f"neurons: {name} must be left out with score lape, which has its own rule, found {value}"
            )
