"""What the routers of all layers did, of sums over tokens and counts of experts: see docs/routing-metrics.md.

f is the share of choices that fell on each expert, p the mean of the router's probabilities; both sum to one.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_train.load_limits import cv_floor, most_bound, most_floor

BLOCK = 1 << 18  # logits whose probabilities are held at once
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Sharpness:
    """Of p_t = softmax(logits[t]), or a sigmoid's scores divided by their sum, summed over tokens."""

    entropy: float  # H(p_t)
    top1: float  # max_i p_ti


def sharpness(logits: Tensor, score: str) -> Sharpness:
    """logits [T, E], a block of rows at a time."""
    entropy = top1 = 0.0
    for block in blocks(logits):
        log_p = (F.logsigmoid(block) if score == "sigmoid" else block).log_softmax(-1)
        entropy -= torch.dot(log_p.exp().flatten(), log_p.flatten()).item()
        top1 += log_p.amax(-1).exp().sum().item()
    return Sharpness(entropy, top1)


def overruled(logits: Tensor, indices: Tensor) -> int:
    """How many choices [T, k] have a logit [T, E] below the k-th largest: a selection bias made them."""
    logits = logits.detach()
    least = logits.topk(indices.shape[1]).values[:, -1:]
    return int((logits.gather(1, indices.long()) < least).sum())


def top1_sums(logits: Tensor, temperature: float) -> tuple[Tensor, float]:
    """sum_t q_t [E] and sum_t max_i q_ti of q_t = softmax(logits[t] / temperature): of the Top-1 loss."""
    total, largest = torch.zeros(logits.shape[1], dtype=torch.float64), 0.0
    for block in blocks(logits):
        q = (block / temperature).softmax(-1)
        total += q.sum(0)
        largest += q.amax(-1).sum().item()
    return total, largest


def blocks(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.detach().split(max(1, BLOCK // logits.shape[1]))


def of_routers(sums: Values, largest: Tensor, counts: Tensor) -> Values:
    """Of one step, whose counts are [layers, E].  Entropies are shares of log E, which an even p reaches."""
    tokens, E = sums["router_tokens"], counts.shape[1]
    p, f = sums["router_p"] / tokens[:, None], counts / counts.sum(1, keepdim=True)
    values = {
        "router_logit_largest": largest,
        "router_logsumexp_rms": (sums["router_square"] / tokens).sqrt(),
        "router_entropy_of_mean": evenness(p),
        "router_entropy": sums["router_entropy"] / tokens / math.log(E),
        "router_top1": sums["router_top1"] / tokens,
        "balance_loss": E * (f * p).sum(1),
    }
    if "router_overruled" in sums:
        values["bias_overruled"] = sums["router_overruled"] / counts.sum(1)
    if "top1_q" in sums:
        square = (sums["top1_q"] / tokens[:, None]).square().sum(1)
        values["top1_loss"] = E * square / (sums["top1_largest"] / tokens)
    return values


def of_loads(counts: Tensor) -> Values:
    """How far the experts are from an even share, and how many are dead; counts [layers, E]."""
    counts, E = counts.double(), counts.shape[1]
    share = counts / counts.mean(1, keepdim=True)
    return {
        "load_most": share.amax(1) - 1,
        "load_least": share.amin(1) - 1,
        "load_cv": share.std(1, correction=0),
        "load_entropy": evenness(share / E),
        "experts_dead": (counts == 0).sum(1),
    }


def of_limits(counts: Tensor, tokens: float, commonest: float) -> Values:
    """How even the load can be, of so many tokens, of which the commonest is this share; counts [layers, E]."""
    E = counts.shape[1]
    top_k = [rows / tokens for rows in counts.sum(1).tolist()]  # where it has changed, its mean
    return {
        "load_cv_floor": torch.tensor([cv_floor(E, tokens, k) for k in top_k]),
        "load_most_floor": torch.tensor([most_floor(E, tokens, k) for k in top_k]),
        "load_most_bound": torch.tensor([most_bound(E, k, commonest) for k in top_k]),
    }


def evenness(shares: Tensor) -> Tensor:
    """Entropy over log E of shares [layers, E] that sum to one: 1 where all are equal."""
    return torch.special.entr(shares).sum(1) / math.log(shares.shape[1])
