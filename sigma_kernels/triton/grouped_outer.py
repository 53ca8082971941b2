"""The weight gradient: for each expert the product of its rows, transposed, with its rows.

M: columns of a, N: columns of b, K: the expert's rows, as many as it has.  Every tile of every expert is one program,
so the grid is known without the counts.  Its time is that of writing the result: E*M*N elements from R*(M + N).
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sigma_kernels.ops.library import rows
from sigma_kernels.triton.tiles import cdiv, has_tma, outer_tile, precision


@triton.jit
def grouped_outer_kernel(
    a_ptr, b_ptr, offsets_ptr, a_map_ptr, b_map_ptr, out, M, N, top_k: tl.constexpr, stride_a, stride_b,
    ACCUMULATE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[e] (+)= a[rows of e].T @ b[rows of e]; a map reads the row's token instead of the row.

    TMA: out is a descriptor of [E, M, N], not a pointer.
    """
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * column_tiles
    e = tl.program_id(0) // tiles
    local = tl.program_id(0) % tiles
    m = local // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = local % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(offsets_ptr + e)
    end = tl.load(offsets_ptr + e + 1)
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r0 in range(begin, end, BLOCK_K):
        r = r0 + tl.arange(0, BLOCK_K)
        a_row = r
        b_row = r
        if a_map_ptr is not None:
            a_row = tl.load(a_map_ptr + r, mask=r < end, other=0) // top_k
        if b_map_ptr is not None:
            b_row = tl.load(b_map_ptr + r, mask=r < end, other=0) // top_k
        is_row = (r < end)[:, None]
        a = a_ptr + a_row.to(tl.int64)[:, None] * stride_a + m[None, :]
        b = b_ptr + b_row.to(tl.int64)[:, None] * stride_b + n[None, :]
        left = tl.load(a, mask=is_row & (m < M)[None, :], other=0.0)
        right = tl.load(b, mask=is_row & (n < N)[None, :], other=0.0)
        sum = tl.dot(tl.trans(left), right, sum, input_precision=PRECISION)
    if TMA:
        at = [e, local // column_tiles * BLOCK_M, local % column_tiles * BLOCK_N]
        if ACCUMULATE:
            sum += out.load(at).reshape(BLOCK_M, BLOCK_N).to(tl.float32)
        out.store(at, sum.to(out.dtype).reshape(1, BLOCK_M, BLOCK_N))
    else:
        place = out + e.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
        is_live = (m < M)[:, None] & (n < N)[None, :]
        if ACCUMULATE:
            sum += tl.load(place, mask=is_live, other=0.0).to(tl.float32)
        tl.store(place, sum.to(out.dtype.element_ty), mask=is_live)


def grouped_outer(out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, accumulate: bool) -> None:
    """Fill or add to out [E, A, B], contiguous, from a [R, A] and b [R, B]; out is of their dtype or f32."""
    outer_of_tokens(out, a, b, offsets, accumulate, top_k=1)


def outer_of_tokens(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    accumulate: bool,
    *,
    top_k: int,
    a_map: Tensor | None = None,
    b_map: Tensor | None = None,
) -> None:
    """The same, where a or b may be [T, ...] by token, found through the rows' map."""
    (E, M, N), a, b = out.shape, rows(a), rows(b)
    if not out.numel():
        return
    R = (b if b_map is None else a).shape[0]
    is_as_operands = out.dtype == a.dtype
    tile = outer_tile(M, N, R, E, a.dtype, a.device, adds_wider=accumulate and not is_as_operands)
    # An f32 tile of narrow operands would not fit beside them in the shared memory that tiles are sized for.
    has_descriptor = (
        is_as_operands and has_tma(a.dtype, a.device) and N * out.itemsize % 16 == out.data_ptr() % 16 == 0
    )
    place: Tensor | TensorDescriptor = out
    if has_descriptor:  # by its own strides: of a dimension of one, contiguous or not, they may be any
        place = TensorDescriptor(out, [E, M, N], [M * N, N, 1], [1, tile.rows, tile.columns])
    grouped_outer_kernel[(E * cdiv(M, tile.rows) * cdiv(N, tile.columns),)](
        a, b, offsets, a_map, b_map, place, M, N, top_k, a.stride(0), b.stride(0), ACCUMULATE=accumulate,
        TMA=has_descriptor, PRECISION=precision(a.dtype, a.device), **tile.options(),
    )  # fmt: skip
