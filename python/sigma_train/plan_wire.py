"""Bytes that a training step hands to collectives, and how many of them leave a rank and its node."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sigma_train.config import Config
from sigma_train.plan_memory import F32, I32, experts_here, tokens, width
from sigma_train.plan_routing import Routed, expected
from sigma_train.plan_shapes import Group, Layout, Shapes, padded

SHARDING, EXCHANGE = "FSDP", "rows to experts and back"
REPLICAS, SMALL = "averaging experts' gradients", "small messages"


@dataclass(frozen=True)
class Collective:
    """One kind of message of one rank and step.

    handed: bytes given to all calls together: what is sent of an all-to-all, the whole of the others.
    sent:   what leaves for other ranks, inside and outside of the node, as a mean over ranks: all but 1/n of an
            all-to-all among n; round a ring (n-1)/n of a gather or a scatter, twice that of an all-reduce.
    most:   bytes that one rank can receive at worst, of a kind that depends on routing.
    """

    part: str
    what: str
    kind: str
    dtype: str
    calls: int
    handed: int
    inside: float
    outside: float
    ranks: int
    most: int | None = None

    @property
    def sent(self) -> float:
        return self.inside + self.outside


def _collective(
    group: Group,
    part: str,
    what: str,
    kind: str,
    dtype: str,
    calls: int,
    handed: int,
    most: int | None = None,
) -> Collective:
    sent = handed * (group.size - 1) / group.size * (2 if kind == "all_reduce" else 1)
    share = group.pairs if kind == "all_to_all" else group.ring
    return Collective(
        part, what, kind, dtype, calls, handed, sent * share, sent * (1 - share), group.size, most
    )


def collectives(
    config: Config,
    shapes: Shapes,
    layout: Layout,
    routed: Sequence[Routed] | None = None,
    load: float = 1.0,
) -> list[Collective]:
    """Those of one step of the trainer, none on one rank.

    routed: what this rank's layers send and take, of all micro-steps; where not given as expected under `load`.
    """
    if layout.ranks == 1:
        return []
    found = _sharding(config, shapes, layout)
    if shapes.experts and layout.expert_ranks > 1:
        if routed is None:
            found += _exchange(
                config,
                layout,
                expected(config, shapes, layout, tokens(config), load),
                config.train.grad_accum,
            )
        else:
            found += _exchange(config, layout, routed, 1)
    if shapes.experts and layout.replicas > 1:
        size = experts_here(shapes, layout) * F32
        found.append(
            _collective(layout.around_replicas, REPLICAS, "experts' gradients", "all_reduce", "float32", 1, size)
        )  # fmt: skip
    return found + _small(config, shapes, layout)


def _sharding(config: Config, shapes: Shapes, layout: Layout) -> list[Collective]:
    """FSDP2: blocks are gathered forward and again backward, the root once; each is scattered once, all in f32."""
    accum, everyone = config.train.grad_accum, layout.everyone
    root = sum(padded(s, layout.ranks) for s in shapes.root) * F32
    blocks = sum(padded(s, layout.ranks) for layer in shapes.layers for s in layer.dense) * F32
    L = len(shapes.layers)
    each = (
        ("FSDP, weights forward", "all_gather", L + 1, root + blocks),
        ("FSDP, weights backward", "all_gather", L, blocks),
        ("FSDP, gradients", "reduce_scatter", L + 1, root + blocks),
    )
    return [
        _collective(everyone, SHARDING, what, kind, "float32", accum * calls, accum * size)
        for what, kind, calls, size in each
    ]


def _exchange(config: Config, layout: Layout, routed: Sequence[Routed], repeats: int) -> list[Collective]:
    """Tokens to the ranks of their experts, answers back, and the gradients of both the other way.

    With k > 1 choices and weights travel beside a token, and the gradient of its weights comes back.
    """
    c, T, Q, group = config.model, tokens(config), layout.expert_ranks, layout.around_experts
    number, dtype = width(config), "bfloat16" if width(config) == 2 else "float32"
    row = c.hidden_size * number
    layers = [layer for layer in routed if layer.top_k]
    several = [layer for layer in layers if layer.top_k > 1]

    def alltoall(what: str, kind: str, of: list[Routed], handed: int, most: int | None) -> Collective:
        at_most = None if most is None else repeats * most
        return _collective(
            group, EXCHANGE, what, "all_to_all", kind, repeats * len(of), repeats * handed, at_most
        )

    def visits(what: str, kind: str, of: list[Routed], row: int, a_choice: int, is_back: bool) -> Collective:
        handed = most = 0
        for layer in of:
            size = row + layer.top_k * a_choice
            # At worst all tokens of all others come to this rank, or each of its own goes to as many as it can.
            at_worst = min(layer.top_k, Q - 1) if is_back else Q - 1
            handed += (layer.received if is_back else layer.sent) * size
            most += T * at_worst * size
        return alltoall(what, kind, of, handed, most)

    sizes = sum(2 * Q if layer.top_k > 1 else c.num_experts for layer in layers)  # visits and choices, or [E]
    found = [
        visits("dispatch", dtype, layers, row, 0, False),
        visits("combine", dtype, layers, row, 0, True),
        visits("combine, backward", dtype, layers, row, 0, False),
        visits("dispatch, backward", dtype, layers, row, 0, True),
        alltoall("counts before dispatch", "int32", layers, sizes * I32, None),
    ]
    if several:
        found += [
            visits("choices beside rows", "int32", several, 0, I32, False),
            visits("weights beside rows", dtype, several, 0, number, False),
            visits("weights, backward", dtype, several, 0, number, True),
        ]
    return found


def _small(config: Config, shapes: Shapes, layout: Layout) -> list[Collective]:
    """What takes no bandwidth: counts of tokens, the gradient's norm, the loss, whether to stop."""
    everyone, accum, E = layout.everyone, config.train.grad_accum, config.model.num_experts
    sparse = sum(layer.top_k > 0 for layer in shapes.layers)
    number = len(shapes.dense) + len(shapes.experts)
    each = [
        ("norm of the gradient", "float32", 1 + bool(shapes.experts), number * F32),
        ("loss, signals", "float64", 2, 4 * 8),
    ]
    if sparse:
        each.append(("counts of the step", "int32", sparse, sparse * E * I32))
        if config.router.balance == "global" and config.router.balance_coef:
            each.append(("balance loss", "int32", accum * sparse, accum * sparse * E * I32))
    return [
        _collective(everyone, SMALL, what, "all_reduce", dtype, calls, size)
        for what, dtype, calls, size in each
    ]


def seconds(c: Collective, inside_bytes_s: float, outside_bytes_s: float, latency_s: float) -> float:
    """The slower of the two kinds of link, and log2 of the ranks times the latency of each call."""
    steps = math.ceil(math.log2(c.ranks)) if c.ranks > 1 else 0
    return max(c.inside / inside_bytes_s, c.outside / outside_bytes_s) + c.calls * steps * latency_s
