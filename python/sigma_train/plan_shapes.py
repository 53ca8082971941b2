"""Which rank holds which part of a model: shapes of the trainer's own model, made without memory."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sigma_kernels.nn import MoE
from sigma_train.config import Config
from sigma_train.errors import WrongInput
from sigma_train.model import LanguageModel

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerShapes:
    """Parameters of one block: those that FSDP shards, and the experts'; top_k is 0 in a dense block."""

    dense: tuple[Shape, ...]
    experts: tuple[Shape, ...]
    top_k: int


@dataclass(frozen=True)
class Shapes:
    """Parameters of a model by FSDP's groups: one a block, and the root's for what is in none."""

    root: tuple[Shape, ...]
    layers: tuple[LayerShapes, ...]

    @property
    def dense(self) -> list[Shape]:
        return [*self.root, *(shape for layer in self.layers for shape in layer.dense)]

    @property
    def experts(self) -> list[Shape]:
        return [shape for layer in self.layers for shape in layer.experts]

    @property
    def total(self) -> int:
        return sum(map(math.prod, (*self.dense, *self.experts)))

    @property
    def active_in_layers(self) -> int:
        """Parameters of the blocks that one token meets; without embedding, head and last norm."""
        return sum(
            sum(map(math.prod, layer.dense))
            + sum(layer.top_k * math.prod(shape[1:]) for shape in layer.experts)
            for layer in self.layers
        )


def unfilled(config: Config) -> LanguageModel:
    """`LanguageModel(config)` with parameters on the meta device."""
    with _WithoutMemory():
        return LanguageModel(config)


def shapes(config: Config) -> Shapes:
    """Of `LanguageModel(config)`."""
    model = unfilled(config)
    layers, in_layers = [], set()
    for block, top_k in zip(model.layers, config.model.layer_top_k, strict=True):
        experts = list(block.mlp.experts.parameters()) if isinstance(block.mlp, MoE) else []
        ours = {id(p) for p in experts}
        dense = [p for p in block.parameters() if id(p) not in ours]
        in_layers |= ours | {id(p) for p in dense}
        layers.append(LayerShapes(_of(dense), _of(experts), top_k if experts else 0))
    return Shapes(_of(p for p in model.parameters() if id(p) not in in_layers), tuple(layers))


class _WithoutMemory(TorchFunctionMode):
    """Parameters on the meta device, unfilled; tables are computed.

    Under torch.device("meta") the tables' operations, and the filling, would import what takes torch five seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _of(parameters: Iterable[torch.nn.Parameter]) -> tuple[Shape, ...]:
    return tuple(tuple(p.shape) for p in parameters)


def sharded(shape: Shape, ranks: int, rank: int = 0) -> int:
    """Elements of a rank's part, cut by rows as FSDP2 does: the first ranks have the most, the last perhaps none."""
    rows = math.ceil(shape[0] / ranks)
    return max(0, min(rows, shape[0] - rank * rows)) * math.prod(shape[1:])


def padded(shape: Shape, ranks: int) -> int:
    """Elements that FSDP2 gathers and scatters: every rank's part as large as the first one's."""
    return ranks * sharded(shape, ranks)


@dataclass(frozen=True)
class Group:
    """Ranks that speak with each other, and how much of it stays in a node, as a mean over such groups.

    `pairs`: of the messages of each to all others.  `ring`: of the steps of a ring in the order of ranks.
    """

    size: int
    pairs: float
    ring: float


@dataclass(frozen=True)
class Layout:
    """P ranks in nodes; `expert_ranks` neighbours share one set of experts, and all P shard everything else."""

    ranks: int
    expert_ranks: int
    node_ranks: int

    @property
    def replicas(self) -> int:
        """How many sets of experts there are."""
        return self.ranks // self.expert_ranks

    @cached_property
    def everyone(self) -> Group:
        return _group([range(self.ranks)], self.node_ranks)

    @cached_property
    def around_experts(self) -> Group:
        """Those that share a set of experts."""
        starts = range(0, self.ranks, self.expert_ranks)
        return _group([range(s, s + self.expert_ranks) for s in starts], self.node_ranks)

    @cached_property
    def around_replicas(self) -> Group:
        """Those that hold the same experts."""
        return _group(
            [range(s, self.ranks, self.expert_ranks) for s in range(self.expert_ranks)], self.node_ranks
        )


def _group(groups: Sequence[range], node_ranks: int) -> Group:
    size = len(groups[0])
    if size == 1:
        return Group(1, 1.0, 1.0)
    pairs = edges = 0
    for members in groups:
        nodes = [rank // node_ranks for rank in members]
        pairs += sum(n * (n - 1) for n in Counter(nodes).values())
        edges += sum(a == b for a, b in zip(nodes, [*nodes[1:], nodes[0]], strict=True))
    return Group(size, pairs / (len(groups) * size * (size - 1)), edges / (len(groups) * size))


def layout(config: Config, ranks: int, expert_ranks: int | None, node_ranks: int) -> Layout:
    """expert_ranks: all of them where not given; of a dense model one.

    Raises: WrongInput if the experts cannot be shared out evenly, or the ranks not into such groups.
    """
    E = config.model.num_experts
    if E == 1 and expert_ranks not in (None, 1):
        raise WrongInput(f"--expert-ranks must be 1 for a dense model, found {expert_ranks}")
    wanted = (1 if E == 1 else ranks) if expert_ranks is None else expert_ranks
    if ranks % wanted or (E % wanted and E > 1):
        largest = math.gcd(E, ranks)
        raise WrongInput(
            f"--expert-ranks, all ranks where it is not given, must divide the {ranks} ranks and "
            f"model.num_experts = {E}, found {wanted}; the largest that does is {largest}"
        )
    return Layout(ranks, wanted, node_ranks)
