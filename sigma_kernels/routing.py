"""The one small object that every later step reads: which expert each token goes to, and in what order."""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Where T tokens go among E experts, k each.

    Slot s = t*k + j is the j-th choice of token t; row r is its place in expert order, R = T*k of both.
    Within an expert, rows keep the order of their slots, so the order is the same on every backend.
    Where R < T*k, slots that row_map does not name are answered by no expert: they add nothing and have no gradient.

    Attributes:
        indices: [T, k] int32, the experts of each token, best first.
        weights: [T, k], the factor of each expert's output; differentiable where the router is.
        counts:  [E] int32, rows of each expert.
        offsets: [E+1] int32, exclusive prefix sum of counts: rows offsets[e]..offsets[e+1] belong to e.
        row_map: [R] int32, the slot of each row.
    """

    indices: Tensor
    weights: Tensor
    counts: Tensor
    offsets: Tensor
    row_map: Tensor

    @property
    def top_k(self) -> int:
        return self.indices.shape[1]

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]


class RouterSums(NamedTuple):
    """What balance losses read of a router's scores, summed over T tokens.

    Attributes:
        probabilities: [E], the sum of the router's probabilities; differentiable.
        square: [], the sum of the squared log-sum-exps of the logits; differentiable.
        tokens: T.
        score: "softmax", or "sigmoid" where probabilities are sigmoids divided by their sum.
    """

    probabilities: Tensor
    square: Tensor
    tokens: int
    score: str


def empty_routing(logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """Memory for a Routing of logits [T, E], the weights first."""
    T, E = logits.shape
    indices = logits.new_empty(T, top_k, dtype=torch.int32)
    return logits.new_empty(T, top_k), indices, *empty_order(indices, E)


def empty_order(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for counts, offsets and row_map of int32 indices."""
    return (
        indices.new_empty(num_experts),
        indices.new_empty(num_experts + 1),
        indices.new_empty(indices.numel()),
    )
