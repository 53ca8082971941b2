"""The expert layer, defined."""

import torch
import torch.nn.functional as F
from torch import Tensor


def moe_experts(
    hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, gate_up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    """out[t] = sum_j w[t, j] * down[e] @ (silu(gate[e] @ x[t]) * (up[e] @ x[t])) with e = index[t, j]."""
    out = torch.zeros_like(hidden_states)
    for e in range(gate_up_proj.shape[0]):
        token, slot = torch.where(top_k_index == e)
        gate, up = F.linear(hidden_states[token], gate_up_proj[e]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down_proj[e])
        out = out.index_add(0, token, y * top_k_weights[token, slot, None].to(y.dtype))
    return out
