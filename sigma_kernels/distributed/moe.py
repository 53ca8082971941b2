"""The mixture-of-experts layer whose experts are spread over ranks."""

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from sigma_kernels.distributed.dispatch import (
    begin_combine,
    begin_dispatch,
    combine,
    dispatch,
    process_group,
)
from sigma_kernels.distributed.exchange import all_to_all
from sigma_kernels.distributed.payload import Payload, check_payload
from sigma_kernels.distributed.placement import (
    by_place,
    check_placement,
    experts_by_place,
    experts_of_rank,
    moves,
)
from sigma_kernels.nn.moe import MoE
from sigma_kernels.ops.experts import experts_of_routing
from sigma_kernels.ops.library import as_weights, check_size, empty
from sigma_kernels.ops.route import group_where_present
from sigma_kernels.routing import Routing


class ExpertParallelMoE(MoE):
    """`sk.nn.MoE` on P ranks: each has the whole router, and E/P of the experts, those whose places are the rank's.

    Parameters start as each rank's own generator has them, the router's too: make it `from_whole`, of a layer that all
    ranks made alike, or load it.

    Every rank calls it, with tokens of its own, however many.  The gradient of the router is of this rank's tokens, as
    under data parallelism; that of the experts is of all ranks' tokens, summed.  Where the loss is the mean over ranks,
    the router's is averaged over them and the experts' divided by P.

    Args: as `sk.nn.MoE`, num_experts being all that there are.  group: the ranks, all where not given; of a DeviceMesh
        of one dimension the experts' parameters are DTensors, sharded by expert, so that norms, optimizers and
        checkpoints see them whole and FSDP2 (with these in `ignored_params`) can have all others.
        payload: how rows travel, as in `dispatch`.
        chunks: of a rank's experts; rows of the next one travel while one is computed, in the backward too.  Each chunk
            is exchanges of its own, and gradients of the chunks' weights are copied together once.
        placement: [E] int32 or int64, the same on all ranks: the place of each expert; rank p holds those at
            p*E/P .. (p+1)*E/P-1.  Where not given, experts stand in the order of their numbers, by which all else knows
            them in any case.  `place` changes it.

    `placement` is a buffer, int64, and None where that order is the numbers': then no state dict has it.

    Raises: RuntimeError without a process group, ValueError if num_experts is no multiple of its ranks times chunks,
        the mesh has several dimensions, or placement is no permutation; TypeError for its dtype.
    """

    placement: Tensor | None

    def __init__(
        self,
        *sizes: int,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        chunks: int = 1,
        payload: Payload = "same",
        placement: Tensor | None = None,
        **options: Any,
    ) -> None:
        if isinstance(group, DeviceMesh) and group.ndim != 1:
            raise ValueError(f"ExpertParallelMoE: group must be a mesh of one dimension, found {group.ndim}")
        # Before the parameters are made, whose number it decides.
        self.group = group.get_group() if isinstance(group, DeviceMesh) else process_group(group)
        super().__init__(*sizes, **options)
        here = self.experts.down_proj.shape[0]
        check_size("ExpertParallelMoE", "chunks", chunks)
        if here % chunks:
            raise ValueError(
                f"ExpertParallelMoE: chunks must divide the {here} experts of a rank, found {chunks!r}"
            )
        check_payload("ExpertParallelMoE", payload)
        self.chunks, self.payload = chunks, payload
        self.register_buffer("placement", None)
        self.stand_at(placement)
        if isinstance(group, DeviceMesh):
            self._shard(group)

    def experts_here(self, num_experts: int) -> int:
        return experts_of_rank("ExpertParallelMoE", num_experts, self.group.size())

    def stand_at(self, placement: Tensor | None) -> None:
        """Take a placement over, for rows that are about to be loaded: none is moved.  Raises: as `place`."""
        if placement is not None:
            E = self.router.weight.shape[0]
            check_placement("ExpertParallelMoE", placement, E)
            is_in_order = placement.tolist() == list(range(E))
            where = self.router.weight.device
            placement = None if is_in_order else placement.to(where, torch.int64, copy=True)
        self.placement = placement

    @property
    def places(self) -> Tensor:
        """[E] int64 on the host, where each expert stands."""
        return torch.arange(self.router.weight.shape[0]) if self.placement is None else self.placement.cpu()

    @property
    def held(self) -> Sequence[int]:
        """The numbers of this rank's experts, in the order of their rows."""
        return experts_by_place(self.places).chunk(self.group.size())[self.group.rank()].tolist()

    @torch.no_grad()
    def place(self, placement: Tensor | None, optimizer: Optimizer | None = None) -> int:
        """Have the experts stand at these places: their rows go from rank to rank; a collective.

        Moved are parameters, gradients that are there, and what an optimizer keeps of each row; in place, so that they
        stay the optimizer's, and bit for bit.  Beside one such tensor at a time its rows that leave and those that come
        are held.  To be called between steps, not between a forward and its backward.

        Args:
            placement: [E], the same on all ranks of the group; None: the order of numbers.
            optimizer: of these parameters; its scalars, as a count of steps, stay.
        Returns: bytes that this rank sent to others.
        Raises: TypeError or ValueError for a placement that is none, or an optimizer's tensor that has no row for each
            expert; before anything is sent.
        """
        rank, old, tensors = self.group.rank(), self.places, self._of_rows(optimizer)
        self.stand_at(placement)
        if torch.equal(old, self.places):
            return 0
        go, sent = moves(old, self.places, rank, self.group.size()), 0
        leave, fill = (index.to(self.router.weight.device) for index in (go.leave, go.fill))
        for rows in tensors:
            rows[fill] = all_to_all(rows[leave], go.send, go.receive, self.group)
            sent += (sum(go.send) - go.send[rank]) * rows[:1].numel() * rows.element_size()
        return sent

    def _of_rows(self, optimizer: Optimizer | None) -> list[Tensor]:
        """What has a row for each expert of this rank."""
        if not isinstance(optimizer, Optimizer | None):
            raise TypeError(
                f"ExpertParallelMoE.place: optimizer must be one, found {type(optimizer).__name__}"
            )
        found = []
        for name, parameter in self.experts.named_parameters():
            rows = local(parameter.detach())
            found += [rows] if parameter.grad is None else [rows, local(parameter.grad)]
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            for what, x in state.items():
                if not isinstance(x, Tensor) or x.dim() == 0:
                    continue
                if x.shape[0] != parameter.shape[0]:
                    raise ValueError(
                        f"ExpertParallelMoE.place: the optimizer's {what} of {name} must have a row for each of "
                        f"{parameter.shape[0]} experts, found {list(x.shape)}"
                    )
                found.append(local(x))
        return found

    def _shard(self, mesh: DeviceMesh) -> None:
        from torch.distributed.tensor import (
            DTensor,
            Shard,
        )  # half a second that `import sigma_kernels` can do without

        for name, own in list(self.experts.named_parameters()):
            whole = DTensor.from_local(own.detach(), mesh, [Shard(0)], run_check=False)
            setattr(self.experts, name, nn.Parameter(whole, own.requires_grad))

    @classmethod
    def from_whole(
        cls,
        moe: MoE,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        chunks: int = 1,
        payload: Payload = "same",
        placement: Tensor | None = None,
    ) -> Self:
        """This rank's part of a layer that every rank has whole; parameters are copied."""
        E, H, I = moe.experts.down_proj.shape
        router, mesh = moe.router, group if isinstance(group, DeviceMesh) else None
        with torch.device("meta"):
            here = cls(
                H, I, E, router.top_k, score=router.score, normalize=router.normalize,
                use_bias=router.expert_bias is not None, balance_score=router.balance_score,
                output_scale=moe.output_scale, capacity_factor=moe.capacity_factor, drop=moe.drop,
                group=mesh.get_group() if mesh else group, chunks=chunks, payload=payload,
            )  # fmt: skip
        state = router.state_dict()
        here.router.load_state_dict({name: x.clone() for name, x in state.items()}, assign=True)
        here.stand_at(placement)
        rows = {name: x[here.held] for name, x in moe.experts.state_dict().items()}
        here.experts.load_state_dict(rows, assign=True)
        for name, parameter in here.named_parameters():
            parameter.requires_grad_(moe.get_parameter(name).requires_grad)
        if mesh:
            here._shard(mesh)
        return here.train(moe.training)

    def answered(self, x: Tensor, routing: Routing, compute_dtype: torch.dtype | None = None) -> Tensor:
        gate_up, down = (local(p) for p in (self.experts.gate_up_proj, self.experts.down_proj))
        tokens = as_weights(x, down) if compute_dtype is None else x.to(compute_dtype)
        if self.placement is not None:
            routing = by_place(routing, self.placement)
        if self.chunks > 1:
            out = self._in_chunks(tokens, routing, gate_up, down, compute_dtype)
        else:
            sent = dispatch(tokens, routing, self.group, self.payload)
            out = combine(experts_of_routing(sent.rows, sent.routing, gate_up, down, compute_dtype), sent)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def _in_chunks(
        self, x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor, compute_dtype: torch.dtype | None
    ) -> Tensor:
        """A chunk's rows travel while the chunk before is computed, and its answers while the next one is."""
        routings = chunked(routing, self.group.size(), self.chunks)
        projections = zip(*(_Parts.apply(weight, self.chunks) for weight in (gate_up, down)), strict=True)
        ahead = begin_dispatch(x, routings[0], self.group, self.payload)
        answers = []
        for chunk, (gate_up_part, down_part) in enumerate(projections):
            coming = ahead
            if chunk + 1 < self.chunks:
                ahead = begin_dispatch(x, routings[chunk + 1], self.group, self.payload)
            sent = coming.wait()
            out = experts_of_routing(sent.rows, sent.routing, gate_up_part, down_part, compute_dtype)
            answers.append(begin_combine(out, sent))
        return sum((answer.wait() for answer in answers[1:]), start=answers[0].wait())


