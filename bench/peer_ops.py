"""Single operations by everyone else, on rows that are in expert order: a grouped GEMM, a router, a permutation.

x [R, K], weight [E, N, K], offsets [E+1] int32; token, slot and expert name a row's place before it was sorted.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import counts_of
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """torch's own; weight is [E, K, N] or a transposed view of that shape."""
    return F.grouped_mm(x, weight, offs=offsets[1:])


def loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """A GEMM per expert, each into its part of one result."""
    out = x.new_empty(x.shape[0], weight.shape[2])
    sizes = offsets.diff().tolist()
    for part, w, o in zip(x.split(sizes), weight, out.split(sizes), strict=True):
        torch.mm(part, w, out=o)
    return out


def padded(x: Tensor, offsets: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """[E, most rows, K] with zeros where an expert has fewer, and where each row went."""
    counts = offsets.diff().long()
    expert = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
    where = expert, torch.arange(x.shape[0], device=x.device) - offsets[:-1][expert]
    return x.new_zeros(len(counts), int(counts.max()), x.shape[1]).index_put(where, x), where


def padded_bmm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """One batched GEMM, every expert padded to the busiest."""
    rows, where = padded(x, offsets)
    return torch.bmm(rows, weight)[where]


def grouped_mm_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(a.t(), b, offs=offsets[1:])


def loop_outer(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    sizes = offsets.diff().tolist()
    out = a.new_empty(len(sizes), a.shape[1], b.shape[1]) if out is None else out
    for p, q, o in zip(a.split(sizes), b.split(sizes), out, strict=True):
        torch.mm(p.t(), q, out=o)
    return out


def padded_bmm_outer(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.bmm(padded(a, offsets)[0].transpose(1, 2), padded(b, offsets)[0], out=out)


PRODUCTS: dict[str, Product] = {"torch_grouped_mm": grouped_mm, "loop_mm_out": loop, "padded_bmm": padded_bmm}


def softmax_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The choice alone, as transformers' routers make it: weights [T, k], indices [T, k]."""
    return logits.softmax(-1).topk(k, -1)


def softmax_topk_argsort(logits: Tensor, k: int) -> tuple[Tensor, ...]:
    """The choice and the order: weights, indices, counts [E], slot of each row."""
    weights, indices = softmax_topk(logits, k)
    flat = indices.reshape(-1)
    return weights, indices, counts_of(flat, logits.shape[1]), flat.argsort(stable=True)


def softmax_argmax_argsort(logits: Tensor) -> tuple[Tensor, ...]:
    """For one expert a token: argmax is cheaper than topk."""
    p = logits.softmax(-1)
    indices = p.argmax(-1, keepdim=True)
    flat = indices.reshape(-1)
    counts = counts_of(flat, logits.shape[1])
    return p.gather(1, indices), indices, counts, flat.argsort(stable=True)


def index_select(x: Tensor, token_of_row: Tensor) -> Tensor:
    return x.index_select(0, token_of_row)


def gather(x: Tensor, token_of_row: Tensor) -> Tensor:
    return x.gather(0, token_of_row[:, None].expand(-1, x.shape[1]))


def index_add(y: Tensor, weights: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    T, k = weights.shape
    weighted = y * weights.reshape(-1)[slot_of_row, None]
    return y.new_zeros(T, y.shape[1]).index_add(0, slot_of_row // k, weighted)


def select_and_sum(y: Tensor, weights: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    """Each token's rows beside each other, then a weighted sum, as transformers' grouped_mm does."""
    T, k = weights.shape
    return (y.index_select(0, row_of_slot).view(T, k, -1) * weights[:, :, None]).sum(1)


def gather_and_sum(y: Tensor, weights: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    T, k = weights.shape
    return (gather(y, row_of_slot).view(T, k, -1) * weights[:, :, None]).sum(1)


PERMUTES = {"index_select": index_select, "gather": gather}
UNPERMUTES = {
    "index_add": index_add,
    "index_select_and_sum": select_and_sum,
    "gather_and_sum": gather_and_sum,
}
