"""Neurons in three kinds (arXiv 2505.21505): of one language, of some, of all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from sigma_train.errors import WrongInput
from torch import Tensor

from sigma_neurons.scores import language_neuron_score, lape, lowest, paper_lambda, quantile

RELEASED_MOST = 0.2  # lambda of the authors' search, on the scale of their code
GRID = 64  # lambdas that are tried before the search narrows
Score = Literal["finer", "lape"]
Kind = Literal["specific", "related", "general"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class NeuronTaxonomy:
    """selected [N] bool: the most language-bound; num_languages [N]: how many have p above tau.

    specific: selected, of one language; related: selected, of some but not all; general: of all K, selected or not.
    By LAPE, which has no lambda and no third kind, none is general, and related are those of some or all.
    """

    selected: Tensor
    above: Tensor  # [N, K] bool, p > tau
    lam: float | None
    tau: float

    @property
    def num_languages(self) -> Tensor:
        return self.above.sum(-1)

    @property
    def specific(self) -> Tensor:
        return self.selected & (self.num_languages == 1)

    @property
    def related(self) -> Tensor:
        return self.selected & (self.num_languages > 1) & ~self.general

    @property
    def general(self) -> Tensor:
        return (self.num_languages == self.above.shape[1]) & (self.lam is not None)

    def of_kind(self, kind: Kind) -> Tensor:
        """[N] bool."""
        return {"specific": self.specific, "related": self.related, "general": self.general}[kind]

    def of_language(self, language: int, *kinds: Kind) -> Tensor:
        """[N] bool: the neurons of these kinds that this language activates."""
        chosen = torch.zeros_like(self.selected)
        for kind in kinds:
            chosen |= self.of_kind(kind)
        return chosen & self.above[:, language]

    def figures(self, languages: Sequence[str]) -> dict[str, Any]:
        """As JSON has it: what decided, and how many of each kind there are and each language has."""
        return {
            "lambda": self.lam,
            "tau": self.tau,
            "totals": {kind: int(self.of_kind(kind).sum()) for kind in KINDS},
            "of_language": {
                name: {kind: int(self.of_language(k, kind).sum()) for kind in KINDS}
                for k, name in enumerate(languages)
            },
        }


def classify_neurons(
    p: Tensor, lam: float | None = None, top_rate: float = 0.01, tau: float | None = None
) -> NeuronTaxonomy:
    """Of p [N, K]; tau is the top-5 % point of all p and lam that of `fit_lambda` where they are not given."""
    tau = quantile(p, 0.95) if tau is None else tau
    lam = fit_lambda(p, top_rate, tau) if lam is None else lam
    return NeuronTaxonomy(lowest(language_neuron_score(p, lam), top_rate, p), p > tau, lam, tau)


def classify_by_lape(p: Tensor, top_rate: float = 0.01) -> NeuronTaxonomy:
    """As `scores.lape` chooses them, of p [N, K]: the neurons of language k are `of_language(k, *KINDS)`."""
    tau = quantile(p, 0.95)
    return NeuronTaxonomy(lape(p, top_rate).any(-1), p > tau, None, tau)


def fit_lambda(
    p: Tensor, top_rate: float = 0.01, tau: float | None = None, most: float | None = None, eps: float = 1e-4
) -> float:
    """The largest lambda, to `eps`, up to which no neuron that is selected has p above tau in all languages.

    More of the maximum brings in strong neurons, the general ones at last.  The count of these need not rise all the
    way, so lambdas from 0 to `most` are tried on a grid and the first that fails is narrowed down; `most` if none does.
    Where it is not given it is the end of the range that the authors' code searches, 0.2 on its scale.
    Raises: WrongInput if it fails at 0 already: then entropy alone selects general neurons.
    """
    found = search_lambda(p, top_rate, tau, most, eps)
    if found is None:
        raise WrongInput(
            f"neurons: no lambda keeps neurons of all {p.shape[1]} languages out of the lowest {top_rate:.1%}; "
            "lower the share"
        )
    return found


def search_lambda(
    p: Tensor, top_rate: float = 0.01, tau: float | None = None, most: float | None = None, eps: float = 1e-4
) -> float | None:
    """As `fit_lambda`; None if it fails at 0 already."""
    tau = quantile(p, 0.95) if tau is None else tau
    everywhere = (p > tau).all(-1)

    def fails(lam: float) -> bool:
        return bool((lowest(language_neuron_score(p, lam), top_rate, p) & everywhere).any())

    if fails(0.0):
        return None
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


def score_words(lam: float | None) -> str:
    """What is low of the neurons that are selected."""
    return "H (LAPE)" if lam is None else f"H - {lam:.4f} max p"


def stage_profile(taxonomy: NeuronTaxonomy, layers: Tensor) -> Tensor:
    """[L, 3] int64: of each layer how many neurons are specific, related and general.  layers: [N], of each neuron."""
    number = int(layers.max()) + 1
    return torch.stack([torch.bincount(layers[taxonomy.of_kind(k)], minlength=number) for k in KINDS], dim=1)
