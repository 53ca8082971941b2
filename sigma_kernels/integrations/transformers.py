"""Hugging Face transformers: experts_implementation="sigma".

from sigma_kernels.integrations import transformers as sk_hf
sk_hf.register()
model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="sigma")
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from sigma_kernels.backends import refusal
from sigma_kernels.ops.experts import experts_and_gate_up, moe_experts
from sigma_kernels.ops.grouped_gemm import grouped_gemm
from sigma_kernels.ops.library import as_weights
from sigma_kernels.ops.permute import permute, unpermute
from sigma_kernels.ops.route import group_by_expert
from sigma_kernels.routing import Routing

try:
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import (
        ALL_EXPERTS_FUNCTIONS,
        _default_apply_gate,
        use_experts_implementation,
    )
except ImportError as error:
    raise ImportError(
        "sigma_kernels.integrations.transformers needs transformers with its experts interface (5.7 or later): "
        f"{error}"
    ) from error


# An experts module of transformers; its attributes come from a decorator that no type checker sees through.
ExpertsModule = Any

# What that decorator says of a module, and what holds where an older release (5.7 at the oldest) does not say it.
FLAGS = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_concatenated": True,
    "is_transposed": False,
    "_is_expert_parallel": False,
}
# What a newer release may say beyond that: with any value but its default, the module is not one that we know.
UNKNOWN_FLAGS = {
    name: parameter.default
    for name, parameter in inspect.signature(use_experts_implementation).parameters.items()
    if name not in {"experts_class", "experts_interface", *FLAGS}
}


def register() -> None:
    """Make "sigma" an experts implementation of every model that goes through transformers' experts interface."""
    ALL_EXPERTS_FUNCTIONS.register("sigma", experts_forward)


def experts_forward(
    self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of an experts module of transformers, in whichever layout its weights lie.

    Bias-free SwiGLU in the common layout runs fused; biases, transposed weights and other gates run as two grouped
    GEMMs around the module's own activation.
    Under torch.autocast they are computed on in the dtype of the parameters, and the result has that of hidden_states.
    Raises: NotImplementedError naming what is missing: expert parallelism, whose sentinel indices name no expert, or a
        flag of a release that is newer than this code; RuntimeError naming the module if no backend takes its dtype.
    """
    x, weights = _inputs(self, hidden_states, top_k_weights)
    if is_plain_swiglu(self):
        out = moe_experts(x, top_k_index, weights, self.gate_up_proj, self.down_proj)
    else:
        out = _in_steps(self, x, group_by_expert(top_k_index, self.down_proj.shape[0], weights))
    return out.to(hidden_states.dtype)


def experts_forward_observed(
    self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> tuple[Tensor, Routing, Tensor]:
    """`experts_forward` of plain SwiGLU, how its rows are ordered, and what the kernel applied SwiGLU to: [R, 2I]."""
    x, weights = _inputs(self, hidden_states, top_k_weights)
    routing = group_by_expert(top_k_index, self.down_proj.shape[0], weights)
    out, gate_up = experts_and_gate_up(x, routing, self.gate_up_proj, self.down_proj)
    return out.to(hidden_states.dtype), routing, gate_up


def _inputs(self: ExpertsModule, hidden_states: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor]:
    x = as_weights(hidden_states, self.down_proj)
    _check(self, x)
    return x, top_k_weights.to(x.dtype)


def _in_steps(self: ExpertsModule, x: Tensor, routing: Routing) -> Tensor:
    has_gate = _flag(self, "has_gate")
    h = _linear(self, "gate_up_proj" if has_gate else "up_proj", permute(x, routing), routing)
    h = self._apply_gate(h) if has_gate else self.act_fn(h)
    y = _linear(self, "down_proj", h, routing)
    if _flag(self, "has_post_expert_norm"):
        y = self.post_expert_norm(y)
    return unpermute(y, routing)


def _flag(module: ExpertsModule, name: str) -> bool:
    return getattr(module, name, FLAGS[name])


def _check(module: ExpertsModule, x: Tensor) -> None:
    """Refuse what would give other numbers than eager, and what no backend runs."""
    who = f"experts_implementation='sigma' cannot run {type(module).__name__}"
    if _flag(module, "_is_expert_parallel"):
        raise NotImplementedError(
            f"{who}: it does not take the sentinel indices of transformers' expert parallelism"
        )
    for name, default in UNKNOWN_FLAGS.items():
        if getattr(module, name, default) != default:
            raise NotImplementedError(f"{who}: it does not know {name}={getattr(module, name)!r}")
    if not _flag(module, "is_concatenated") and _has_default_gate(module):
        raise NotImplementedError(
            f"{who}: interleaved gate and up rows need an _apply_gate of the class's own"
        )
    for op in ("moe_experts",) if is_plain_swiglu(module) else ("permute", "grouped_gemm", "unpermute"):
        if reason := refusal(op, x):
            raise RuntimeError(f"{who}: {reason}")


def is_plain_swiglu(module: ExpertsModule) -> bool:
    return (
        all(_flag(module, name) == FLAGS[name] for name in FLAGS)
        and _has_default_gate(module)
        and (isinstance(module.act_fn, SiLUActivation | torch.nn.SiLU) or module.act_fn is silu)
    )


def _has_default_gate(module: ExpertsModule) -> bool:
    return getattr(module._apply_gate, "__func__", None) is _default_apply_gate


def _linear(module: ExpertsModule, name: str, x: Tensor, routing: Routing) -> Tensor:
    weight = getattr(module, name)
    y = grouped_gemm(x, weight, routing.offsets, transpose_weight=not _flag(module, "is_transposed"))
    if _flag(module, "has_bias"):
        expert_of_row = routing.indices.reshape(-1)[routing.row_map.long()]
        y = y + getattr(module, f"{name}_bias").index_select(0, expert_of_row)
    return y
