"""Hugging Face transformers: experts_implementation="sigma".

from sigma_kernels.integrations import transformers as sk_hf
sk_hf.register()
model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="sigma")
"""

from typing import Any

import torch
from torch import Tensor

from sigma_kernels.ops.experts import moe_experts
from sigma_kernels.ops.grouped_gemm import grouped_gemm
from sigma_kernels.ops.permute import permute, unpermute
from sigma_kernels.ops.route import group_by_expert
from sigma_kernels.routing import Routing

try:
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
except ImportError as error:
    raise ImportError(
        "sigma_kernels.integrations.transformers needs transformers with its experts interface (5.0 or later): "
        f"{error}"
    ) from error


# An experts module of transformers; its attributes come from a decorator that no type checker sees through.
ExpertsModule = Any


def register() -> None:
    """Make "sigma" an experts implementation of every model that goes through transformers' experts interface."""
    ALL_EXPERTS_FUNCTIONS.register("sigma", experts_forward)


def experts_forward(
    self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of an experts module of transformers, in whichever layout its weights lie.

    Bias-free SwiGLU in the common layout runs fused; biases, transposed weights and other gates run as two grouped
    GEMMs around the module's own activation.
    Raises: NotImplementedError under transformers' expert parallelism, whose sentinel indices name no expert.
    """
    if self._is_expert_parallel:
        raise NotImplementedError(
            "experts_implementation='sigma' does not take the sentinel indices of transformers' expert parallelism"
        )
    weights = top_k_weights.to(hidden_states.dtype)
    if _is_plain_swiglu(self):
        return moe_experts(hidden_states, top_k_index, weights, self.gate_up_proj, self.down_proj)
    routing = group_by_expert(top_k_index, self.down_proj.shape[0], weights)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    h = _linear(self, name, permute(hidden_states, routing), routing)
    h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
    y = _linear(self, "down_proj", h, routing)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    return unpermute(y, routing)


def _is_plain_swiglu(module: ExpertsModule) -> bool:
    return (
        module.has_gate
        and module.is_concatenated
        and not (module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False))
        and type(module)._apply_gate is _default_apply_gate
        and isinstance(module.act_fn, SiLUActivation | torch.nn.SiLU)
    )


def _linear(module: ExpertsModule, name: str, x: Tensor, routing: Routing) -> Tensor:
    weight = getattr(module, name)
    y = grouped_gemm(x, weight, routing.offsets, transpose_weight=not module.is_transposed)
    if module.has_bias:
        expert_of_row = routing.indices.reshape(-1)[routing.row_map.long()]
        y = y + getattr(module, f"{name}_bias").index_select(0, expert_of_row)
    return y
