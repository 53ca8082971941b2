"""Experts spread over the ranks of a process group, and the exchange of rows between them."""

from sigma_kernels.distributed.dispatch import Dispatch, combine, dispatch
from sigma_kernels.distributed.moe import ExpertParallelMoE

__all__ = ["Dispatch", "ExpertParallelMoE", "combine", "dispatch"]
