"""Which tile of which expert a program computes, found on the device from `offsets`."""

import triton
import triton.language as tl


@triton.jit
def tile_ends(offsets_ptr, E, column_tiles, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """ends[e]: tiles of the experts up to and including e."""
    e = tl.arange(0, BLOCK_E)
    is_expert = e < E
    begin = tl.load(offsets_ptr + e, mask=is_expert, other=0)
    count = tl.load(offsets_ptr + e + 1, mask=is_expert, other=0) - begin
    return tl.cumsum(tl.where(is_expert, tl.cdiv(count, BLOCK_M), 0) * column_tiles, 0)


@triton.jit
def find_tile(tile, ends, offsets_ptr, BLOCK_M: tl.constexpr):
    """Expert, first row, end of its rows, and column tile.

    A search in E numbers that every program holds: one compare and two reductions, no table in memory and no launch
    to make it.  Rows run fastest, so that the programs of one moment read the same columns of an expert's weights.
    """
    is_before = ends <= tile
    e = tl.sum(is_before.to(tl.int32), 0)
    local = tile - tl.max(tl.where(is_before, ends, 0), 0)
    begin = tl.load(offsets_ptr + e)
    end = tl.load(offsets_ptr + e + 1)
    row_tiles = tl.cdiv(end - begin, BLOCK_M)
    return e, begin + local % row_tiles * BLOCK_M, end, local // row_tiles
