"""The experts' parameters."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sigma_kernels.ops.experts import experts_and_gate_up, experts_of_routing, moe_experts
from sigma_kernels.ops.library import check_size
from sigma_kernels.routing import Routing


class Experts(nn.Module):
    """E SwiGLU experts: gate_up_proj [E, 2I, H] (gate rows, then up), down_proj [E, H, I], as in Hugging Face.

    Equation: `sigma_kernels.moe_experts`.  Parameters start uniform in +-1/sqrt(fan-in), as torch's Linear does.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int, **factory: Any) -> None:
        super().__init__()
        check_size("Experts", "hidden_size", hidden_size)
        check_size("Experts", "intermediate_size", intermediate_size)
        check_size("Experts", "num_experts", num_experts)
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size, **factory)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.gate_up_proj, self.down_proj):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """[T, H] for hidden_states [T, H], top_k_index and top_k_weights [T, k].

        Under torch.autocast inputs are computed on in the dtype of the parameters, and the result has that of
        hidden_states.  compute_dtype: as `sigma_kernels.moe_experts` has it.
        """
        proj = self.gate_up_proj, self.down_proj
        return moe_experts(hidden_states, top_k_index, top_k_weights, *proj, compute_dtype=compute_dtype)

    def forward_routed(
        self, hidden_states: Tensor, routing: Routing, compute_dtype: torch.dtype | None = None
    ) -> Tensor:
        """The same from a Routing, whose order of rows need not be found again."""
        return experts_of_routing(hidden_states, routing, self.gate_up_proj, self.down_proj, compute_dtype)

    def forward_observed(
        self, hidden_states: Tensor, routing: Routing, compute_dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """`forward_routed`, and what the kernel applied SwiGLU to: [R, 2I], gates and then ups, in expert order."""
        return experts_and_gate_up(hidden_states, routing, self.gate_up_proj, self.down_proj, compute_dtype)

    def extra_repr(self) -> str:
        E, H, I = self.down_proj.shape
        return f"hidden_size={H}, intermediate_size={I}, num_experts={E}"
