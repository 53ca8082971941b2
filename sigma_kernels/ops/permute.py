"""Rows into expert order and back."""

from typing import Any

import torch
from torch import Tensor

from sigma_kernels import _C, reference
from sigma_kernels.backends import Backend, register_table, select
from sigma_kernels.ops import cuda
from sigma_kernels.ops.library import (
    REFERENCE,
    STORED,
    check_float,
    check_routing,
    check_shape,
    define,
    differentiable,
    empty,
    native,
    rounded,
    row_of_slot,
    rows,
    slots,
    weights_of_slots,
    widened,
)
from sigma_kernels.ops.triton_rows import triton_row
from sigma_kernels.routing import Routing


def permute(x: Tensor, routing: Routing) -> Tensor:
    """Copy each token's row to its places in expert order.

    out[r] = x[row_map[r] // k].

    Args:    x [T, H]; routing of these T tokens.
    Returns: [R, H], R = T*k, or less where slots have no row.
    Raises:  ValueError if x is not [T, H] or, on a CPU, if row_map names a slot twice or one that is not there;
             TypeError if row_map is not int32.
    """
    op = "permute"
    T, top_k = check_routing(op, routing, "x", x)
    check_shape(op, "x", x, (T, "H"))
    return _permute(x, routing.row_map, top_k)


def unpermute(y: Tensor, routing: Routing) -> Tensor:
    """Bring rows in expert order back to their tokens, weighted.

    out[t] = sum_j weights[t, j] * y[row of slot t*k + j].  The sum runs over j in order: same bits every time.
    A slot that has no row adds nothing, and its weight has no gradient.

    Args:    y [R, H]; routing, whose weights are differentiated as y is.
    Returns: [T, H].
    Raises:  as permute, for y; TypeError if the weights are of another dtype, ValueError if they are not [T, k].
    """
    op = "unpermute"
    check_float(op, **{"y": y, "routing.weights": routing.weights})
    T, top_k = check_routing(op, routing, "y", y)
    check_shape(op, "y", y, (routing.row_map.shape[0], "H"))
    check_shape(op, "routing.weights", routing.weights, (T, top_k))
    return _unpermute(y, routing.row_map, routing.weights, top_k, T)


def sum_by_token(y: Tensor, routing: Routing) -> Tensor:
    """unpermute with all weights one."""
    op = "sum_by_token"
    T, top_k = check_routing(op, routing, "y", y)
    check_shape(op, "y", y, (routing.row_map.shape[0], "H"))
    return _unpermute(y, routing.row_map, None, top_k, T)


