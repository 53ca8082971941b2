"""Each operation in plain torch: the definition of what the kernels compute, and the oracle of every test."""

from sigma_kernels.reference.experts import moe_experts
from sigma_kernels.reference.fp8 import moe_experts_fp8
from sigma_kernels.reference.grouped_gemm import grouped_gemm, grouped_outer
from sigma_kernels.reference.permute import permute, unpermute
from sigma_kernels.reference.route import group_by_expert, route, router_sums, weights_of
from sigma_kernels.reference.swiglu import swiglu

__all__ = [
    "group_by_expert",
    "grouped_gemm",
    "grouped_outer",
    "moe_experts",
    "moe_experts_fp8",
    "permute",
    "route",
    "router_sums",
    "swiglu",
    "unpermute",
    "weights_of",
]
