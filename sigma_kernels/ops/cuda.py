"""The operations on csrc/cuda: memory for what a launcher is asked for, and the call, on torch's current stream.

Nothing here looks at a value on the device, so nothing waits for it, and a CUDA graph can capture every call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sigma_kernels import _C
from sigma_kernels.backends import Backend
from sigma_kernels.ops.library import (
    NO_SUMS,
    SUFFIX,
    address,
    matrices,
    rows,
    rows_of_slots,
    weights_of_slots,
)
from sigma_kernels.routing import empty_order, empty_routing

TENSOR_CORE = (torch.bfloat16, torch.float16)

_native: Any = getattr(_C, "cuda", None)


def row(run: Callable[..., Any], dtypes: tuple[torch.dtype, ...]) -> Backend:
    """The row of an operation's table."""
    missing = "built without CUDA" if _native is None else None
    return Backend("cuda", run, dtypes, "cuda", missing=missing)


def launch(name: str, data: Tensor, *arguments: Any) -> None:
    """Launch on the stream that torch uses now on the device of `data`."""
    with torch.cuda.device(data.device):
        getattr(_native, name)(*arguments, torch.cuda.current_stream(data.device).cuda_stream)


def _workspace(like: Tensor, num_bytes: int) -> Tensor:
    return like.new_empty(num_bytes, dtype=torch.uint8)


def _check_experts(op: str, E: int, most: int) -> None:
    if most < E:
        raise ValueError(f"{op}: backend 'cuda' takes at most {most} experts, found E={E}")


def route(
    logits: Tensor, top_k: int, softmax: bool, normalize: bool, bias: Tensor | None
) -> tuple[Tensor, ...]:
    out = empty_routing(logits, top_k)
    route_into(logits, top_k, softmax, normalize, bias, out)
    return out


def route_into(
    logits: Tensor, top_k: int, softmax: bool, normalize: bool, bias: Tensor | None, out: tuple[Tensor, ...],
    sums: tuple[bool, int, int] = NO_SUMS,
) -> None:  # fmt: skip
    """Fill `empty_routing`, and what `sums` points to, as `route_cpu` does."""
    T, E = logits.shape
    _check_experts("route", E, _native.max_experts)
    logits = rows(logits)
    bias = None if bias is None else bias.contiguous()
    weights, indices, counts, offsets, row_map = out
    workspace = _workspace(logits, _native.route_workspace(T, E, sums != NO_SUMS))
    launch(
        "route", logits, T, E, top_k, logits.data_ptr(), logits.stride(0), address(bias), softmax, normalize,
        indices.data_ptr(), weights.data_ptr(), counts.data_ptr(), offsets.data_ptr(), row_map.data_ptr(),
        workspace.data_ptr(), *sums,
    )  # fmt: skip


def route_backward(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, softmax: bool, normalize: bool,
    sums: tuple[bool, int, int] = NO_SUMS,
) -> Tensor:  # fmt: skip
    T, E = logits.shape
    _check_experts("route_backward", E, _native.max_experts)
    logits, grad_weights, indices = rows(logits), grad_weights.contiguous(), indices.contiguous()
    grad_logits = logits.new_empty(T, E)
    launch(
        "route_backward", logits, T, E, indices.shape[1], logits.data_ptr(), logits.stride(0), softmax, normalize,
        indices.data_ptr(), grad_weights.data_ptr(), grad_logits.data_ptr(), *sums,
    )  # fmt: skip
    return grad_logits


def group_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_experts("group_by_expert", num_experts, _native.max_groups)
    indices = indices.contiguous()
    R = indices.numel()
    out = counts, offsets, row_map = empty_order(indices, num_experts)
    workspace = _workspace(indices, _native.group_workspace(R, num_experts))
    launch(
        "group_by_expert", indices, R, num_experts, indices.data_ptr(), counts.data_ptr(), offsets.data_ptr(),
        row_map.data_ptr(), workspace.data_ptr(),
    )  # fmt: skip
    return out


def permute(x: Tensor, row_map: Tensor, top_k: int) -> Tensor:
    x = rows(x)
    R, H = row_map.shape[0], x.shape[1]
    out = x.new_empty(R, H)
    launch(
        "copy_rows", x, R, H * x.itemsize, x.data_ptr(), x.stride(0) * x.itemsize, row_map.data_ptr(), top_k,
        out.data_ptr(), H * x.itemsize, 0,
    )  # fmt: skip
    return out


