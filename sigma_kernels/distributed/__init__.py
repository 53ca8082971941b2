"""Experts spread over the ranks of a process group, and the exchange of rows between them."""

from sigma_kernels.distributed.dispatch import Dispatch, combine, dispatch
from sigma_kernels.distributed.moe import ExpertParallelMoE
from sigma_kernels.distributed.placement import balanced_placement, rank_load

__all__ = ["Dispatch", "ExpertParallelMoE", "balanced_placement", "combine", "dispatch", "rank_load"]
