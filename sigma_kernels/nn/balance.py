"""Losses and updates that keep the experts in use.

With T tokens, E experts and k chosen for each: f_i = counts_i / (T k), the share of choices that fell on expert i
(no gradient), and p_i, the mean over tokens of the router's probability of i.  Both sum to one.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sigma_kernels.collectives import observed
from sigma_kernels.nn.router import TopKRouter
from sigma_kernels.ops.library import check_shape
from sigma_kernels.ops.route import Score, check_score
from sigma_kernels.routing import RouterSums


def load_balancing_loss(scores: Tensor | RouterSums, counts: Tensor, *, score: Score | None = None) -> Tensor:
    """E * sum_i f_i * p_i: 1 where f or p is uniform, E where one expert has everything.

    Fedus et al. 2021 (arXiv 2101.03961, equation 4), with f divided by k, so that the value does not depend on it.
    Counts of one micro-batch give the micro-batch loss.  Counts summed over ranks and micro-batches
    (`global_counts`) give the global-batch loss of Qiu et al. 2025 (arXiv 2501.11873), under which experts may
    specialise by sequence.

    Args:
        scores: logits [T, E], or what `sk.route_with_sums` summed of them in the pass that routed: the same loss, and
            its gradient is part of the router's one backward pass.
        counts: [E], of these tokens or of the global batch.
        score: what p is made of, "softmax" where not given; a sigmoid's scores are divided by their sum.  Sums have
            theirs.
    Raises: ValueError for a shape or a score.
    """
    op = "load_balancing_loss"
    if isinstance(scores, RouterSums):
        sums, T = scores.probabilities, scores.tokens
        if score not in (None, scores.score):
            raise ValueError(f"{op}: score is {score!r}, the sums are of {scores.score!r}")
    else:
        check_score(op, "softmax" if score is None else score)
        check_shape(op, "logits", scores, ("T", "E"))
        wide, T = _wide(scores), scores.shape[0]
        # Sigmoids over their sum, in logarithms: where all underflow their ratios do not.
        sums = (F.logsigmoid(wide) if score == "sigmoid" else wide).softmax(-1).sum(0)
    check_shape(op, "counts", counts, (sums.shape[0],))
    # An empty batch has no imbalance; its mean would be NaN.
    f = counts.to(sums.dtype) / counts.sum().clamp(min=1)
    return sums.shape[0] / max(1, T) * (f * sums).sum()


def global_counts(counts: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """counts [E] summed over the ranks of `group`, as a new tensor; a copy where nothing is distributed."""
    total = counts.detach().clone()
    if dist.is_available() and dist.is_initialized():
        with observed("load"):
            dist.all_reduce(total, group=group)
    return total


def router_z_loss(scores: Tensor | RouterSums) -> Tensor:
    """mean_t (log sum_i exp logits[t, i])^2, which keeps logits small (Zoph et al. 2022, arXiv 2202.08906, eq. 5).

    Args:
        scores: logits [T, E], or the sums of `sk.route_with_sums`.
    """
    if isinstance(scores, RouterSums):
        return scores.square / max(1, scores.tokens)
    if scores.shape[0] == 0:
        return scores.sum()
    return scores.logsumexp(-1).square().mean()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


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
