"""A model over the ranks of a mesh: experts by rank, the rest sharded by FSDP2; and each rank's part of its state."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from sigma_kernels.collectives import observed, told
from sigma_kernels.distributed import ExpertParallelMoE
from sigma_kernels.distributed.moe import local
from sigma_kernels.nn import MoE
from sigma_train.checkpoint import MODEL, OPTIMIZER, holds_moments, own_tensors, prefixed, unprefixed
from sigma_train.mesh import Mesh
from sigma_train.model import LanguageModel
from sigma_train.ranks import Ranks
from sigma_train.sharded import load, load_whole, placements

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def spread(model: LanguageModel, mesh: Mesh) -> None:
    """Leave on each of several ranks its part of a model that all have whole and the same."""
    for block in model.layers:
        if isinstance(block.mlp, MoE):
            block.mlp = ExpertParallelMoE.from_whole(block.mlp, mesh.experts["expert"])
    ignored = set(expert_parameters(model))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh.rest, ignored_params=ignored)


def expert_parameters(model: LanguageModel) -> list[nn.Parameter]:
    return [p for moe in model.moe_layers() for p in moe.experts.parameters()]


def average_expert_gradients(model: LanguageModel, mesh: Mesh) -> None:
    """Of the mean loss over ranks, as FSDP has made the others; these are of the sum over those that share experts.

    All of a replica's gradients are added up rather than scattered: replicas can then be compared with each other.
    """
    grads = [p.grad for p in expert_parameters(model) if p.grad is not None]
    if mesh.experts["data"].size() > 1:
        group = mesh.experts.get_group("data")
        with observed("experts"):
            for work in [dist.all_reduce(local(grad), group=group, async_op=True) for grad in grads]:
                work.wait()
    if grads:
        torch._foreach_mul_(grads, 1 / mesh.experts.size())


class Observed:
    """FSDP's own exchange of shards, by default one that is waited for at once, seen by `collectives.OBSERVERS`.

    Where the rest has replicas, FSDP adds their gradients up after the scatter, and calls `reduced` then.
    """

    def __init__(self) -> None:
        self._given_ns = 0

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._given_ns = time.monotonic_ns()  # a scatter over one rank is none: what it gives lies here
        return torch.empty(*size, dtype=dtype, device=device)

    def reduced(self, _: Tensor) -> None:
        told("replicas", -1, False, self._given_ns, self._given_ns)


class ObservedGather(Observed):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        with observed("gather"):
            return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)


class ObservedScatter(Observed):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        with observed("scatter"):
            work = dist.reduce_scatter_single(
                output_tensor, input_tensor, group=group, op=op, async_op=async_op
            )
        self._given_ns = time.monotonic_ns()
        return work


def observe_shards(model: LanguageModel, has_replicas: bool) -> None:
    """Of a model that was spread."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            scatter = ObservedScatter()
            module.set_custom_all_gather(ObservedGather())
            module.set_custom_reduce_scatter(scatter)
            if has_replicas:
                module.set_all_reduce_hook(scatter.reduced)


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and the optimizer's tensors by name, of each this rank's part; they share memory.

    A tensor that two names share stands under the first.  Of an optimizer that has made no step there is nothing to
    tell, and asking would have it make one.
    """
    # First: FSDP gives the model its shards back, by which the optimizer knows its state.
    weights = _weights(model)
    moments = _moments(get_optimizer_state_dict(model, optimizer, options=FLAT)) if optimizer.state else {}
    return weights | moments


def load_state(
    model: nn.Module, optimizer: Optimizer, path: Path, ranks: Ranks, *, with_moments: bool = True
) -> None:
    """What `state_of` gave, however the model was spread then; the optimizer is a new one.  A collective.

    Experts stand where they stood then; in one process, which has them all, in order.
    """
    if ranks.size > 1:
        stand(model, placements(path))
    weights = _weights(model)
    has_moments = with_moments and holds_moments(path)
    # Asking a new optimizer has it make a step at rate 0, which changes no weight.
    settings: Any = get_optimizer_state_dict(model, optimizer, options=FLAT) if has_moments else {}
    moments = _moments(settings)
    if ranks.size > 1:
        load(path, weights | moments, ranks)
    else:
        load_whole(path, weights | moments)
    set_model_state_dict(model, unprefixed(weights, MODEL), options=StateDictOptions(strict=False))
    if has_moments:
        set_optimizer_state_dict(model, optimizer, settings | unprefixed(moments, OPTIMIZER), options=FLAT)


def stand(model: nn.Module, places: dict[str, Tensor]) -> None:
    """Have layers take their placement over by name, for rows that are about to be read."""
    for name, layer in model.named_modules():
        if isinstance(layer, ExpertParallelMoE):
            layer.stand_at(places.get(name))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return prefixed(own_tensors(model, get_model_state_dict(model)), MODEL)


def _moments(flat: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors alone: rates and the like are settings of the run."""
    return prefixed({name: x for name, x in flat.items() if name.startswith("state.")}, OPTIMIZER)
