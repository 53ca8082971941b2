"""Rows rounded to fp8 e4m3, each with a scale or with one for each 128 of its numbers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sigma_kernels.triton.tiles import FUSION, cdiv, lines, power_of_2

LARGEST = tl.constexpr(448.0)  # of e4m3
INFINITE = tl.constexpr(float("inf"))
TINY = tl.constexpr(2.0**-126)  # of scales the least: denormal ones would be coarse, and zero no factor


@triton.jit(do_not_specialize=["T"])
def quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr, T, K, group, stride_x, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """scale[t, g] = max |x[t, k]| / 448 over group g of the row, q = x / scale.

    Two reads of a group, the second from cache.  Bound: one read of x, half or a quarter of that written.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * group
    end = tl.minimum(first + group, K)
    x = x_ptr + t.to(tl.int64)[:, None] * stride_x
    largest = tl.zeros((BLOCK_T,), tl.float32)
    for k0 in range(first, end, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K))[None, :]
        part = tl.load(x + k, mask=(t < T)[:, None] & (k < end), other=0.0).to(tl.float32)
        size = tl.where(part == part, tl.abs(part), INFINITE)  # maxima pass over NaN
        largest = tl.maximum(largest, tl.max(size, 1))
    scale = tl.maximum(tl.div_rn(largest, LARGEST), TINY)
    tl.store(scale_ptr + t * tl.num_programs(1) + tl.program_id(1), scale, mask=t < T)
    for k0 in range(first, end, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K))[None, :]
        is_live = (t < T)[:, None] & (k < end)
        part = tl.load(x + k, mask=is_live, other=0.0).to(tl.float32)
        q = tl.div_rn(part, scale[:, None])
        tl.store(q_ptr + t.to(tl.int64)[:, None] * K + k, q.to(q_ptr.dtype.element_ty), mask=is_live)


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x [T, K], unit inner stride, as e4m3 [T, K] and f32 scales [T, K/group], the last group being what is left."""
    (T, K), groups = x.shape, max(1, cdiv(x.shape[1], group))
    q = x.new_empty(T, K, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(T, groups, dtype=torch.float32)
    if T:
        width = min(1024, power_of_2(max(1, group)))
        block = lines(width, x.device)
        quantize_rows_kernel[(cdiv(T, block), groups)](
            x, q, scale, T, K, group, x.stride(0), BLOCK_T=block, BLOCK_K=width, **FUSION
        )
    return q, scale
