"""Mixture-of-experts kernels for PyTorch: one expert of many at the price of a dense layer of the same active size."""

from importlib.util import find_spec

if find_spec("sigma_kernels._C") is None:
    raise ImportError(
        "sigma_kernels._C is not built: this is a source checkout without its extension; "
        "run 'pip install -e .' in it, or start Python from another folder to use an installed wheel"
    )

from sigma_kernels import _C as _C
from sigma_kernels import distributed, nn
from sigma_kernels.backends import backend, backends
from sigma_kernels.ops.capacity import limit_rows
from sigma_kernels.ops.experts import accumulate_grad, moe_experts
from sigma_kernels.ops.grouped_gemm import grouped_gemm
from sigma_kernels.ops.library import empty_cache
from sigma_kernels.ops.mass import limit_mass
from sigma_kernels.ops.permute import permute, unpermute
from sigma_kernels.ops.quantized import moe_experts_fp8, moe_experts_int8, quantize_experts
from sigma_kernels.ops.route import group_by_expert, route
from sigma_kernels.ops.route_with_sums import route_with_sums
from sigma_kernels.routing import RouterSums, Routing

__version__ = "0.1.0"

__all__ = [
    "RouterSums",
    "Routing",
    "accumulate_grad",
    "backend",
    "backends",
    "distributed",
    "empty_cache",
    "group_by_expert",
    "grouped_gemm",
    "limit_mass",
    "limit_rows",
    "moe_experts",
    "moe_experts_fp8",
    "moe_experts_int8",
    "nn",
    "permute",
    "quantize_experts",
    "route",
    "route_with_sums",
    "unpermute",
]
