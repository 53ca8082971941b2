"""FLOPs of a step and the time of its parts, from peaks of a datasheet and shares of them that were measured."""

import math
from collections import Counter
from dataclasses import dataclass

from sigma_train.accelerators import Accelerator
from sigma_train.config import Config
from sigma_train.plan_memory import F32, activations, experts_here, held, tokens, width
from sigma_train.plan_routing import share_of_rows
from sigma_train.plan_shapes import Layout, Shapes
from sigma_train.plan_wire import SHARDING, Collective, seconds

TFLOP, GB, MICRO = 1e12, 1e9, 1e-6
DENSE, ATTENTION, ROUTER, EXPERTS = "dense products", "attention", "router", "experts' products"
MEMORY, OPTIMIZER = "memory traffic", "optimizer"


@dataclass(frozen=True)
class Shares:
    """Of a peak what is reached.

    experts, dense: of the peak of products, by the experts and by all others.  memory: of the memory's bandwidth.
    link: of a link's.  latency_us: of a message, for each doubling of the ranks.
    """

    experts: float
    dense: float
    memory: float
    link: float = 0.8
    latency_us: float = 5.0


# One H200, by its datasheet's peaks.  bf16 products: the layer of Sigma-MoE-Tiny at 32,768 tokens, forward and
# backward, and the dense layer beside it (docs/log.md).  f32 and memory: docs/results/h200.md.
MEASURED = {
    "bf16": Shares(experts=0.417, dense=0.467, memory=0.684),
    "f32": Shares(experts=0.070, dense=0.594, memory=0.684),
}


@dataclass(frozen=True)
class Flops:
    """Of one step of all ranks, a multiplication and an addition counted as two; forward and twice that backward.

    experts, dense: 6 for each parameter and token, of the chosen experts and of all other matrices (head, routers).
    attention: 6 S A a token and layer, A query heads times their size: scores and values, over the half that is causal.
    """

    dense: int
    router: int
    experts: int
    attention: int

    @property
    def total(self) -> int:
        return self.dense + self.router + self.experts + self.attention


def flops(config: Config, shapes: Shapes, ranks: int) -> Flops:
    c, t = config.model, config.train
    T = tokens(config) * t.grad_accum * ranks
    matrices = sum(math.prod(s) for layer in shapes.layers for s in layer.dense if len(s) > 1)
    routers = sum(c.num_experts * c.hidden_size for layer in shapes.layers if layer.top_k)
    experts = sum(layer.top_k * math.prod(s[1:]) for layer in shapes.layers for s in layer.experts)
    return Flops(
        dense=6 * T * (matrices - routers + c.vocab_size * c.hidden_size),
        router=6 * T * routers,
        experts=6 * T * experts,
        attention=6 * T * len(shapes.layers) * t.seq_len * c.num_heads * c.head_dim,
    )


@dataclass(frozen=True)
class Times:
    """Seconds of one step by part; `compute` on the device, `wire` between devices."""

    compute: dict[str, float]
    wire: dict[str, float]

    @property
    def in_order(self) -> float:
        """Nothing hides behind anything."""
        return sum(self.compute.values()) + sum(self.wire.values())

    @property
    def expected(self) -> float:
        """FSDP's gathers and scatters hide behind computing; rows are waited for, as the trainer does."""
        return self.in_order - self._hidden

    @property
    def _hidden(self) -> float:
        behind = sum(self.compute.values()) - self.compute[OPTIMIZER]
        return min(self.wire.get(SHARDING, 0.0), behind)

    @property
    def exposed(self) -> dict[str, float]:
        """All parts, of sharding only what is not hidden; their sum is `expected`."""
        rest = {SHARDING: self.wire[SHARDING] - self._hidden} if SHARDING in self.wire else {}
        return self.compute | self.wire | rest

    @property
    def overlapped(self) -> float:
        """The most that could hide: all messages behind all computing but the optimizer, or the other way round."""
        optimizer = self.compute[OPTIMIZER]
        return max(sum(self.compute.values()) - optimizer, sum(self.wire.values())) + optimizer

    @property
    def bound(self) -> str:
        """The longest part of what is expected."""
        return max(self.exposed.items(), key=lambda part: part[1])[0]


def times(
    config: Config,
    shapes: Shapes,
    layout: Layout,
    messages: list[Collective],
    device: Accelerator,
    shares: Shares,
    load: float = 1.0,
) -> Times:
    """Of one step of the rank that all wait for, whose busiest expert gets `load` times the mean in every layer.

    messages: `collectives` under that load.
    """
    of_all = flops(config, shapes, layout.ranks)
    is_bf16 = config.train.dtype == "bf16"
    peak = (device.bf16_tflops if is_bf16 else device.f32_tflops) * TFLOP * layout.ranks
    stream = device.memory_gb_s * GB * shares.memory
    accum = config.train.grad_accum
    multiplied = of_all.experts * crowd(config, shapes, layout, load) / (peak * shares.experts)
    streamed = 3 * accum * experts_here(shapes, layout) * width(config) / stream
    compute = {
        DENSE: of_all.dense / (peak * shares.dense),
        ATTENTION: of_all.attention * 7 / 6 / (peak * shares.dense),  # the backward computes the scores again
        ROUTER: of_all.router / (device.f32_tflops * TFLOP * layout.ranks * MEASURED["f32"].dense),
        EXPERTS: math.hypot(multiplied, streamed),
        MEMORY: accum * _traffic(config, shapes, layout) / stream,
        OPTIMIZER: 40 * held(shapes, layout) / stream,  # AdamW 28 bytes a weight; scaling, norm and cut 12
    }
    inside, outside = (x * GB * shares.link for x in (device.node_gb_s, device.network_gb_s))
    wire: dict[str, float] = {}
    for message in messages:
        taken = seconds(message, inside, outside, shares.latency_us * MICRO)
        wire[message.part] = wire.get(message.part, 0.0) + taken
    return Times({part: s for part, s in compute.items() if s}, wire)


def crowd(config: Config, shapes: Shapes, layout: Layout, load: float) -> float:
    """Rows that the experts of that rank compute in all layers, over the mean of ranks."""
    E, Q = config.model.num_experts, layout.expert_ranks
    layers_of = Counter(layer.top_k for layer in shapes.layers if layer.top_k)
    rows = sum(n * Q * k * share_of_rows(E, E // Q, k, load) for k, n in layers_of.items())
    return float(rows / sum(n * k for k, n in layers_of.items())) if layers_of else 1.0


def _traffic(config: Config, shapes: Shapes, layout: Layout) -> int:
    """Bytes of a micro-step that are no operand of a product on its way through one.

    Four times what is kept: written, read again, and its gradient the same.  Where experts compute in bf16, from f32
    weights to their copies 6 bytes each, and 2 as gradients are stored in f32.
    """
    cast = 8 * experts_here(shapes, layout) if width(config) != F32 else 0
    return 4 * activations(config, shapes, layout) + cast
