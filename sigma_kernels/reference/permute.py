"""Rows into expert order and back, defined."""

import torch
from torch import Tensor


def permute(x: Tensor, row_map: Tensor, top_k: int) -> Tensor:
    """out[r] = x[token of r], the token of row r being row_map[r] // k."""
    return x[row_map.long() // top_k]


def unpermute(y: Tensor, row_map: Tensor, weights: Tensor | None, top_k: int) -> Tensor:
    """out[t] = sum_j weights[t, j] * y[row of slot t*k + j]; all weights are one where none are given."""
    row_of_slot = torch.empty_like(row_map, dtype=torch.long)
    row_of_slot[row_map.long()] = torch.arange(row_map.shape[0], device=row_map.device)
    by_slot = y[row_of_slot].view(-1, top_k, y.shape[1])
    return (by_slot if weights is None else by_slot * weights[..., None]).sum(1)