def unpermute(y: Tensor, row_map: Tensor, weights: Tensor | None, top_k: int, tokens: int) -> Tensor:
    return combine(y, inverse(row_map, tokens * top_k), weights, top_k)


def inverse(row_map: Tensor, slots: int) -> Tensor:
    """The row of each slot, -1 where it has none."""
    out = rows_of_slots(row_map, slots)
    launch("invert", row_map, row_map.data_ptr(), row_map.shape[0], out.data_ptr())
    return out


def combine(y: Tensor, row_of_slot: Tensor | None, weights: Tensor | None, top_k: int) -> Tensor:
    """The sum over a token's slots, whose rows are their own where none are given."""
    y = rows(y)
    slots = y.shape[0] if row_of_slot is None else row_of_slot.shape[0]
    T, H = slots // top_k, y.shape[1]
    weights = None if weights is None else weights.float().contiguous()
    out = y.new_empty(T, H)
    launch(
        "combine" + SUFFIX[y.dtype], y, T, H, top_k, y.data_ptr(), y.stride(0), address(row_of_slot),
        address(weights), out.data_ptr(),
    )  # fmt: skip
    return out


def unpermute_backward(
    grad_out: Tensor, y: Tensor, row_map: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    grad_out, y, factors = rows(grad_out), rows(y), weights.float().contiguous()
    grad_y, grad_weights = y.new_empty(y.shape), weights_of_slots(factors, row_map)
    launch(
        "combine_backward" + SUFFIX[y.dtype], y, *y.shape, weights.shape[1], grad_out.data_ptr(),
        grad_out.stride(0), y.data_ptr(), y.stride(0), row_map.data_ptr(), factors.data_ptr(), grad_y.data_ptr(),
        grad_weights.data_ptr(),
    )  # fmt: skip
    return grad_y, grad_weights.to(weights.dtype)


def product(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    transposed: bool,
    gather: tuple[Tensor | None, int] = (None, 1),
    scatter: Tensor | None = None,
    scale: Tensor | None = None,
    slots: int | None = None,
) -> Tensor:
    """One product per expert; rows of x taken by (slot of row, k), rows of y and their factors by slot.

    Rows of slots that have none are not written, or zero if `slots` is theirs and all others' number.
    """
    x, weight = rows(x), matrices(weight)
    E, N, K = weight.shape if transposed else (weight.shape[0], weight.shape[2], weight.shape[1])
    index, divisor = gather
    R = x.shape[0] if index is None else index.shape[0]
    y = x.new_zeros(slots, N) if slots is not None and slots > R else x.new_empty(R, N)
    launch(
        "grouped_gemm" + SUFFIX[x.dtype], x, R, E, N, K, offsets.data_ptr(), x.data_ptr(), x.stride(0),
        address(index), divisor, weight.data_ptr(), weight.stride(0), weight.stride(1), transposed, y.data_ptr(),
        address(scatter), address(scale),
    )  # fmt: skip
    return y


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor, transpose_weight: bool) -> Tensor:
    if weight.stride(-1) != 1 and weight.stride(-2) == 1:  # the same numbers, lying the other way
        weight, transpose_weight = weight.transpose(1, 2), not transpose_weight
    return product(x, weight, offsets, transpose_weight)


def grouped_outer(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    accumulate: bool,
    gather_a: tuple[Tensor | None, int] = (None, 1),
    gather_b: tuple[Tensor | None, int] = (None, 1),
) -> None:
    """The kernel stores in the dtype of a and b: where out has another, through a copy in that."""
    if out.dtype != a.dtype:
        narrow = out.new_empty(out.shape, dtype=a.dtype)
        grouped_outer(narrow, a, b, offsets, False, gather_a, gather_b)
        out.add_(narrow) if accumulate else out.copy_(narrow)
        return
    a, b = rows(a), rows(b)
    launch(
        "grouped_outer" + SUFFIX[a.dtype], a, *out.shape, offsets.data_ptr(), a.data_ptr(), a.stride(0),
        address(gather_a[0]), gather_a[1], b.data_ptr(), b.stride(0), address(gather_b[0]), gather_b[1],
        out.data_ptr(), accumulate,
    )  # fmt: skip
