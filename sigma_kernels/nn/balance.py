"""Losses and updates that keep the experts in use.

With T tokens, E experts and k chosen for each: f_i = counts_i / (T k), the share of choices that fell on expert i
(no gradient), and p_i, the mean over tokens of the router's probability of i.  Both sum to one.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sigma_kernels.collectives import observed
from sigma_kernels.nn.router import TopKRouter
from sigma_kernels.ops.library import check_float, check_shape
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


def top1_balancing_loss(
    logits: Tensor,
    temperature: float = 0.1,
    *,
    is_global: bool = False,
    group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """E * sum_i fhat_i^2 / pbar: 1 where q[t] is all on one expert, each having as many t; E where q is flat.

    With q[t] = softmax(logits[t] / temperature), fhat_i = mean_t q[t, i] and pbar = mean_t max_i q[t, i]: the Top-1 LBL
    of Sigma-MoE-Tiny (arXiv 2512.16248), for one expert a token.  fhat stands for the shares of tokens and, unlike
    them, has a gradient; a flat q, at which `load_balancing_loss` is least whatever the shares, is the worst case here.

    Args:
        logits: [T, E] f32, bf16 or f16, computed in f32; or f64.
        temperature: the smaller, the closer fhat is to the shares of tokens.
        is_global: fhat and pbar are of the tokens of all ranks of `group`.  One all-reduce of E + 2 numbers: the sums
            over tokens of q and of max_i q, and T; it happens on a rank without tokens too.  The value is that of the
            whole batch, and so is the mean over ranks of the parameters' gradients, however many tokens each rank has.
    Returns: the loss, in f32 or f64; 0 without tokens.  Where several q[t, i] are the largest they share its gradient.
    Raises: ValueError for a shape or a temperature, TypeError for logits that are not floating point.
    Cost: one [T, E] is kept for the backward, q.
    """
    op = "top1_balancing_loss"
    check_float(op, logits=logits)
    check_shape(op, "logits", logits, ("T", "E"))
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be a finite number above 0, found {temperature!r}")
    q = (_wide(logits) / temperature).softmax(-1)
    T, E = q.shape
    sums = torch.cat([q.sum(0), q.amax(-1).sum()[None], q.new_full((1,), T)])
    if is_global:
        sums = _of_all_ranks(sums, group)
    q_of_expert, largest, tokens = sums.split([E, 1, 1])
    # Of no tokens the product is 0; of any it is at least 1 / E.
    product = (largest * tokens).clamp(min=torch.finfo(q.dtype).tiny)
    return (E * q_of_expert.square().sum() / product).squeeze(0)


def _of_all_ranks(sums: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Summed over the ranks of `group`; the gradient is this rank's, times their number, which a mean takes out."""
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    total = global_counts(sums, group)
    return total + dist.get_world_size(group) * (sums - sums.detach())


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
