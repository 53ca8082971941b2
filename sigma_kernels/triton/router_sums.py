"""What balance losses read of a router's scores, beside its choice: sums over all tokens, and their gradient."""

import triton
import triton.language as tl
from torch import Tensor

from sigma_kernels.ops.library import rows
from sigma_kernels.triton.route import LOWEST, log_sigmoid, route, route_backward, softmax_rows
from sigma_kernels.triton.tiles import FUSION, cdiv, lines, power_of_2

INFINITE = tl.constexpr(float("inf"))


@triton.jit
def probabilities(logits, SOFTMAX: tl.constexpr):
    """softmax, or sigmoids divided by their sum: in logarithms, where all of them underflow their ratios do not."""
    return softmax_rows(logits if SOFTMAX else log_sigmoid(logits))


@triton.jit
def log_sum_exp(logits):
    most = tl.max(logits, 1)
    shift = tl.where(tl.abs(most) == INFINITE, 0.0, most)  # of infinite rows the answer is infinite, not NaN
    return shift + tl.log(tl.sum(tl.exp(logits - shift[:, None]), 1))


@triton.jit(do_not_specialize=["T"])
def router_sums_kernel(
    logits_ptr, partial_ptr, T, E, stride_t, SOFTMAX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """partial[b] = the sums over block b of tokens: of their probabilities [E], then of (log sum exp)^2."""
    b = tl.program_id(0)
    t = b * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    here = logits_ptr + t.to(tl.int64)[:, None] * stride_t + e[None, :]
    logits = tl.load(here, mask=(t < T)[:, None] & (e < E)[None, :], other=LOWEST)
    q = tl.where((t < T)[:, None], probabilities(logits, SOFTMAX), 0.0)
    square = log_sum_exp(logits)
    square = tl.where(t < T, square * square, 0.0)
    out = partial_ptr + b.to(tl.int64) * (E + 1)
    tl.store(out + e, tl.sum(q, 0), mask=e < E)
    tl.store(out + E, tl.sum(square, 0))


@triton.jit(do_not_specialize=["T"])
def router_sums_backward_kernel(
    logits_ptr, grad_ptr, grad_square_ptr, out_ptr, T, E, stride_t, SOFTMAX: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[t, e] += d(grad . probabilities + grad_square * square) / d logits."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    row = t.to(tl.int64)[:, None]
    is_live = (t < T)[:, None] & (e < E)[None, :]
    logits = tl.load(logits_ptr + row * stride_t + e[None, :], mask=is_live, other=LOWEST)
    grad = tl.load(grad_ptr + e, mask=e < E, other=0.0)[None, :]
    q = probabilities(logits, SOFTMAX)
    of_logits = q * (grad - tl.sum(q * grad, 1)[:, None])
    if not SOFTMAX:
        of_logits *= tl.sigmoid(-logits)
    of_logits += (2.0 * tl.load(grad_square_ptr) * log_sum_exp(logits))[:, None] * softmax_rows(logits)
    out = out_ptr + row * E + e[None, :]
    tl.store(out, tl.load(out, mask=is_live, other=0.0) + of_logits, mask=is_live)


def route_with_sums(
    logits: Tensor, top_k: int, softmax: bool, normalize: bool, bias: Tensor | None, sums_softmax: bool
) -> tuple[Tensor, ...]:
    """What `route` answers, and after the weights the probabilities' sum [E] and the square's []."""
    weights, *order = route(logits, top_k, softmax, normalize, bias)
    (T, E), logits = logits.shape, rows(logits)
    width = power_of_2(E)
    block = lines(width, logits.device)
    partial = logits.new_empty(cdiv(T, block), E + 1)
    if T:
        router_sums_kernel[(partial.shape[0],)](
            logits,
            partial,
            T,
            E,
            logits.stride(0),
            SOFTMAX=sums_softmax,
            BLOCK_T=block,
            BLOCK_E=width,
            **FUSION,
        )
    return weights, partial[:, :E].sum(0), partial[:, E].sum(), *order


def route_with_sums_backward(
    grad_weights: Tensor, grad_probabilities: Tensor, grad_square: Tensor, logits: Tensor, indices: Tensor,
    softmax: bool, normalize: bool, sums_softmax: bool,
) -> Tensor:  # fmt: skip
    """grad_logits [T, E] of the weights and of both sums."""
    out = route_backward(grad_weights, logits, indices, softmax, normalize)
    (T, E), logits = logits.shape, rows(logits)
    if T:
        width = power_of_2(E)
        block = lines(width, logits.device)
        router_sums_backward_kernel[(cdiv(T, block),)](
            logits, grad_probabilities.contiguous(), grad_square, out, T, E, logits.stride(0), SOFTMAX=sums_softmax,
            BLOCK_T=block, BLOCK_E=width, **FUSION,
        )  # fmt: skip
    return out
