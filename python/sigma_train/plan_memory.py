"""Bytes on the fullest rank: what it holds for good, and what one micro-step adds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from sigma_train.config import Config
from sigma_train.plan_routing import Routed, expected
from sigma_train.plan_shapes import Layout, Shapes, padded, sharded

F32, I32, I64 = 4, 4, 8


@dataclass(frozen=True)
class Memory:
    """By kind.  The first three are exact, the next two exact for the routing given; the rest are estimates."""

    weights: int
    gradients: int
    moments: int
    activations: int  # what autograd keeps of one micro-step
    copies: int  # of weights in bf16, which it keeps as well
    logits: int  # logits and their gradients, where the loss has been computed
    gathered: int  # the root's weights and gradients, those of two blocks, and what is being scattered
    exchange: int  # rows that are sent and received, of one layer

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def width(config: Config) -> int:
    """Bytes of an operand of matrix products, and of a row on its way to an expert."""
    return 2 if config.train.dtype == "bf16" else F32


def tokens(config: Config) -> int:
    """T of a rank and micro-step."""
    return config.train.batch_size * config.train.seq_len


def experts_here(shapes: Shapes, layout: Layout) -> int:
    """Elements of a rank's experts, in all layers."""
    return sum(map(math.prod, shapes.experts)) // layout.expert_ranks


def held(shapes: Shapes, layout: Layout, rank: int = 0) -> int:
    """Elements of all weights on a rank: its experts, its shard of the rest."""
    return experts_here(shapes, layout) + sum(sharded(s, layout.ranks, rank) for s in shapes.dense)


def memory(config: Config, shapes: Shapes, layout: Layout) -> Memory:
    """On the first rank, which has the most, under balanced routing."""
    own = held(shapes, layout)
    T, b = tokens(config), width(config)
    return Memory(
        weights=own * F32,
        gradients=own * F32,
        moments=2 * own * F32 + F32 * (len(shapes.dense) + len(shapes.experts)),  # and Adam's count of steps
        activations=activations(config, shapes, layout),
        copies=copies(config, shapes, layout),
        logits=T * config.model.vocab_size * (3 * F32 + (2 if b == 2 else 0)),
        gathered=gathered(shapes, layout),
        exchange=in_flight(config, shapes, layout),
    )


def activations(
    config: Config,
    shapes: Shapes,
    layout: Layout,
    routed: Sequence[Routed] | None = None,
    gate_up_width: int | None = None,
) -> int:
    """What autograd keeps of one micro-step, without copies of weights.

    routed: what this rank's layers send, take and compute; under balanced routing where not given.
    gate_up_width: bytes of a number before SwiGLU; a CPU keeps f32, a GPU the operands' dtype.
    Norms are counted as torch computes them on a CPU; a GPU's, in one kernel, keep half of that.
    """
    c, T, b = config.model, tokens(config), width(config)
    H, A, K = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    norm = F32 * (2 * H + 1)
    qk_norm = F32 * (2 * A + c.num_heads + 2 * K + c.num_kv_heads)
    attention = b * (2 * A + 2 * K) + F32 * c.num_heads  # query, key, value, output; log-sum-exp
    projected = 3 * H * b if b == 2 else H * F32  # autocast rounds anew for each of the three
    total = T * len(shapes.layers) * (2 * norm + qk_norm + attention + projected)
    for layer in expected(config, shapes, layout, T) if routed is None else routed:
        total += _feed_forward(config, layout, layer, gate_up_width or b)
    head = norm + H * b + c.vocab_size * F32  # of the loss: log-probabilities
    # Tokens and targets; of one sequence both are views of its window, one longer than they are.
    ids = T + 1 if config.train.batch_size == 1 else 2 * T
    return total + T * head + ids * I64 + F32  # and the number of targets


def _feed_forward(config: Config, layout: Layout, layer: Routed, gate_up_width: int) -> int:
    c, T, b, k = config.model, tokens(config), width(config), layer.top_k
    H, I, E = c.hidden_size, c.intermediate_size, c.num_experts
    if k == 0:
        wide = I * max(c.layer_top_k)
        return T * (H * b + b * 4 * wide)  # gate and up, silu(gate), their product
    routed = F32 * (H + E) + k * I32  # tokens, logits and indices
    balance = E * F32 if config.router.balance in ("loss", "global") else 0
    projected = layer.rows * 2 * I * gate_up_width  # before SwiGLU
    if layout.expert_ranks == 1:
        slots = k * (I32 + b) + (H * b if b == 2 else 0)  # of each token slots, weights, and itself in bf16
        return T * (routed + slots) + projected + I32 * (E + 1) + balance
    taken = H * b + k * (b + I32)  # row, weights and slots
    order = I32 * (E // layout.expert_ranks + 2)
    # Where one expert answers, what it said, its slot and its weight; else visits' tokens and slots alone.
    answered = T * (I32 + H * b + b) if k == 1 else layer.sent * I32 + T * k * I32
    return T * routed + answered + layer.received * taken + projected + order + balance


def in_flight(config: Config, shapes: Shapes, layout: Layout) -> int:
    """Of the layer with the most: rows packed, received, answered and brought back, and what travels beside them."""
    if layout.expert_ranks == 1:
        return 0
    b, row = width(config), config.model.hidden_size * width(config)
    return max(
        (
            2 * (layer.sent + layer.received) * row
            + (layer.top_k > 1) * (layer.sent + layer.received) * layer.top_k * (I32 + b)
            for layer in expected(config, shapes, layout, tokens(config))
        ),
        default=0,
    )


def copies(config: Config, shapes: Shapes, layout: Layout) -> int:
    """Weights in bf16 that products keep for their backward: the experts here, and all matrices of the rest whole."""
    if width(config) == F32:
        return 0
    c = config.model
    router = (c.num_experts, c.hidden_size)
    blocks = sum(math.prod(s) for layer in shapes.layers for s in layer.dense if len(s) > 1 and s != router)
    return 2 * (experts_here(shapes, layout) + blocks + c.vocab_size * c.hidden_size)


def gathered(shapes: Shapes, layout: Layout) -> int:
    """What FSDP holds whole at once: the root, a block and the one fetched ahead, their gradients on the way out."""
    if layout.ranks == 1:
        return 0
    root = sum(padded(s, layout.ranks) for s in shapes.root)
    block = max((sum(padded(s, layout.ranks) for s in layer.dense) for layer in shapes.layers), default=0)
    return F32 * (2 * root + 3 * block + max(root, block))
