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
    p = wide.softmax(-1) if score == "softmax" else wide.sigmoid()
    choice = wide.detach() if bias is None else p.detach() + bias
    choice = choice.masked_fill(choice.isnan(), -torch.inf)
    indices = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = p.gather(1, indices)
    if normalize:  # p / sum of p, in logarithms: where all p underflow their ratios do not
        log_p = wide if score == "softmax" else F.logsigmoid(wide)
        weights = log_p.gather(1, indices).softmax(-1)
    return Routing(indices.int(), weights.to(logits.dtype), *group_by_expert(indices, logits.shape[1]))