def _permute_cpu(x: Tensor, row_map: Tensor, top_k: int) -> Tensor:
    x = rows(x)
    R, H = row_map.shape[0], x.shape[1]
    out = empty(x, R, H)
    _C.permute(
        R, H * x.itemsize, top_k, x.data_ptr(), x.stride(0) * x.itemsize, row_map.data_ptr(), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _unpermute_cpu(y: Tensor, row_map: Tensor, weights: Tensor | None, top_k: int, tokens: int) -> Tensor:
    y = rows(y)
    weights = None if weights is None else widened(weights.contiguous())
    H = y.shape[1]
    found = row_of_slot(row_map, tokens * top_k)
    out = empty(y, tokens, H)
    native("combine", y.dtype)(
        tokens, H, top_k, y.data_ptr(), y.stride(0), found.data_ptr(),
        0 if weights is None else weights.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _unpermute_backward_cpu(
    grad_out: Tensor, y: Tensor, row_map: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = weights.dtype
    grad_out, y, weights = rows(grad_out), rows(y), widened(weights.contiguous())
    grad_y, grad_weights = empty(y, *y.shape), weights_of_slots(weights, row_map)
    native("combine_backward", y.dtype)(
        *y.shape, weights.shape[1], grad_out.data_ptr(), grad_out.stride(0), y.data_ptr(), y.stride(0),
        row_map.data_ptr(), weights.data_ptr(), grad_y.data_ptr(), grad_weights.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return grad_y, rounded(grad_weights, dtype)


def _unpermute_backward_reference(
    grad_out: Tensor, y: Tensor, row_map: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    top_k = weights.shape[1]
    slot = row_map.long()
    rows_of_grad = grad_out[slot // top_k]
    grad_weights = weights_of_slots(weights, row_map)
    grad_weights.view(-1)[slot] = (rows_of_grad * y).sum(-1)
    return rows_of_grad * weights.reshape(-1)[slot, None], grad_weights


register_table("permute", [
    cuda.row(cuda.permute, STORED),
    triton_row("permute", "permute", STORED),
    Backend("cpu", _permute_cpu, STORED, "cpu"),
    Backend("reference", reference.permute, REFERENCE, by_name=True),
])  # fmt: skip
register_table("unpermute", [
    cuda.row(cuda.unpermute, STORED),
    triton_row("permute", "unpermute", STORED),
    Backend("cpu", _unpermute_cpu, STORED, "cpu"),
    Backend("reference", reference.unpermute, REFERENCE, by_name=True),
])  # fmt: skip
register_table("unpermute_backward", [
    cuda.row(cuda.unpermute_backward, STORED),
    triton_row("permute", "unpermute_backward", STORED),
    Backend("cpu", _unpermute_backward_cpu, STORED, "cpu"),
    Backend("reference", _unpermute_backward_reference, REFERENCE, by_name=True),
])  # fmt: skip

define(
    "permute(Tensor x, Tensor row_map, int top_k) -> Tensor",
    lambda x, row_map, top_k: select("permute", x)(x, slots("permute", row_map, x.shape[0] * top_k), top_k),
    lambda x, row_map, top_k: x.new_empty(row_map.shape[0], x.shape[1]),
)
define(
    "unpermute(Tensor y, Tensor row_map, Tensor? weights, int top_k, int tokens) -> Tensor",
    lambda y, row_map, weights, top_k, tokens: select("unpermute", y)(
        y, slots("unpermute", row_map, tokens * top_k), weights, top_k, tokens
    ),
    lambda y, row_map, weights, top_k, tokens: y.new_empty(tokens, y.shape[1]),
)
define(
    "unpermute_backward(Tensor grad_out, Tensor y, Tensor row_map, Tensor weights) -> (Tensor, Tensor)",
    lambda grad_out, y, row_map, weights: select("unpermute_backward", y)(
        grad_out, y, slots("unpermute", row_map, weights.numel()), weights
    ),
    lambda grad_out, y, row_map, weights: (y.new_empty(y.shape), weights.new_empty(weights.shape)),
)


def _setup_permute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, row_map, ctx.top_k = inputs
    ctx.tokens = x.shape[0]
    ctx.save_for_backward(row_map)


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (row_map,) = ctx.saved_tensors
    return _unpermute(grad, row_map, None, ctx.top_k, ctx.tokens), None, None


def _setup_unpermute(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, row_map, weights, ctx.top_k, _ = inputs
    ctx.save_for_backward(None if weights is None else y, row_map, weights)  # y is for the weights' gradient


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, row_map, weights = ctx.saved_tensors
    if weights is None:
        return _permute(grad, row_map, ctx.top_k), None, None, None, None
    grad_y, grad_weights = _unpermute_gradients(grad, y, row_map, weights)
    return grad_y, None, grad_weights, None, None


_permute = differentiable("permute", _permute_backward, _setup_permute)
_unpermute = differentiable("unpermute", _unpermute_backward, _setup_unpermute)


def _setup_unpermute_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_backward_backward(ctx: Any, of_y: Tensor, of_weights: Tensor) -> tuple[Tensor | None, ...]:
    """grad_y and grad_weights are each linear in grad_out, and in weights or y: the same two operations again."""
    grad_out, y, row_map, weights = ctx.saved_tensors
    tokens, top_k = weights.shape
    by_grad_out = _unpermute(of_y, row_map, weights, top_k, tokens)
    by_grad_out = by_grad_out + _unpermute(y, row_map, of_weights, top_k, tokens)
    by_y, _ = _unpermute_gradients(grad_out, y, row_map, of_weights)
    _, by_weights = _unpermute_gradients(grad_out, of_y, row_map, weights)
    return by_grad_out, by_y, None, by_weights


_unpermute_gradients = differentiable(
    "unpermute_backward", _unpermute_backward_backward, _setup_unpermute_backward
)
