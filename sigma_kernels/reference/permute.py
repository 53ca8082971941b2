"""Rows into expert order and back, defined."""

from torch import Tensor


def permute(x: Tensor, row_map: Tensor, top_k: int) -> Tensor:
    """out[r] = x[token of r], the token of row r being row_map[r] // k."""
    return x[row_map.long() // top_k]


def unpermute(y: Tensor, row_map: Tensor, weights: Tensor | None, top_k: int, tokens: int) -> Tensor:
    """out[t] = sum_j weights[t, j] * y[row of slot t*k + j]; all weights are one where none are given.

    A slot that has no row adds nothing.
    """
    by_slot = y.new_zeros(tokens * top_k, y.shape[1]).index_copy(0, row_map.long(), y)
    by_slot = by_slot.view(tokens, top_k, y.shape[1])
    return (by_slot if weights is None else by_slot * weights[..., None]).sum(1)
