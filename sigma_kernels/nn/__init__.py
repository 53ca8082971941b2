"""Drop-in modules and the losses that keep experts in use."""

from sigma_kernels.nn.balance import (
    global_counts,
    load_balancing_loss,
    router_z_loss,
    update_expert_bias,
)
from sigma_kernels.nn.experts import Experts
from sigma_kernels.nn.moe import MoE
from sigma_kernels.nn.router import TopKRouter

__all__ = [
    "Experts",
    "MoE",
    "TopKRouter",
    "global_counts",
    "load_balancing_loss",
    "router_z_loss",
    "update_expert_bias",
]