class _Parts(torch.autograd.Function):
    """A weight in n equal parts, as views.  Their gradients come together in memory that is kept when freed: autograd's
    own goes to fresh pages, whose first touch took as long as the whole backward (302 MB, two cores)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.n = weight.shape, n
        return weight.chunk(n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        there = next((grad for grad in grads if grad is not None), None)
        if there is None:
            return None, None
        whole = empty(there, *ctx.shape)
        for part, grad in zip(whole.chunk(ctx.n), grads, strict=True):
            part.zero_() if grad is None else part.copy_(grad)
        return whole, None


def chunked(routing: Routing, ranks: int, chunks: int) -> list[Routing]:
    """Of each rank's experts in `chunks` parts: the choices of part c among the part's experts of all ranks."""
    E = routing.num_experts
    per_rank, size = E // ranks, E // ranks // chunks
    rank, place = routing.indices // per_rank, routing.indices % per_rank
    index, chunk = rank * size + place % size, place // size
    rows = routing.counts.view(ranks, chunks, size).sum((0, 2)).tolist()
    absent, is_absent = ranks * size, routing.indices == E
    return [
        group_where_present(
            index.masked_fill(is_absent | (chunk != c), absent).int(), absent, routing.weights, rows[c]
        )
        for c in range(chunks)
    ]


def local(parameter: Any) -> Tensor:
    """Of a DTensor this rank's part."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
