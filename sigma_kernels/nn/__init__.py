"""Drop-in modules, the losses that keep experts in use, and how many experts a token goes to while a model trains."""

from sigma_kernels.nn.balance import (
    global_counts,
    load_balancing_loss,
    router_z_loss,
    top1_balancing_loss,
    update_expert_bias,
)
from sigma_kernels.nn.expert_count import ExpertCountSampler
from sigma_kernels.nn.experts import Experts
from sigma_kernels.nn.moe import MoE
from sigma_kernels.nn.router import TopKRouter
from sigma_kernels.nn.sparsity import Phase, SparsitySchedule

__all__ = [
    "ExpertCountSampler",
    "Experts",
    "MoE",
    "Phase",
    "SparsitySchedule",
    "TopKRouter",
    "global_counts",
    "load_balancing_loss",
    "router_z_loss",
    "top1_balancing_loss",
    "update_expert_bias",
]
