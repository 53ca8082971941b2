"""SwiGLU: on the sums of the gate and up projection, whose rows are gathered by token, and its gradient."""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from sigma_kernels.ops.library import weights_of_slots
from sigma_kernels.triton.product import multiply, scaled_by, weight_operand
from sigma_kernels.triton.schedule import find_tile, tile_ends
from sigma_kernels.triton.tiles import FUSION, cdiv, fitted, lines, power_of_2, precision, row_tile


@triton.jit
def gate_up_kernel(
    x_ptr, w, offsets_ptr, row_map_ptr, gate_up_ptr, hidden_ptr, row_scale_ptr, scale_ptr, E, I, H,
    top_k: tl.constexpr, stride_x, stride_e, stride_n, stride_k, TMA: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """hidden[r] = silu(gate) * up, (gate, up) = w[e] @ x[token of r]; gate_up is kept where there is memory for it.

    M: rows, N = I, K = H.  Two sums on one tile of x: gate and up of the same columns meet in registers.
    """
    column_tiles = tl.cdiv(I, BLOCK_N)
    ends = tile_ends(offsets_ptr, E, column_tiles, BLOCK_M, BLOCK_E)
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


@triton.jit(do_not_specialize=["R"])
def swiglu_backward_kernel(
    grad_ptr, gate_up_ptr, row_map_ptr, weights_ptr, grad_gate_up_ptr, hidden_ptr, grad_weights_ptr, R, I,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Of row r, with a = grad[r], what comes back through `down`, and w the weight of its slot:

    grad_weights[slot] = a . hidden (SonicMoE's way: Guo et al. 2025, arXiv 2512.14080; the layer's output is kept
    nowhere); grad_gate_up = w * a through SwiGLU; hidden = w * hidden, what the gradient of `down` is made of.
    Bound: bytes, 3I read and 3I written.  Not on the product's sums, as forward: five numbers of each leave room for
    64 rows a tile only, and took longer than product and this (docs/log.md).
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = r < R
    slot = tl.load(row_map_ptr + r, mask=is_row, other=0)
    weight = tl.load(weights_ptr + slot).to(tl.float32)[:, None]
    row = r.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    for i0 in range(0, I, BLOCK_I):
        i = (i0 + tl.arange(0, BLOCK_I))[None, :]
        is_live = is_row[:, None] & (i < I)
        kept = gate_up_ptr + 2 * row * I + i
        a = tl.load(grad_ptr + row * I + i, mask=is_live, other=0.0).to(tl.float32)
        gate = tl.load(kept, mask=is_live, other=0.0).to(tl.float32)
        up = tl.load(kept + I, mask=is_live, other=0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        hidden = gate * s * up
        total += a * hidden
        dtype = grad_gate_up_ptr.dtype.element_ty
        if hidden_ptr is not None:
            tl.store(hidden_ptr + row * I + i, (weight * hidden).to(dtype), mask=is_live)
        a *= weight
        grads = grad_gate_up_ptr + 2 * row * I + i
        tl.store(grads, (a * up * s * (1.0 + gate * (1.0 - s))).to(dtype), mask=is_live)
        tl.store(grads + I, (a * gate * s).to(dtype), mask=is_live)
    tl.store(grad_weights_ptr + slot, tl.sum(total, 1).to(grad_weights_ptr.dtype.element_ty), mask=is_row)


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
    tile = row_tile(I, H, R, E, x.dtype, x.device, is_pair=True)
    if scale is not None:
        tile = replace(tile, columns=min(tile.columns, 64))
    programs = tile.programs(R, E, I, x.device)
    if programs:
        w, layout = weight_operand(proj, tile, x.dtype, is_pair=True)
        gate_up_kernel[(programs,)](
            x, w, offsets, row_map, kept, hidden, row_scale, scale, E, I, H, top_k, x.stride(0), *proj.stride(),
            TMA=layout, SCALED=scaled_by(scale), PRECISION=precision(x.dtype, x.device), BLOCK_E=power_of_2(E),
            **tile.options(),
        )  # fmt: skip


def swiglu_backward(
    grad: Tensor,
    row_map: Tensor,
    weights: Tensor,
    kept: Tensor,
    grad_gate_up: Tensor,
    hidden: Tensor | None,
) -> Tensor:
    """Fill grad_gate_up [R, 2I], and hidden [R, I] if given; the gradient of weights [T, k] is the result."""
    R, I = grad.shape
    grad_weights = weights_of_slots(weights, row_map)
    if R:
        width = fitted(1024, I)
        block = lines(width, grad.device)
        swiglu_backward_kernel[(cdiv(R, block),)](
            grad, kept, row_map, weights, grad_gate_up, hidden, grad_weights, R, I, BLOCK_R=block, BLOCK_I=width,
            **FUSION,
        )  # fmt: skip
    return grad_weights
