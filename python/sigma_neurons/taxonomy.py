"""Neurons in three kinds (arXiv 2505.21505): of one language, of some, of all."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from sigma_train.errors import WrongInput
from torch import Tensor

from sigma_neurons.scores import language_neuron_score, lowest, paper_lambda, quantile

RELEASED_MOST = 0.2  # lambda of the authors' search, on the scale of their code
GRID = 64  # lambdas that are tried before the search narrows
Kind = Literal["specific", "related", "general"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class NeuronTaxonomy:
    """selected [N] bool: the most language-bound; num_languages [N]: how many have p above tau.

    specific: selected, of one language; related: selected, of some but not all; general: of all K, selected or not.
    """

    selected: Tensor
    above: Tensor  # [N, K] bool, p > tau
    lam: float
    tau: float

    @property
    def num_languages(self) -> Tensor:
        return self.above.sum(-1)

    @property
    def specific(self) -> Tensor:
        return self.selected & (self.num_languages == 1)

    @property
    def related(self) -> Tensor:
        return self.selected & (self.num_languages > 1) & (self.num_languages < self.above.shape[1])

    @property
    def general(self) -> Tensor:
        return self.num_languages == self.above.shape[1]

    def of_kind(self, kind: Kind) -> Tensor:
        """[N] bool."""
        return {"specific": self.specific, "related": self.related, "general": self.general}[kind]

    def of_language(self, language: int, *kinds: Kind) -> Tensor:
        """[N] bool: the neurons of these kinds that this language activates."""
        chosen = torch.zeros_like(self.selected)
        for kind in kinds:
            chosen |= self.of_kind(kind)
        return chosen & self.above[:, language]


def classify_neurons(
    p: Tensor, lam: float | None = None, top_rate: float = 0.01, tau: float | None = None
) -> NeuronTaxonomy:
    """Of p [N, K]; tau is the top-5 % point of all p and lam that of `fit_lambda` where they are not given."""
    tau = quantile(p, 0.95) if tau is None else tau
    lam = fit_lambda(p, top_rate, tau) if lam is None else lam
    return NeuronTaxonomy(lowest(language_neuron_score(p, lam), top_rate, p), p > tau, lam, tau)


def fit_lambda(
    p: Tensor, top_rate: float = 0.01, tau: float | None = None, most: float | None = None, eps: float = 1e-4
) -> float:
    """The largest lambda, to `eps`, up to which no neuron that is selected has p above tau in all languages.

    More of the maximum brings in strong neurons, the general ones at last.  The count of these need not rise all the
    way, so lambdas from 0 to `most` are tried on a grid and the first that fails is narrowed down; `most` if none does.
    Where it is not given it is the end of the range that the authors' code searches, 0.2 on its scale.
    Raises: WrongInput if it fails at 0 already: then entropy alone selects general neurons.
    """
    tau = quantile(p, 0.95) if tau is None else tau
    everywhere = (p > tau).all(-1)

    def fails(lam: float) -> bool:
        return bool((lowest(language_neuron_score(p, lam), top_rate, p) & everywhere).any())

    if fails(0.0):
        raise WrongInput(
            f"neurons: no lambda keeps neurons of all {p.shape[1]} languages out of the lowest {top_rate:.1%}; "
            "lower the share"
        )
    most = paper_lambda(RELEASED_MOST, p.shape[1]) if most is None else most
    good, bad = 0.0, math.inf
    for step in range(1, GRID + 1):
        if fails(most * step / GRID):
            bad = most * step / GRID
            break
        good = most * step / GRID
    while math.isfinite(bad) and bad - good > eps:
        middle = (good + bad) / 2
        good, bad = (good, middle) if fails(middle) else (middle, bad)
    return good


def stage_profile(taxonomy: NeuronTaxonomy, layers: Tensor) -> Tensor:
    """[L, 3] int64: of each layer how many neurons are specific, related and general.  layers: [N], of each neuron."""
    number = int(layers.max()) + 1
    return torch.stack([torch.bincount(layers[taxonomy.of_kind(k)], minlength=number) for k in KINDS], dim=1)
