"""The two products of the expert layer that carry SwiGLU along: the gate and up projection, and its gradient.

Neither reads rows in expert order: tokens are gathered through row_map, so no permuted copy of x or of the gradient
exists.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigma_kernels.triton.product import multiply, scaled_by, weight_operand
from sigma_kernels.triton.schedule import find_tile, tile_ends
from sigma_kernels.triton.tiles import fused, precision, row_tiles


@triton.jit(do_not_specialize=["least", "most"])
def gate_up_kernel(
    x_ptr, w, offsets_ptr, row_map_ptr, gate_up_ptr, hidden_ptr, row_scale_ptr, scale_ptr, E, I, H,
    top_k: tl.constexpr, stride_x, stride_e, stride_n, stride_k, least, most, TMA: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """hidden[r] = silu(gate) * up, (gate, up) = w[e] @ x[token of r]; gate_up is kept where there is memory for it.

    M: rows, N = I, K = H.  Two sums on one tile of x: gate and up of the same columns meet in registers.
    """
    column_tiles = tl.cdiv(I, BLOCK_N)
    ends = tile_ends(offsets_ptr, E, column_tiles, least, most, BLOCK_M, BLOCK_E)
    for tile in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        e, row, end, column = find_tile(tile, ends, offsets_ptr, BLOCK_M)
        r = row + tl.arange(0, BLOCK_M)
        i = column * BLOCK_N + tl.arange(0, BLOCK_N)
        token = tl.load(row_map_ptr + tl.minimum(r, end - 1)) // top_k
        gate, up = multiply(
            x_ptr, token, stride_x, row_scale_ptr, w, scale_ptr, e, column * BLOCK_N, 2 * I, H,
            (stride_e, stride_n, stride_k), True, TMA, SCALED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        is_live = (r < end)[:, None] & (i < I)[None, :]
        row = r.to(tl.int64)[:, None]
        if gate_up_ptr is not None:
            kept = gate_up_ptr + 2 * row * I + i[None, :]
            tl.store(kept, gate.to(gate_up_ptr.dtype.element_ty), mask=is_live)
            tl.store(kept + I, up.to(gate_up_ptr.dtype.element_ty), mask=is_live)
        hidden = gate * tl.sigmoid(gate) * up
        tl.store(hidden_ptr + row * I + i[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask=is_live)


@triton.jit(do_not_specialize=["R", "least", "most"])
def gate_up_backward_kernel(
    grad_ptr, w, offsets_ptr, row_map_ptr, weights_ptr, gate_up_ptr, grad_gate_up_ptr, hidden_ptr, partial_ptr, E,
    I, H, R, top_k: tl.constexpr, stride_grad, stride_e, stride_n, stride_k, least, most, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """With a = grad[token of r] @ down[e] and w the row's weight, tile by tile:

    partial[column, slot] = a . hidden over the tile's columns, of which grad_weights is the sum (SonicMoE's way:
    Guo et al. 2025, arXiv 2512.14080; the layer's output is kept nowhere); grad_gate_up = w * a through SwiGLU;
    hidden = w * hidden, what the gradient of `down` is made of.  M: rows, N = I, K = H.
    """
    column_tiles = tl.cdiv(I, BLOCK_N)
    ends = tile_ends(offsets_ptr, E, column_tiles, least, most, BLOCK_M, BLOCK_E)
    for tile in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        e, row, end, column = find_tile(tile, ends, offsets_ptr, BLOCK_M)
        r = row + tl.arange(0, BLOCK_M)
        i = column * BLOCK_N + tl.arange(0, BLOCK_N)
        slot = tl.load(row_map_ptr + tl.minimum(r, end - 1))
        a, _ = multiply(
            grad_ptr, slot // top_k, stride_grad, None, w, None, e, column * BLOCK_N, I, H,
            (stride_e, stride_n, stride_k), False, TMA, "", PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        is_live = (r < end)[:, None] & (i < I)[None, :]
        # Within a tile 32 bits are enough: addresses of 64 for each of its numbers would take half the registers.
        first, down_from_it = row.to(tl.int64) * I, tl.arange(0, BLOCK_M)[:, None] * I
        kept = gate_up_ptr + 2 * first
        within = 2 * down_from_it + i[None, :]
        gate = tl.load(kept + within, mask=is_live, other=0.0).to(tl.float32)
        up = tl.load(kept + (within + I), mask=is_live, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        hidden = gate * s * up
        tl.store(partial_ptr + column.to(tl.int64) * R + slot, tl.sum(a * hidden, 1), mask=r < end)
        weight = tl.load(weights_ptr + slot).to(tl.float32)[:, None]
        dtype = grad_gate_up_ptr.dtype.element_ty
        if hidden_ptr is not None:
            out = hidden_ptr + first + (down_from_it + i[None, :])
            tl.store(out, (weight * hidden).to(dtype), mask=is_live)
        a *= weight
        grads = grad_gate_up_ptr + 2 * first
        tl.store(grads + within, (a * up * s * (1.0 + gate * (1.0 - s))).to(dtype), mask=is_live)
        tl.store(grads + (within + I), (a * gate * s).to(dtype), mask=is_live)


def gate_up(
    x: Tensor,
    proj: Tensor,
    offsets: Tensor,
    row_map: Tensor,
    top_k: int,
    kept: Tensor | None,
    hidden: Tensor,
    scale: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> None:
    """Fill hidden [R, I], and kept [R, 2I] if given, from x [T, H] and proj [E, 2I, H], with scales or without."""
    (R, I), H, E = hidden.shape, x.shape[1], proj.shape[0]
    for tile in map(fused, row_tiles(2 * I, H, R, E, x.dtype, x.device)):
        programs = tile.programs(R, E, I, x.device)
        if programs:
            w, layout = weight_operand(proj, tile, x.dtype, is_pair=True)
            gate_up_kernel[(programs,)](
                x, w, offsets, row_map, kept, hidden, row_scale, scale, E, I, H, top_k, x.stride(0), *proj.stride(),
                tile.least, tile.most, TMA=layout, SCALED=scaled_by(scale), PRECISION=precision(x.dtype, x.device),
                BLOCK_E=triton.next_power_of_2(E), **tile.options(),
            )  # fmt: skip


def gate_up_backward(
    grad_out: Tensor,
    down: Tensor,
    offsets: Tensor,
    row_map: Tensor,
    weights: Tensor,
    kept: Tensor,
    grad_gate_up: Tensor,
    hidden: Tensor | None,
) -> Tensor:
    """Fill grad_gate_up [R, 2I], and hidden [R, I] if given; the gradient of weights [T, k] is the result."""
    (E, H, I), R, device = down.shape, row_map.shape[0], kept.device
    columns_of_down = down.transpose(1, 2)
    # The epilogue has five numbers of each sum: of 128 rows they spill, of 64 never.
    launches = [fused(tile) for tile in row_tiles(I, H, R, E, grad_out.dtype, device, tallest=64)]
    # Each launch has its own number of column tiles; what the narrower ones leave is zero.
    columns = max((triton.cdiv(I, tile.columns) for tile in launches), default=0)
    partial = kept.new_zeros(columns, R, dtype=torch.float32)
    for tile in launches:
        programs = tile.programs(R, E, I, device)
        if programs:
            w, layout = weight_operand(columns_of_down, tile, grad_out.dtype)
            gate_up_backward_kernel[(programs,)](
                grad_out, w, offsets, row_map, weights, kept, grad_gate_up, hidden, partial, E, I, H, R,
                weights.shape[1], grad_out.stride(0), *columns_of_down.stride(),
                tile.least, tile.most, TMA=layout, PRECISION=precision(grad_out.dtype, device),
                BLOCK_E=triton.next_power_of_2(E), **tile.options(),
            )  # fmt: skip
    return partial.sum(0).to(weights.dtype).view(weights.shape)
