"""How language-bound a neuron is: of its activation probabilities p_k, one for each of K languages.

    p' = p / sum p,  H(p') = -sum p'_k ln p'_k

LAPE (Tang et al. 2024, arXiv 2402.16438) selects neurons of low H.  The finer score (arXiv 2505.21505) is
H(p') - lambda * max p: entropy says how specific a neuron is, the maximum how much it does.  Lower is more bound.
"""

import math

import torch
from torch import Tensor


def entropy(p: Tensor) -> Tensor:
    """H of p [..., K] after its sum is made 1, in nats; ln K where all of p is 0: a neuron never active."""
    total = p.sum(-1, keepdim=True)
    h = torch.special.entr(p / torch.where(total > 0, total, 1)).sum(-1)
    return torch.where(total[..., 0] > 0, h, math.log(p.shape[-1]))


def language_neuron_score(p: Tensor, lam: float) -> Tensor:
    """H(p') - lam * max p, of p [..., K]."""
    return entropy(p) - lam * p.amax(-1)


def released_score(p: Tensor, lam: float) -> Tensor:
    """The scale of the authors' code: H / ln K - lam * max p / (H_K / K), with H_K / K the mean of 1, 1/2, ..., 1/K."""
    K = p.shape[-1]
    return entropy(p) / math.log(K) - lam * p.amax(-1) / _mean_reciprocal(K)


def paper_lambda(released_lambda: float, K: int) -> float:
    """The lambda of `language_neuron_score` that orders neurons as `released_lambda` does in `released_score`."""
    return released_lambda * math.log(K) / _mean_reciprocal(K)


def _mean_reciprocal(K: int) -> float:
    return math.fsum(1 / k for k in range(1, K + 1)) / K


def quantile(values: Tensor, rate: float) -> float:
    """The ceil(n * rate)-th smallest of n values: at most the share 1 - rate of them, rounded down, is above it."""
    n = values.numel()
    rank = min(max(math.ceil(round(n * rate, 6)), 1), n)  # 0.95 * 140 is no integer in floating point
    return float(values.flatten().kthvalue(rank).values)


def lowest(score: Tensor, rate: float, p: Tensor) -> Tensor:
    """[N] bool: the round(N * rate) lowest scores, the lower index first where equal; never a neuron of no activity."""
    wanted = round(len(score) * rate)
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[score.argsort(stable=True)[:wanted]] = True
    return chosen & (p.amax(-1) > 0)


def lape(p: Tensor, top_rate: float = 0.01, filter_rate: float = 0.95, bar_rate: float = 0.95) -> Tensor:
    """[N, K] bool: the neurons of each language by LAPE, of p [N, K].

    Left out are neurons that no language activates above the `filter_rate` quantile of all p.  Of all N the share
    `top_rate` of lowest entropy is taken; each belongs to the languages whose p is above the `bar_rate` quantile.
    """
    active = p.amax(-1) > quantile(p, filter_rate)
    score = torch.where(active, entropy(p), math.inf)
    chosen = lowest(score, top_rate, p) & active
    return chosen[:, None] & (p > quantile(p, bar_rate))
