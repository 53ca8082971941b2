"""Rows into expert order and back.  Sums run over the choices in order, in f32, and are rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigma_kernels.ops.library import rows, rows_of_slots, weights_of_slots
from sigma_kernels.triton.tiles import FUSION, cdiv, lines, power_of_2


@triton.jit(do_not_specialize=["R"])
def permute_rows_kernel(
    x_ptr, row_map_ptr, out_ptr, R, H, top_k: tl.constexpr, stride_x, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr
):  # fmt: skip
    """out[r] = x[row_map[r] // k].  One program per block of rows and of columns."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_live = (r < R)[:, None] & (h < H)[None, :]
    token = (tl.load(row_map_ptr + r, mask=r < R, other=0) // top_k).to(tl.int64)
    value = tl.load(x_ptr + token[:, None] * stride_x + h[None, :], mask=is_live)
    tl.store(out_ptr + r.to(tl.int64)[:, None] * H + h[None, :], value, mask=is_live)


@triton.jit(do_not_specialize=["R"])
def invert_kernel(row_map_ptr, row_of_slot_ptr, R, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(row_of_slot_ptr + tl.load(row_map_ptr + r, mask=r < R, other=0), r, mask=r < R)


@triton.jit(do_not_specialize=["T"])
def combine_rows_kernel(
    y_ptr, row_of_slot_ptr, weights_ptr, out_ptr, T, H, top_k: tl.constexpr, stride_y,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_j weights[t, j] * y[row of slot t*k + j]; without a map rows are slots; none if negative."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_live = (t < T)[:, None] & (h < H)[None, :]
    sum = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for j in range(top_k):
        row = t * top_k + j
        weight, is_there = 1.0, is_live
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + row, mask=t < T, other=0.0).to(tl.float32)[:, None]
        if row_of_slot_ptr is not None:
            row = tl.load(row_of_slot_ptr + row, mask=t < T, other=0)
            is_there = is_live & (row >= 0)[:, None]
        value = tl.load(y_ptr + row.to(tl.int64)[:, None] * stride_y + h[None, :], mask=is_there, other=0.0)
        sum += weight * value.to(tl.float32)
    out = out_ptr + t.to(tl.int64)[:, None] * H + h[None, :]
    tl.store(out, sum.to(out_ptr.dtype.element_ty), mask=is_live)


@triton.jit(do_not_specialize=["R"])
def combine_backward_kernel(
    grad_ptr, y_ptr, row_map_ptr, weights_ptr, grad_y_ptr, grad_weights_ptr, R, H, top_k: tl.constexpr, stride_grad,
    stride_y, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """grad_y[r] = w * grad[t], grad_weights[s] = grad[t] . y[r].  One program sums a row: same bits every time."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot = tl.load(row_map_ptr + r, mask=r < R, other=0)
    weight = tl.load(weights_ptr + slot, mask=r < R, other=0.0).to(tl.float32)[:, None]
    token, row = (slot // top_k).to(tl.int64)[:, None], r.to(tl.int64)[:, None]
    dot = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for h0 in range(0, H, BLOCK_H):
        h = (h0 + tl.arange(0, BLOCK_H))[None, :]
        is_live = (r < R)[:, None] & (h < H)
        grad = tl.load(grad_ptr + token * stride_grad + h, mask=is_live, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * stride_y + h, mask=is_live, other=0.0).to(tl.float32)
        dot += grad * y
        tl.store(grad_y_ptr + row * H + h, (weight * grad).to(grad_y_ptr.dtype.element_ty), mask=is_live)
    out = tl.sum(dot, 1).to(grad_weights_ptr.dtype.element_ty)
    tl.store(grad_weights_ptr + slot, out, mask=r < R)


def permute(x: Tensor, row_map: Tensor, top_k: int) -> Tensor:
    """[R, H] of x [T, H]."""
    x = rows(x)
    out = x.new_empty(row_map.shape[0], x.shape[1])
    if out.numel():
        R, H = out.shape
        height, width = block(H, x.device)
        permute_rows_kernel[(cdiv(R, height), cdiv(H, width))](
            x, row_map, out, R, H, top_k, x.stride(0), BLOCK_R=height, BLOCK_H=width, **FUSION
        )
    return out


def unpermute(y: Tensor, row_map: Tensor, weights: Tensor | None, top_k: int, tokens: int) -> Tensor:
    """[tokens, H] of y [R, H], weighted where weights are given."""
    R = row_map.shape[0]
    row_of_slot = rows_of_slots(row_map, tokens * top_k)
    if R:
        invert_kernel[(cdiv(R, 1024),)](row_map, row_of_slot, R, BLOCK=1024, **FUSION)
    return combine(rows(y), row_of_slot, weights, top_k, y.dtype)


def slots_with_rows(row_map: Tensor, slots: int) -> Tensor | None:
    """Each slot's number, -1 where it has no row: `combine` of what lies by slot.  None where all have one."""
    if row_map.shape[0] == slots:
        return None
    return rows_of_slots(row_map, slots).index_copy_(0, row_map.long(), row_map)


def combine(
    y: Tensor, row_of_slot: Tensor | None, weights: Tensor | None, top_k: int, dtype: torch.dtype
) -> Tensor:
    """The same where the row of each slot is known: its own where no map is given, none where it is negative."""
    T, H = (y if row_of_slot is None else row_of_slot).shape[0] // top_k, y.shape[1]
    out = y.new_empty(T, H, dtype=dtype)
    if out.numel():
        height, width = block(H, y.device)
        combine_rows_kernel[(cdiv(T, height), cdiv(H, width))](
            y, row_of_slot, None if weights is None else weights.contiguous(), out, T, H, top_k, y.stride(0),
            BLOCK_T=height, BLOCK_H=width, **FUSION,
        )  # fmt: skip
    return out


def unpermute_backward(
    grad_out: Tensor, y: Tensor, row_map: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_y [R, H] and grad_weights [T, k]."""
    (R, H), top_k = y.shape, weights.shape[1]
    grad_out, y, weights = rows(grad_out), rows(y), weights.contiguous()
    grad_y, grad_weights = y.new_empty(R, H), weights_of_slots(weights, row_map)
    if R:
        height, width = block(H, y.device)
        combine_backward_kernel[(cdiv(R, height),)](
            grad_out, y, row_map, weights, grad_y, grad_weights, R, H, top_k, grad_out.stride(0), y.stride(0),
            BLOCK_R=height, BLOCK_H=width, **FUSION,
        )  # fmt: skip
    return grad_y, grad_weights


def block(H: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a program's block."""
    width = min(power_of_2(max(H, 1)), 1024)
    return lines(width, device), width
