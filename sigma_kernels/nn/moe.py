"""The mixture-of-experts layer: a router and its experts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sigma_kernels.nn.experts import Experts
from sigma_kernels.nn.router import TopKRouter
from sigma_kernels.ops.capacity import Drop, check_drop, limit_rows
from sigma_kernels.ops.experts import computed_in
from sigma_kernels.ops.route import Score
from sigma_kernels.routing import RouterSums, Routing


class MoE(nn.Module):
    """out[t] = output_scale * sum_j w[t, j] * expert_{index[t, j]}(x[t]), with w and index from the router.

    After a forward, `last_routing` and `last_logits` hold what the router decided, and with gradients enabled
    `last_sums` what balance losses take: their gradient is then part of the router's one backward pass.

    Args:
        top_k: experts per token; `forward(x, top_k=...)` overrides it for one call.
        score, normalize, use_bias, balance_score: as in TopKRouter.
        output_scale: a constant on the routing weights.
        capacity_factor: an expert takes at most ceil(capacity_factor * T*k/E) of the rows of a call, and `last_dropped`
            [E] says how many it was not given; none: all are computed.
        drop: which are left out, "lightest" or "last"; see `sk.limit_rows`.
    Raises: ValueError for a capacity_factor that is no number above 0, or a `drop` that is neither.
    """

    last_routing: Routing | None = None
    last_logits: Tensor | None = None
    last_sums: RouterSums | None = None
    last_dropped: Tensor | None = None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        score: Score = "softmax",
        normalize: bool = False,
        use_bias: bool = False,
        output_scale: float = 1.0,
        balance_score: Score | None = None,
        capacity_factor: float | None = None,
        drop: Drop = "lightest",
        **factory: Any,
    ) -> None:
        super().__init__()
        is_number = isinstance(capacity_factor, int | float) and not isinstance(capacity_factor, bool)
        if capacity_factor is not None and not (is_number and 0 < capacity_factor < math.inf):
            raise ValueError(f"MoE: capacity_factor must be a number above 0, found {capacity_factor!r}")
        check_drop("MoE", drop)
        self.output_scale, self.capacity_factor, self.drop = output_scale, capacity_factor, drop
        self.router = TopKRouter(
            hidden_size, num_experts, top_k, score=score, normalize=normalize, use_bias=use_bias,
            balance_score=balance_score, **factory,
        )  # fmt: skip
        self.experts = Experts(hidden_size, intermediate_size, self.experts_here(num_experts), **factory)

    def experts_here(self, num_experts: int) -> int:
        """How many of the router's experts this module holds: all of them."""
        return num_experts

    @property
    def held(self) -> Sequence[int]:
        """The numbers of this module's experts, in the order of their rows."""
        return range(self.router.weight.shape[0])

    def forward(
        self, x: Tensor, top_k: int | None = None, compute_dtype: torch.dtype | None = None
    ) -> Tensor:
        """[..., H] for x [..., H]; leading dimensions are tokens.

        Under torch.autocast x is computed on in the dtype of the parameters, and the result has the dtype of x.
        compute_dtype: bf16 or f16, in which experts whose parameters are f32 compute, with gradients in f32
        (`sigma_kernels.moe_experts`); the router does not.
        Raises: ValueError if the last dimension of x is not H; TypeError for a compute_dtype.
        """
        H = self.experts.down_proj.shape[1]
        if x.dim() == 0 or x.shape[-1] != H:
            raise ValueError(f"MoE: x must be [..., {H}], found {list(x.shape)}")
        dtype = computed_in("MoE", self.experts.gate_up_proj, self.experts.down_proj, compute_dtype)
        flat = x.reshape(-1, H)
        if torch.is_grad_enabled():
            routing, logits, sums = self.router.forward_with_sums(flat, top_k)
        else:
            (routing, logits), sums = self.router(flat, top_k), None
        self.last_routing, self.last_logits, self.last_sums = routing, logits, sums
        if self.capacity_factor is not None:
            rows = routing.indices.numel() * self.capacity_factor / routing.num_experts
            routing, self.last_dropped = limit_rows(routing, max(1, math.ceil(rows)), self.drop)
        weights = routing.weights.to(dtype)
        if self.output_scale != 1.0:
            weights = weights * self.output_scale
        return self.answered(flat, routing._replace(weights=weights), compute_dtype).view(x.shape)

    def answered(self, x: Tensor, routing: Routing, compute_dtype: torch.dtype | None = None) -> Tensor:
        """What the experts make of tokens x [T, H]."""
        return self.experts.forward_routed(x, routing, compute_dtype)

    def __getstate__(self) -> dict[str, Any]:
        """What copy and pickle take: all but the last forward's decision, which hangs on its graph."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("last_")}
