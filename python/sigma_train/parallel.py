"""A model over the ranks of a mesh: experts by rank, everything else sharded by FSDP2, and its whole state again."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from sigma_kernels.distributed import ExpertParallelMoE
from sigma_kernels.nn import MoE
from sigma_train.config import ConfigError
from sigma_train.model import LanguageModel
from sigma_train.ranks import Ranks

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def spread(model: LanguageModel, ranks: Ranks) -> None:
    """Leave on each of several ranks its part of a model that all have whole and the same.

    Raises: ConfigError if the experts cannot be shared out evenly.
    """
    for block in model.layers:
        if not isinstance(block.mlp, MoE):
            continue
        E = block.mlp.router.weight.shape[0]
        if E % ranks.size:
            raise ConfigError(
                f"model.num_experts must be a multiple of the {ranks.size} ranks of this run, found {E}"
            )
        block.mlp = ExpertParallelMoE.from_whole(block.mlp, ranks.mesh)
    ignored = set(expert_parameters(model))
    for module in (*model.layers, model):
        fully_shard(module, mesh=ranks.mesh, ignored_params=ignored)


def expert_parameters(model: LanguageModel) -> list[nn.Parameter]:
    return [p for moe in model.moe_layers() for p in moe.experts.parameters()]


def average_expert_gradients(model: LanguageModel, ranks: Ranks) -> None:
    """Of the mean loss over ranks, as FSDP has made the others; these are of the sum."""
    grads = [p.grad for p in expert_parameters(model) if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, 1 / ranks.size)


def whole_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and the optimizer's state by parameters' names, the same whatever the number of ranks; a collective.

    Empty on all ranks but the first.  A tensor that two names share stands under the first.  Of an optimizer that has
    made no step there is nothing to tell, and asking would have it make one.
    """
    names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    weights = get_model_state_dict(model, options=WHOLE)
    return (
        {name: x for name, x in weights.items() if name in names},
        get_optimizer_state_dict(model, optimizer, options=WHOLE) if optimizer.state else {},
    )


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """What `whole_state` gave, on every rank, into a model that is spread; each keeps its part."""
    set_model_state_dict(model, state, options=replace(WHOLE, strict=False))  # a tied tensor stands once


def load_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """What `whole_state` gave, on every rank; each keeps its part."""
    if state:
        set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
