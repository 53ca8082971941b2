"""The mixture-of-experts layer whose experts are spread over ranks."""

from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sigma_kernels.distributed.dispatch import combine, dispatch, experts_of_rank, process_group
from sigma_kernels.nn.moe import MoE
from sigma_kernels.ops.experts import experts_of_routing
from sigma_kernels.ops.library import as_weights
from sigma_kernels.routing import Routing


class ExpertParallelMoE(MoE):
    """`sk.nn.MoE` on P ranks: each has the whole router, and E/P of the experts, those of its place in the group.

    Parameters start as each rank's own generator has them, the router's too: make it `from_whole`, of a layer that all
    ranks made alike, or load it.

    Every rank calls it, with tokens of its own, however many.  The gradient of the router is of this rank's tokens, as
    under data parallelism; that of the experts is of all ranks' tokens, summed.  Where the loss is the mean over ranks,
    the router's is averaged over them and the experts' divided by P.

    Args: as `sk.nn.MoE`, num_experts being all that there are.  group: the ranks, all where not given; of a DeviceMesh
        of one dimension the experts' parameters are DTensors, sharded by expert, so that norms, optimizers and
        checkpoints see them whole and FSDP2 (with these in `ignored_params`) can have all others.
    Raises: RuntimeError without a process group, ValueError if num_experts is no multiple of its ranks,
        or the mesh has several dimensions.
    """

    def __init__(
        self, *sizes: int, group: dist.ProcessGroup | DeviceMesh | None = None, **options: Any
    ) -> None:
        if isinstance(group, DeviceMesh) and group.ndim != 1:
            raise ValueError(f"ExpertParallelMoE: group must be a mesh of one dimension, found {group.ndim}")
        # Before the parameters are made, whose number it decides.
        self.group = group.get_group() if isinstance(group, DeviceMesh) else process_group(group)
        super().__init__(*sizes, **options)
        if isinstance(group, DeviceMesh):
            self._shard(group)

    def experts_here(self, num_experts: int) -> int:
        return experts_of_rank("ExpertParallelMoE", num_experts, self.group.size())

    def _shard(self, mesh: DeviceMesh) -> None:
        from torch.distributed.tensor import (
            DTensor,
            Shard,
        )  # half a second that `import sigma_kernels` can do without

        for name, own in list(self.experts.named_parameters()):
            whole = DTensor.from_local(own.detach(), mesh, [Shard(0)], run_check=False)
            setattr(self.experts, name, nn.Parameter(whole, own.requires_grad))

    @classmethod
    def from_whole(cls, moe: MoE, group: dist.ProcessGroup | DeviceMesh | None = None) -> Self:
        """This rank's part of a layer that every rank has whole; parameters are copied."""
        E, H, I = moe.experts.down_proj.shape
        router, mesh = moe.router, group if isinstance(group, DeviceMesh) else None
        with torch.device("meta"):
            here = cls(
                H, I, E, router.top_k, score=router.score, normalize=router.normalize,
                use_bias=router.expert_bias is not None, balance_score=router.balance_score,
                output_scale=moe.output_scale, capacity_factor=moe.capacity_factor, drop=moe.drop,
                group=mesh.get_group() if mesh else group,
            )  # fmt: skip
        count = here.experts.down_proj.shape[0]
        mine = slice(here.group.rank() * count, (here.group.rank() + 1) * count)
        state = moe.state_dict()
        parts = {name: x[mine] if name.startswith("experts.") else x for name, x in state.items()}
        here.load_state_dict({name: part.clone() for name, part in parts.items()}, assign=True)
        for name, parameter in here.named_parameters():
            parameter.requires_grad_(moe.get_parameter(name).requires_grad)
        if mesh:
            here._shard(mesh)
        return here.train(moe.training)

    def answered(self, x: Tensor, routing: Routing) -> Tensor:
        gate_up, down = (local(p) for p in (self.experts.gate_up_proj, self.experts.down_proj))
        sent = dispatch(as_weights(x, down), routing, self.group)
        out = combine(experts_of_routing(sent.rows, sent.routing, gate_up, down), sent)
        return out if out.dtype == x.dtype else out.to(x.dtype)


def local(parameter: Any) -> Tensor:
    """Of a DTensor this rank's part."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
