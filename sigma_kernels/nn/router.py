"""The router's parameters."""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sigma_kernels.ops.library import check_size, in_autocast
from sigma_kernels.ops.route import Score, check_score, route
from sigma_kernels.ops.route_with_sums import route_with_sums
from sigma_kernels.routing import RouterSums, Routing


def _warn_of_one() -> None:
    warnings.warn(
        "TopKRouter: normalize=True with top_k=1 makes every weight 1, so the router gets no gradient from "
        "the task loss",
        stacklevel=3,
    )


class TopKRouter(nn.Module):
    """Scores E experts for each token and picks k: `sigma_kernels.route` of x @ weight.T, in f32.

    Two traps of top_k = 1, both of which a run falls into silently.  With `normalize` the weight of the one chosen
    is always 1, so the task's gradient never reaches the router: this warns, and so does a call with gradients and a
    top_k of 1, outside torch.compile; `normalize` may be set between calls.  Without it a softmax over E experts
    starts near 1/E, so that the layer's output almost vanishes: scale it (MoE's `output_scale`) or use "sigmoid".

    `balance_score` is what balance losses read of the scores where it is not `score`: see `forward_with_sums`.

    With `use_bias` a buffer `expert_bias` [E] is added for the choice only; `update_expert_bias` moves it.  It is f32
    and stays so when the module is cast: in bf16 steps of 1e-3 end at 0.5.
    """

    expert_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        score: Score = "softmax",
        normalize: bool = False,
        use_bias: bool = False,
        balance_score: Score | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        check_size("TopKRouter", "hidden_size", hidden_size)
        check_size("TopKRouter", "num_experts", num_experts)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"TopKRouter: top_k must lie in 1..{num_experts}, found {top_k}")
        check_score("TopKRouter", score)
        balance_score = score if balance_score is None else balance_score
        check_score("TopKRouter", balance_score, "balance_score")
        if normalize and top_k == 1:
            _warn_of_one()
        self.top_k, self.score, self.normalize = top_k, score, normalize
        self.balance_score: Score = balance_score
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, **factory))
        self.register_buffer(
            "expert_bias",
            torch.zeros(num_experts, dtype=torch.float32, device=self.weight.device) if use_bias else None,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def forward(self, hidden_states: Tensor, top_k: int | None = None) -> tuple[Routing, Tensor]:
        """The Routing of hidden_states [T, H] and the logits [T, E], both f32 (f64 if the input is)."""
        logits = self._logits(hidden_states)
        return route(logits, self.top_k if top_k is None else top_k, **self._how()), logits

    def forward_with_sums(
        self, hidden_states: Tensor, top_k: int | None = None
    ) -> tuple[Routing, Tensor, RouterSums]:
        """The same, and the sums that `load_balancing_loss` and `router_z_loss` take: `sk.route_with_sums`."""
        if top_k == 1 != self.top_k and self.normalize and not torch.compiler.is_compiling():
            _warn_of_one()
        logits = self._logits(hidden_states)
        how = {**self._how(), "balance_score": self.balance_score}
        routing, sums = route_with_sums(logits, self.top_k if top_k is None else top_k, **how)
        return routing, logits, sums

    def _logits(self, hidden_states: Tensor) -> Tensor:
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        device = hidden_states.device.type  # a choice is worth all its bits
        with torch.autocast(device, enabled=False) if in_autocast(hidden_states) else nullcontext():
            return F.linear(hidden_states.to(wide), self.weight.to(wide))

    def _how(self) -> dict[str, Any]:
        return {"score": self.score, "normalize": self.normalize, "bias": self.expert_bias}

    def extra_repr(self) -> str:
        E, H = self.weight.shape
        return f"hidden_size={H}, num_experts={E}, top_k={self.top_k}, score={self.score}, normalize={self.normalize}"
