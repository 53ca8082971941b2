"""The loop that products of rows with an expert's weights are made of, however these lie in memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sigma_kernels.triton.tiles import Tile, has_tma

SCALE_BLOCK = tl.constexpr(128)  # numbers along K that share a scale, and of weights along N as well


@triton.jit
def multiply(
    x_ptr, row, stride_x, row_scale_ptr, w, scale_ptr, e, first, N, K, strides, PAIR: tl.constexpr,
    TMA: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x[row] [M, K] @ w[e].T [K, N] in f32: columns first .. first + BLOCK_N, and of a PAIR those N/2 further on too.

    TMA: "nk" if w is a descriptor of [E, N, K], "kn" if of [E, K, N], "" if it is a pointer.
    SCALED: "channel" if w is to be scaled by scale[e, n], and x, where rows have scales, by row_scale[row]; "block" if
    by scale[e, n/128, k/128] and row_scale[row, k/128], each block's sum before it is added.
    """
    k = tl.arange(0, BLOCK_K)
    half = N // 2 if PAIR else N
    x = x_ptr + row.to(tl.int64)[:, None] * stride_x + k[None, :]
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    other = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a = tl.load(x, mask=(k < K - k0)[None, :], other=0.0)
        x += BLOCK_K
        b = weights(w, e, first, half, k0, K, strides, TMA, BLOCK_N, BLOCK_K)
        if SCALED == "block":
            row_scale = tl.load(row_scale_ptr + row * tl.cdiv(K, SCALE_BLOCK) + k0 // SCALE_BLOCK)[:, None]
            scale = row_scale * scales(scale_ptr, e, first, N, k0, K, SCALED, BLOCK_N)
            sum += added(None, a, b, PRECISION) * scale
        else:
            sum = added(sum, a, b, PRECISION)
        if PAIR:
            b = weights(w, e, first + half, N, k0, K, strides, TMA, BLOCK_N, BLOCK_K)
            if SCALED == "block":
                scale = row_scale * scales(scale_ptr, e, first + half, N, k0, K, SCALED, BLOCK_N)
                other += added(None, a, b, PRECISION) * scale
            else:
                other = added(other, a, b, PRECISION)
    if PRECISION == "fnuz":
        sum *= 4.0
        other *= 4.0
    if SCALED == "channel":
        sum *= scales(scale_ptr, e, first, N, 0, K, SCALED, BLOCK_N)
        if PAIR:
            other *= scales(scale_ptr, e, first + half, N, 0, K, SCALED, BLOCK_N)
        if row_scale_ptr is not None:
            row_scale = tl.load(row_scale_ptr + row)[:, None]
            sum *= row_scale
            other *= row_scale
    return sum, other


@triton.jit
def weights(
    w, e, first, end, k0, K, strides, TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """A block [K, N] of expert e's; 0 from K on, and from column `end` on where a pointer would leave the memory."""
    if TMA == "nk":
        b = w.load([e, first, k0]).reshape(BLOCK_N, BLOCK_K).T
    elif TMA == "kn":
        b = w.load([e, k0, first]).reshape(BLOCK_K, BLOCK_N)
    else:
        n = tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # Where a block begins takes 64 bits, within it 32 do.
        begin = w + e.to(tl.int64) * strides[0] + first.to(tl.int64) * strides[1]
        begin += tl.cast(k0, tl.int64) * strides[2]
        within = n[None, :] * strides[1] + k[:, None] * strides[2]
        b = tl.load(begin + within, mask=(k < K - k0)[:, None] & (first + n < end)[None, :], other=0.0)
    return b


@triton.jit
def added(sum, a, b, PRECISION: tl.constexpr):
    """sum + a @ b.  Hopper adds products of fp8 in fewer bits than f32's: no more of them than a step has."""
    if a.dtype.is_fp8():
        if PRECISION == "fnuz":
            sum = tl.dot(halved(a), halved(b), sum)
        else:
            sum = tl.dot(a, b, sum, max_num_imprecise_acc=a.shape[1])
    else:
        sum = tl.dot(a, b.to(a.dtype), sum, input_precision=PRECISION)
    return sum


@triton.jit
def halved(x):
    """e4m3fn as the e4m3fnuz of gfx942, whose numbers with the same bits are half as large, but for -0, its NaN."""
    bits = x.to(tl.uint8, bitcast=True)
    return tl.where(bits == 0x80, 0, bits).to(tl.float8e4b8, bitcast=True)


@triton.jit
def scales(scale_ptr, e, first, N, k0, K, SCALED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of columns first .., as a row."""
    n = first + tl.arange(0, BLOCK_N)
    if SCALED == "block":
        at = (e * tl.cdiv(N, SCALE_BLOCK) + n // SCALE_BLOCK) * tl.cdiv(K, SCALE_BLOCK) + k0 // SCALE_BLOCK
    else:
        at = e * N + n
    return tl.load(scale_ptr + at, mask=n < N, other=0.0)[None, :]


def weight_operand(
    w: Tensor, tile: Tile, dtype: torch.dtype, is_pair: bool = False
) -> tuple[Tensor | TensorDescriptor, str]:
    """w [E, N, K] of any strides as `multiply` takes it beside rows of `dtype`, and its TMA.

    A descriptor where the GPU has them and w lies by expert, then by row, each a multiple of 16 bytes after the last;
    of a pair, whose second half begins within a row where N is contiguous, there too.
    """
    blocks = {"nk": (tile.columns, tile.depth), "kn": (tile.depth, tile.columns)}
    if has_tma(dtype, w.device) and w.numel() and w.data_ptr() % 16 == 0:
        for layout, block in blocks.items():
            v = w if layout == "nk" else w.transpose(1, 2)
            (of_expert, of_row, unit), size = v.stride(), w.itemsize
            lies_so = unit == 1 and v.shape[2] <= of_row <= of_expert
            begins = [of_expert, of_row, w.shape[1] // 2 if is_pair and layout == "kn" else 0]
            if lies_so and all(begin * size % 16 == 0 for begin in begins):
                return TensorDescriptor.from_tensor(v, [1, *block]), layout
    return w, ""


def scaled_by(scale: Tensor | None) -> str:
    """What `multiply` is to do with the weights' scales: [E, N], or [E, N/128, K/128]."""
    return "" if scale is None else "channel" if scale.dim() == 2 else "block"
