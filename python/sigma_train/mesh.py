"""Where the ranks of a run stand: which share the experts, which share the rest, and which hold the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sigma_train.config import Config, ConfigError
from sigma_train.model import LanguageModel


@dataclass(frozen=True)
class Mesh:
    """The same ranks twice.  Neighbours share experts, and so do they shards: what is exchanged most stays near.

    Attributes:
        experts: ("data", "expert"): experts are spread over the second, and the same over the first.
        rest: ("replica", "shard"), or ("shard",) where there is one replica.
    """

    experts: DeviceMesh
    rest: DeviceMesh


def sizes(config: Config, ranks: int) -> tuple[int, int]:
    """Ranks that share the experts, and that share the rest.

    Raises: ConfigError if they do not divide the ranks, or the experts are no multiple of the first.
    """
    t = config.train
    E: int = config.model.num_experts
    wanted: dict[str, int | None] = {"expert_ranks": t.expert_ranks, "shard_ranks": t.shard_ranks}
    for name, size in wanted.items():
        if size is not None and ranks % size:
            are = "rank" if ranks == 1 else "ranks"
            raise ConfigError(f"train.{name} must divide the {ranks} {are} of this run, found {size}")
    experts = t.expert_ranks or ranks
    if E > 1 and E % experts:
        of = f"train.expert_ranks = {experts}" if t.expert_ranks else f"the {ranks} ranks of this run"
        raise ConfigError(f"model.num_experts must be a multiple of {of}, found {E}")
    return experts, t.shard_ranks or ranks


def mesh_of(config: Config, ranks: int) -> Mesh:
    """A collective.  Raises: as `sizes`."""
    experts, shards = sizes(config, ranks)
    rest = ((ranks,), ("shard",)) if shards == ranks else ((ranks // shards, shards), ("replica", "shard"))
    return Mesh(
        init_device_mesh("cpu", (ranks // experts, experts), mesh_dim_names=("data", "expert")),
        init_device_mesh("cpu", rest[0], mesh_dim_names=rest[1]),
    )


def experts_held(model: LanguageModel, name: str) -> Sequence[int]:
    """The numbers of this rank's experts, in the order of its rows of their parameter `name`."""
    layer: Any = model.get_submodule(name.rpartition(".experts.")[0])
    held: Sequence[int] = layer.held
    return held


def copies(x: Any) -> int:
    """How many ranks hold the part of x that this one holds."""
    if not hasattr(x, "placements"):
        return 1
    shards = (n for n, part in zip(x.device_mesh.shape, x.placements, strict=True) if part.is_shard())
    return dist.get_world_size() // math.prod(shards)
