"""The router's choice: score, top-k and weights in one read of the logits, and its gradient."""

import triton
import triton.language as tl
from torch import Tensor

from sigma_kernels.ops.library import rows
from sigma_kernels.routing import empty_routing
from sigma_kernels.triton.group import fill_order
from sigma_kernels.triton.tiles import FUSION, cdiv, lines, power_of_2

NOT_A_NUMBER = tl.constexpr(float("nan"))
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def softmax_rows(x):
    """softmax over the last dimension; a row with NaN is NaN throughout, though maxima pass over NaN."""
    power = tl.exp(x - tl.max(x, 1)[:, None])
    return power / tl.sum(power, 1)[:, None]


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    logits_ptr, bias_ptr, indices_ptr, weights_ptr, T, E, stride_t, K: tl.constexpr, SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """indices[t] = the K experts of largest key, weights[t] = their scores.  One program per block of tokens."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    is_expert = (e < E)[None, :]
    here = logits_ptr + t.to(tl.int64)[:, None] * stride_t + e[None, :]
    logits = tl.load(here, mask=(t < T)[:, None] & is_expert, other=LOWEST)
    p = softmax_rows(logits) if SOFTMAX else tl.sigmoid(logits)
    key = logits
    if bias_ptr is not None:
        key = p + tl.load(bias_ptr + e, mask=e < E, other=0.0)[None, :]
    key = tl.where(key == key, key, LOWEST)  # NaN ranks as -inf
    score = p
    if NORMALIZE:  # in logarithms: where all p underflow their ratios do not
        score = logits if SOFTMAX else log_sigmoid(logits)
    j = tl.arange(0, BLOCK_J)[None, :]
    indices = tl.zeros((BLOCK_T, BLOCK_J), tl.int32)
    weights = tl.full((BLOCK_T, BLOCK_J), LOWEST, tl.float32)
    is_free = is_expert & (t >= 0)[:, None]
    for turn in range(K):
        best = tl.max(tl.where(is_free, key, LOWEST), 1)[:, None]
        chosen = tl.min(tl.where(is_free & (key == best), e[None, :], BLOCK_E), 1)[:, None]
        is_chosen = e[None, :] == chosen
        value = tl.sum(tl.where(is_chosen, score, 0.0), 1)[:, None]
        indices = tl.where(j == turn, chosen, indices)
        weights = tl.where(j == turn, value, weights)
        is_free = is_free & (e[None, :] != chosen)
    if NORMALIZE:
        weights = softmax_rows(weights)
    place = t.to(tl.int64)[:, None] * K + j
    is_out = (t < T)[:, None] & (j < K)
    tl.store(indices_ptr + place, indices, mask=is_out)
    tl.store(weights_ptr + place, weights, mask=is_out)


@triton.jit(do_not_specialize=["T"])
def route_backward_kernel(
    logits_ptr, indices_ptr, grad_ptr, out_ptr, T, E, stride_t, K: tl.constexpr, SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[t, e] = d(grad . weights) / d logits, the scores computed again.  One program per block of tokens."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    is_live = (t < T)[:, None] & (e < E)[None, :]
    row = t.to(tl.int64)[:, None]
    logits = tl.load(logits_ptr + row * stride_t + e[None, :], mask=is_live, other=LOWEST)
    is_chosen = is_live & (e < 0)[None, :]
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for j in range(K):
        index = tl.load(indices_ptr + row * K + j, mask=row < T, other=-1)
        is_this = e[None, :] == index
        grad = tl.where(is_this, tl.load(grad_ptr + row * K + j, mask=row < T, other=0.0), grad)
        is_chosen = is_chosen | is_this
    if NORMALIZE:
        score = logits if SOFTMAX else log_sigmoid(logits)
        p = softmax_rows(tl.where(is_chosen, score, LOWEST))
        out = p * (grad - tl.sum(p * grad, 1)[:, None])
        if not SOFTMAX:
            out *= tl.sigmoid(-logits)
        out = tl.where(is_chosen, out, 0.0)  # where all is NaN too
    elif SOFTMAX:
        p = softmax_rows(logits)
        out = p * (grad - tl.sum(p * grad, 1)[:, None])
    else:
        p = tl.sigmoid(logits)
        out = grad * p * (1.0 - p)
    tl.store(out_ptr + row * E + e[None, :], out, mask=is_live)


def route(
    logits: Tensor, top_k: int, softmax: bool, normalize: bool, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """weights [T, k], indices [T, k], counts, offsets, row_map of f32 logits [T, E]."""
    (T, E), logits = logits.shape, rows(logits)
    weights, indices, *order = out = empty_routing(logits, top_k)
    if T:
        width = power_of_2(E)
        block = lines(width, logits.device)
        route_kernel[(cdiv(T, block),)](
            logits, None if bias is None else bias.contiguous(), indices, weights, T, E, logits.stride(0), K=top_k,
            SOFTMAX=softmax, NORMALIZE=normalize, BLOCK_T=block, BLOCK_E=width, BLOCK_J=power_of_2(top_k),
            **FUSION,
        )  # fmt: skip
    fill_order(indices, *order)
    return out


def route_backward(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, softmax: bool, normalize: bool
) -> Tensor:
    """grad_logits [T, E]."""
    T, E = logits.shape
    logits, out = rows(logits), logits.new_empty(T, E)
    if T:
        width = power_of_2(E)
        block = lines(width, logits.device)
        route_backward_kernel[(cdiv(T, block),)](
            logits, indices.contiguous(), grad_weights.contiguous(), out, T, E, logits.stride(0), K=indices.shape[1],
            SOFTMAX=softmax, NORMALIZE=normalize, BLOCK_T=block, BLOCK_E=width, **FUSION,
        )  # fmt: skip
    return out
