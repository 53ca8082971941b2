"""Choice of experts and the order of rows, defined."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_kernels.routing import Routing


def group_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """counts [E], offsets [E+1] and row_map [R]: slots in order of expert, then of slot (a stable sort)."""
    expert_of_slot = indices.reshape(-1).long()
    counts = torch.bincount(expert_of_slot, minlength=num_experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    row_map = torch.argsort(expert_of_slot, stable=True)
    return counts.int(), offsets.int(), row_map.int()


def route(
    logits: Tensor,
    top_k: int = 1,
    *,
    score: str = "softmax",
    normalize: bool = False,
    bias: Tensor | None = None,
) -> Routing:
    """p = score(logits); take the top_k of p + bias, ties to the lower index; weights are p of the chosen.

    Without a bias the logits give the order: the same in exact arithmetic, and exact where p rounds.  NaN ranks last.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    choice = wide.detach()
    if bias is not None:
        choice = (choice.softmax(-1) if score == "softmax" else choice.sigmoid()) + bias
    choice = choice.masked_fill(choice.isnan(), -torch.inf)
    indices = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = weights_of(wide, indices, score, normalize)
    return Routing(indices.int(), weights.to(logits.dtype), *group_by_expert(indices, logits.shape[1]))


def weights_of(logits: Tensor, indices: Tensor, score: str, normalize: bool) -> Tensor:
    """p of the chosen [T, k]; divided by their sum in logarithms: where all p underflow their ratios do not."""
    if normalize:
        log_p = logits if score == "softmax" else F.logsigmoid(logits)
        return log_p.gather(1, indices.long()).softmax(-1)
    p = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    return p.gather(1, indices.long())


def router_sums(logits: Tensor, score: str = "softmax") -> tuple[Tensor, Tensor]:
    """sum_t q[t] [E] and sum_t (log sum_e exp logits[t, e])^2; q: softmax, or sigmoids divided by their sum."""
    log_p = logits if score == "softmax" else F.logsigmoid(logits)
    return log_p.softmax(-1).sum(0), logits.logsumexp(-1).square().sum()
