"""Noise that a copied expert begins with, so that it parts from the one that it is a copy of.

copy = W + scale * std(W) * n with n ~ N(0, 1), drawn and added in f32 (f64 where W is) and then rounded: in bf16
1 % of a weight is between one and three steps of its last bit.  std is that of one matrix of one expert, or of one
expert's row of the router, whatever tensor it lies in.
"""

import hashlib
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Halves = Literal["", "rows", "columns", "columns in turn"]  # where gate and up lie in a fused matrix


def noisy(x: Tensor, scale: float, key: str, halves: Halves = "") -> Tensor:
    """A copy with noise, which depends on `key` alone: not on who draws it, nor on what was drawn before.

    With `halves` x is two matrices, gate and up, each of which has its own std and its own draw.
    """
    if halves:
        made = torch.empty_like(x)
        for half, matrix, place in zip(("gate", "up"), _split(x, halves), _split(made, halves), strict=True):
            place.copy_(noisy(matrix, scale, f"{key} {half}"))
        return made
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    drawn = torch.from_numpy(generator(key).standard_normal(x.shape, dtype=np.float32))
    deviation = wide.std(correction=0)  # of one number: 0
    return drawn.to(wide.dtype).mul_(scale * deviation).add_(wide).to(x.dtype)


def _split(x: Tensor, halves: Halves) -> tuple[Tensor, ...]:
    """Views of gate and up."""
    if halves == "columns in turn":
        return x[:, ::2], x[:, 1::2]
    return x.chunk(2, dim=0 if halves == "rows" else 1)


def generator(key: str) -> np.random.Generator:
    """Counter-based (Philox, Salmon et al. 2011), by 128 bits of the key's hash: no two keys share a stream."""
    return np.random.Generator(
        np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16]))
    )
