"""Losses and updates that keep the experts in use.

With T tokens, E experts and k chosen for each: f_i = counts_i / (T k), the share of choices that fell on expert i
(no gradient), and p_i, the mean over tokens of the router's probability of i.  Both sum to one.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sigma_kernels.nn.router import TopKRouter
from sigma_kernels.ops.library import check_shape
from sigma_kernels.ops.route import Score, check_score


def load_balancing_loss(logits: Tensor, counts: Tensor, *, score: Score = "softmax") -> Tensor:
    """E * sum_i f_i * p_i: 1 where f or p is uniform, E where one expert has everything.

    Fedus et al. 2021 (arXiv 2101.03961, equation 4), with f divided by k, so that the value does not depend on it.
    Counts of one micro-batch give the micro-batch loss.  Counts summed over ranks and micro-batches
    (`global_counts`) give the global-batch loss of Qiu et al. 2025 (arXiv 2501.11873), under which experts may
    specialise by sequence.

    Args:
        logits: [T, E].
        counts: [E], of these tokens or of the global batch.
        score: what p is made of; a sigmoid's scores are divided by their sum.
    Raises: ValueError for a shape or a score.
    """
    op = "load_balancing_loss"
    check_score(op, score)
    check_shape(op, "logits", logits, ("T", "E"))
    check_shape(op, "counts", counts, (logits.shape[1],))
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # Sigmoids over their sum, in logarithms: where all underflow their ratios do not.
    p = (wide if score == "softmax" else F.logsigmoid(wide)).softmax(-1)
    # An empty batch has no imbalance; its mean would be NaN.
    f = counts.to(p.dtype) / counts.sum().clamp(min=1)
    return logits.shape[1] * (f * (p.sum(0) / max(1, p.shape[0]))).sum()


def global_counts(counts: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """counts [E] summed over the ranks of `group`, as a new tensor; a copy where nothing is distributed."""
    total = counts.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total, group=group)
    return total


def router_z_loss(logits: Tensor) -> Tensor:
    """mean_t (log sum_i exp logits[t, i])^2, which keeps logits small (Zoph et al. 2022, arXiv 2202.08906, eq. 5)."""
    if logits.shape[0] == 0:
        return logits.sum()
    return logits.logsumexp(-1).square().mean()


@torch.no_grad()
def update_expert_bias(router: TopKRouter, counts: Tensor, rate: float = 1e-3) -> None:
    """b_i += rate * sign(mean(counts) - counts_i), after each step (Wang et al. 2024, arXiv 2408.15664, algorithm 1).

    Balances the choice without a gradient of its own; at one active expert of many it is known to run away.

    Raises: ValueError if the router was made without use_bias or counts are not [E].
    """
    if router.expert_bias is None:
        raise ValueError("update_expert_bias: the router has no expert_bias; make it with use_bias=True")
    check_shape("update_expert_bias", "counts", counts, tuple(router.expert_bias.shape))
    load = counts.to(router.expert_bias.dtype)
    router.expert_bias += rate * (load.mean() - load).sign()
