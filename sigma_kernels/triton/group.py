"""Rows in expert order by counting: histogram, scan, scatter.  No sort, and the same order every time.

R slots in blocks of BLOCK; partial[e, b] first holds the slots of block b that go to expert e, then those of all blocks
before b.  The row of a slot is where its expert begins, plus that, plus its rank within its block.  An index outside
0..E-1 counts as expert E, which nobody serves: its row comes after all others, and no address is wrong for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigma_kernels.routing import empty_order
from sigma_kernels.triton.tiles import FUSION, cdiv, power_of_2

CHUNK = 1024  # blocks that an expert's program sums at once: 131,072 slots
BLOCK = 128  # ranks are found by comparing all pairs of a block: 64 for each thread of 8 warps, in registers


@triton.jit
def load_experts(index_ptr, s, R, E):
    e = tl.load(index_ptr + s, mask=s < R, other=0)
    return tl.where((e >= 0) & (e < E), e, E).to(tl.int32)


@triton.jit(do_not_specialize=["R", "blocks"])
def count_slots_kernel(index_ptr, partial_ptr, R, E, blocks, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    """partial[e, b] = slots of block b with expert e.  One program a block."""
    b = tl.program_id(0)
    s = b * BLOCK + tl.arange(0, BLOCK)
    count = tl.histogram(load_experts(index_ptr, s, R, E), BLOCK_E, mask=s < R)
    e = tl.arange(0, BLOCK_E)
    tl.store(partial_ptr + e * blocks + b, count, mask=e <= E)


@triton.jit(do_not_specialize=["blocks"])
def scan_blocks_kernel(partial_ptr, counts_ptr, E, blocks, BLOCK: tl.constexpr):
    """partial[e, b] becomes the sum of partial[e, before b], counts[e] that of all.  One program an expert."""
    e = tl.program_id(0)
    before = 0
    for b0 in range(0, blocks, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        here = partial_ptr + e * blocks + b
        count = tl.load(here, mask=b < blocks, other=0)
        tl.store(here, before + tl.cumsum(count, 0) - count, mask=b < blocks)
        before += tl.sum(count, 0)
    tl.store(counts_ptr + e, before, mask=e < E)


@triton.jit(do_not_specialize=["R", "blocks"])
def scatter_slots_kernel(
    index_ptr, partial_ptr, counts_ptr, offsets_ptr, row_map_ptr, R, E, blocks, BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """row_map[row of slot s] = s.  One program a block; the first writes the offsets too."""
    b = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    s = b * BLOCK + place
    mine = load_experts(index_ptr, s, R, E)
    is_earlier = place[None, :] < place[:, None]
    rank = tl.sum(((mine[None, :] == mine[:, None]) & is_earlier).to(tl.int32), 1)
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0)
    offsets = tl.cumsum(counts, 0) - counts
    begin = tl.gather(offsets, mine, 0)
    before = tl.load(partial_ptr + mine * blocks + b, mask=s < R, other=0)
    tl.store(row_map_ptr + begin + before + rank, s, mask=s < R)
    if b == 0:
        tl.store(offsets_ptr + e, offsets, mask=e <= E)


def group_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """counts [E], offsets [E+1], row_map [R] of int32 indices [T, k]."""
    order = empty_order(indices, num_experts)
    fill_order(indices.contiguous(), *order)
    return order


def fill_order(indices: Tensor, counts: Tensor, offsets: Tensor, row_map: Tensor) -> None:
    """The same into memory that exists; all int32 and contiguous."""
    R, E = indices.numel(), counts.shape[0]
    blocks, width = max(1, cdiv(R, BLOCK)), power_of_2(E + 1)
    partial = torch.empty((E + 1) * blocks, dtype=torch.int32, device=indices.device)
    count_slots_kernel[(blocks,)](indices, partial, R, E, blocks, BLOCK=BLOCK, BLOCK_E=width, **FUSION)
    scan_blocks_kernel[(E + 1,)](partial, counts, E, blocks, BLOCK=CHUNK, **FUSION)
    scatter_slots_kernel[(blocks,)](
        indices,
        partial,
        counts,
        offsets,
        row_map,
        R,
        E,
        blocks,
        BLOCK=BLOCK,
        BLOCK_E=width,
        num_warps=8,
        **FUSION,
    )
