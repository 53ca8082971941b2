"""One matrix product per expert over rows in expert order.

M: an expert's rows, N: columns of the result, K: the contraction.  A persistent program takes tiles M x N by
schedule.find_tile; how large, and for which experts, is in tiles.py.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from sigma_kernels.ops.library import rows
from sigma_kernels.triton.product import multiply, scaled_by, weight_operand
from sigma_kernels.triton.schedule import find_tile, tile_ends
from sigma_kernels.triton.tiles import power_of_2, precision, row_tile


@triton.jit
def grouped_gemm_kernel(
    x_ptr, w, offsets_ptr, y_ptr, token_map_ptr, row_map_ptr, weights_ptr, row_scale_ptr, scale_ptr, E, N, K,
    top_k: tl.constexpr, stride_x, stride_e, stride_n, stride_k, TMA: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y[r] = x[r] @ w[e].  With a token_map x has the row of its token; with a row_map y's is row_map[r], times its
    weight if there is one.
    """
    column_tiles = tl.cdiv(N, BLOCK_N)
    ends = tile_ends(offsets_ptr, E, column_tiles, BLOCK_M, BLOCK_E)
    for tile in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        e, row, end, column = find_tile(tile, ends, offsets_ptr, BLOCK_M)
        r = row + tl.arange(0, BLOCK_M)
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        # Rows past the expert's end read its last one: their sums are not stored.
        source = tl.minimum(r, end - 1)
        if token_map_ptr is not None:
            source = tl.load(token_map_ptr + source) // top_k
        sum, _ = multiply(
            x_ptr, source, stride_x, row_scale_ptr, w, scale_ptr, e, column * BLOCK_N, N, K,
            (stride_e, stride_n, stride_k), False, TMA, SCALED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        place = r
        if row_map_ptr is not None:
            place = tl.load(row_map_ptr + r, mask=r < end, other=0)
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + place, mask=r < end, other=0.0)
                sum *= weight.to(tl.float32)[:, None]
        y = y_ptr + place.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(y, sum.to(y_ptr.dtype.element_ty), mask=(r < end)[:, None] & (n < N)[None, :])


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor, transpose_weight: bool) -> Tensor:
    """y [R, N] of x [R, K] and weight [E, N, K], or [E, K, N] without `transpose_weight`."""
    w = weight if transpose_weight else weight.transpose(1, 2)
    y = x.new_empty(x.shape[0], w.shape[1])
    multiply_rows(rows(x), w, offsets, y)
    return y


def multiply_rows(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    y: Tensor,
    row_map: Tensor | None = None,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    token_map: Tensor | None = None,
    top_k: int = 1,
) -> None:
    """Fill y [R, N] from x [R, K], unit inner stride, and w [E, N, K] of any strides below 2^23 within an expert.

    With row_map, y[s] is the row of slot s, times weights[s]: for one choice a token the layer's result itself.
    With token_map, the same map, x is [T, K] by token, each of top_k slots.
    Scales are as `quantize_rows` gives those of rows and `quantize_experts` those of weights.
    """
    (E, N, K), R = w.shape, y.shape[0]
    tile = row_tile(N, K, R, E, x.dtype, x.device)
    if scale is not None or y.dtype != x.dtype:  # to widen takes registers: 2 to 40 spills at 128 x 256
        tile = replace(tile, columns=min(tile.columns, 128))
    programs = tile.programs(R, E, N, x.device)
    if programs:
        weight, layout = weight_operand(w, tile, x.dtype)
        grouped_gemm_kernel[(programs,)](
            x, weight, offsets, y, token_map, row_map, weights, row_scale, scale, E, N, K, top_k, x.stride(0),
            *w.stride(), TMA=layout, SCALED=scaled_by(scale), PRECISION=precision(x.dtype, x.device),
            BLOCK_E=power_of_2(E), **tile.options(),
        )  # fmt: skip
