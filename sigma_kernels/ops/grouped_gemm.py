"""One matrix product per expert, over rows in expert order."""

from typing import Any

import torch
from torch import Tensor

from sigma_kernels import reference
from sigma_kernels.backends import Backend, register_table, select
from sigma_kernels.ops import cuda
from sigma_kernels.ops.library import (
    REFERENCE,
    STORED,
    as_weights,
    check_float,
    check_offsets,
    check_shape,
    define,
    differentiable,
    empty,
    gemm_kernel,
    matrices,
    operand,
    risen,
    rounded,
)
from sigma_kernels.ops.triton_rows import triton_row


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor, *, transpose_weight: bool = True) -> Tensor:
    """Multiply each expert's rows by its own matrix.

    y[r] = x[r] @ weight[e].T for offsets[e] <= r < offsets[e+1], or x[r] @ weight[e] without `transpose_weight`.

    Args:
        x: [R, K], rows in expert order; f32 or bf16, as weight is.  Sums are f32, rounded once.
        weight: [E, N, K], or [E, K, N] without `transpose_weight`.
        offsets: [E+1] int32 or int64, rising from 0 to R.
    Returns: [R, N].  Each element is summed in a fixed order: same bits at any thread count.  Under torch.autocast x
        is computed on in the dtype of the weights, and the result has the dtype of x.
    Raises: TypeError for a dtype, ValueError for a shape or, on a CPU, offsets that do not rise from 0 to R.
    """
    op, dtype, x = "grouped_gemm", x.dtype, as_weights(x, weight)
    check_float(op, x=x, weight=weight)
    if weight.dim() != 3 or x.dim() != 2:
        raise ValueError(
            f"{op}: x must be [R, K] and weight [E, N, K], found {list(x.shape)} and {list(weight.shape)}"
        )
    E, K = weight.shape[0], weight.shape[2 if transpose_weight else 1]
    check_shape(op, "x", x, ("R", K))
    check_offsets(op, "offsets", offsets, E, "x", x)
    return _grouped_gemm(x, weight, offsets, transpose_weight).to(dtype)


def grouped_outer_(out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, *, accumulate: bool = False) -> Tensor:
    """The weight gradient of a grouped GEMM, written or added to memory that the caller keeps.

    out[e] (+)= a[rows of e].T @ b[rows of e]; an expert without rows gets zero, or is left as it is.

    Args: out [E, A, B] contiguous; a [R, A]; b [R, B]; offsets [E+1].
    Raises: as grouped_gemm; ValueError if out is not contiguous.
    """
    op = "grouped_outer_"
    check_float(op, out=out, a=a, b=b)
    check_shape(op, "a", a, ("R", "A"))
    check_shape(op, "b", b, (a.shape[0], "B"))
    check_shape(op, "out", out, ("E", a.shape[1], b.shape[1]))
    check_offsets(op, "offsets", offsets, out.shape[0], "out", out)
    if not out.is_contiguous():
        raise ValueError(f"{op}: out must be contiguous, found strides {list(out.stride())}")
    torch.ops.sigma.grouped_outer_(out, a, b, offsets, accumulate)
    return out


def _grouped_gemm_cpu(x: Tensor, weight: Tensor, offsets: Tensor, transpose_weight: bool) -> Tensor:
    if weight.stride(-1) != 1 and weight.stride(-2) == 1:  # the same numbers, lying the other way
        weight, transpose_weight = weight.transpose(1, 2), not transpose_weight
    dtype, x, weight = x.dtype, operand(x), matrices(weight)
    E, N, K = weight.shape if transpose_weight else (weight.shape[0], weight.shape[2], weight.shape[1])
    y = empty(x, x.shape[0], N)
    gemm_kernel("grouped_gemm", x, weight)(
        E, N, K, offsets.data_ptr(), x.data_ptr(), x.stride(0), weight.data_ptr(), weight.stride(0),
        weight.stride(1), y.data_ptr(), transpose_weight, torch.get_num_threads(),
    )  # fmt: skip
    return rounded(y, dtype)


def _grouped_gemm_reference(x: Tensor, weight: Tensor, offsets: Tensor, transpose_weight: bool) -> Tensor:
    return reference.grouped_gemm(x, weight, offsets, transpose_weight=transpose_weight)


def _grouped_outer_cpu(out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, accumulate: bool) -> None:
    a, b = operand(a), operand(b)
    gemm_kernel("grouped_outer", a, out)(
        *out.shape, offsets.data_ptr(), a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), out.data_ptr(),
        accumulate, torch.get_num_threads(),
    )  # fmt: skip


def _grouped_outer_reference(out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, accumulate: bool) -> None:
    value = reference.grouped_outer(a, b, offsets)
    out.add_(value) if accumulate else out.copy_(value)


def _grouped_outer_(out: Tensor, a: Tensor, b: Tensor, offsets: Tensor, accumulate: bool) -> None:
    offsets = risen("grouped_outer_", "offsets", offsets, "a", a)
    select("grouped_outer", a)(out, a, b, offsets, accumulate)


def _grouped_outer(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    out = empty(a, offsets.shape[0] - 1, a.shape[1], b.shape[1])
    _grouped_outer_(out, a, b, offsets, False)
    return out


register_table("grouped_gemm", [
    triton_row("grouped_gemm", "grouped_gemm", STORED),
    cuda.row(cuda.grouped_gemm, cuda.TENSOR_CORE),
    Backend("cpu", _grouped_gemm_cpu, STORED, "cpu"),
    Backend("reference", _grouped_gemm_reference, REFERENCE, by_name=True),
])  # fmt: skip
register_table("grouped_outer", [
    triton_row("grouped_outer", "grouped_outer", STORED),
    cuda.row(cuda.grouped_outer, cuda.TENSOR_CORE),
    Backend("cpu", _grouped_outer_cpu, STORED, "cpu"),
    Backend("reference", _grouped_outer_reference, REFERENCE, by_name=True),
])  # fmt: skip

define(
    "grouped_gemm(Tensor x, Tensor weight, Tensor offsets, bool transpose_weight) -> Tensor",
    lambda x, weight, offsets, transpose: select("grouped_gemm", x)(
        x, weight, risen("grouped_gemm", "offsets", offsets, "x", x), transpose
    ),
    lambda x, weight, offsets, transpose: x.new_empty(x.shape[0], weight.shape[1 if transpose else 2]),
)
define(
    "grouped_outer(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    _grouped_outer,
    lambda a, b, offsets: a.new_empty(offsets.shape[0] - 1, a.shape[1], b.shape[1]),
)
define(
    "grouped_outer_(Tensor(a!) out, Tensor a, Tensor b, Tensor offsets, bool accumulate) -> ()",
    _grouped_outer_,
    lambda *_: None,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, offsets, ctx.transpose_weight = inputs
    ctx.save_for_backward(x, weight, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    transposed = ctx.transpose_weight
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = _grouped_gemm(grad, weight, offsets, not transposed)
    if ctx.needs_input_grad[1]:
        a, b = (grad, x) if transposed else (x, grad)
        grad_weight = _grouped_outer_product(a, b, offsets)
    return grad_x, grad_weight, None, None


def _setup_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offsets = ctx.saved_tensors
    grad_a = _grouped_gemm(b, grad, offsets, True) if ctx.needs_input_grad[0] else None
    grad_b = _grouped_gemm(a, grad, offsets, False) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, None


_grouped_gemm = differentiable("grouped_gemm", _backward, _setup)
_grouped_outer_product = differentiable("grouped_outer", _outer_backward, _setup_outer)
