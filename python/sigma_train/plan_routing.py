"""How many tokens go where: what a layer of experts sends, takes and computes on one rank, as expected or as routed.

A visit is a token at a rank.  A token goes to a rank once, whatever number of its k experts is there.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from sigma_train.config import Config
from sigma_train.plan_shapes import Layout, Shapes


@dataclass(frozen=True)
class Routed:
    """One layer of one rank in one micro-step; what stays on the rank counts as sent and received too."""

    top_k: int
    sent: int  # visits that its tokens pay
    received: int  # visits that it gets
    rows: int  # choices that its experts answer


def share_of_visits(experts: int, here: int, top_k: int, load: float = 1.0) -> Fraction:
    """Of all tokens those that visit a rank with `here` of E experts, one of which is chosen `load` times the mean.

    1 - (1 - q) C(E-n, k) / C(E-1, k), q = load k / E: who does not choose the busy one has k different others, evenly.
    With load 1 it is 1 - C(E-n, k) / C(E, k), with k = 1 n / E.
    """
    chosen = min(Fraction(load) * top_k / experts, Fraction(1))
    if chosen == 1:
        return chosen
    return 1 - (1 - chosen) * Fraction(math.comb(experts - here, top_k), math.comb(experts - 1, top_k))


def share_of_rows(experts: int, here: int, top_k: int, load: float = 1.0) -> Fraction:
    """Of all tokens' choices those that such a rank answers: (load + (n-1) (E-load) / (E-1)) / E."""
    if experts == 1:
        return Fraction(1)
    busy = min(Fraction(load), Fraction(experts, top_k))  # a token has but one row for an expert
    return (busy + (here - 1) * (experts - busy) / (experts - 1)) / experts


def expected(config: Config, shapes: Shapes, layout: Layout, tokens: int, load: float = 1.0) -> list[Routed]:
    """Every layer's of the rank whose busiest expert has `load` times the mean; 1 is balanced routing.

    It sends as much as it takes, since all wait for the longer of the two.
    """
    E, Q = config.model.num_experts, layout.expert_ranks
    by_k = {0: Routed(0, 0, 0, 0)}  # no experts
    for k in {layer.top_k for layer in shapes.layers} - {0}:
        visits = round(tokens * Q * share_of_visits(E, E // Q, k, load))
        rows = round(tokens * Q * k * share_of_rows(E, E // Q, k, load))
        by_k[k] = Routed(k, visits, visits, rows)
    return [by_k[layer.top_k] for layer in shapes.layers]
