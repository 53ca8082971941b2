"""The expert layer on a CPU: memory for what is asked of csrc/cpu/experts.h, and the call."""

from typing import Any

import torch
from torch import Tensor

from sigma_kernels.ops.library import (
    address,
    empty,
    gemm_kernel,
    matrices,
    operand,
    rounded,
    row_of_slot,
    widened,
)
from sigma_kernels.ops.route import out_of_range


def _native(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor | None,
    row_map: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up: Tensor | None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    rows: Tensor | None = None,
) -> Any:
    """The arguments as addresses: whoever asks keeps what they are of.  `rows`: as `_rows_if_absent` has them."""
    (T, H), (E, _, I) = x.shape, down_proj.shape
    return gemm_kernel("Experts", x, down_proj)(
        T, H, I, E, weights.shape[1], x.data_ptr(), x.stride(0), address(offsets), address(row_map),
        weights.data_ptr(), gate_up_proj.data_ptr(), gate_up_proj.stride(0), gate_up_proj.stride(1),
        down_proj.data_ptr(), down_proj.stride(0), down_proj.stride(1), address(gate_up), torch.get_num_threads(),
        address(gate_up_scale), address(down_scale), address(rows),
    )  # fmt: skip


def _rows_if_absent(row_map: Tensor, count: int) -> Tensor | None:
    """The row of each slot, None where all have one."""
    return row_of_slot(row_map, count) if row_map.shape[0] < count else None


def forward(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    row_map: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    saves: bool = True,
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype
    x, weights = operand(x, down_proj), widened(weights.contiguous())
    gate_up_proj, down_proj = matrices(gate_up_proj), matrices(down_proj)
    (T, H), R, I, f32 = x.shape, row_map.shape[0], down_proj.shape[2], torch.float32
    out, gate_up, hidden = empty(x, T, H), empty(x, R if saves else 0, 2 * I, dtype=f32), empty(x, R, I)
    by_slot = empty(x, R, H, dtype=f32) if weights.shape[1] > 1 else out
    found = _rows_if_absent(row_map, weights.numel())
    native = _native(
        x, weights, offsets, row_map, gate_up_proj, down_proj, gate_up if saves else None, rows=found
    )
    gemm_kernel("experts_forward", x, down_proj)(
        native, hidden.data_ptr(), by_slot.data_ptr(), out.data_ptr()
    )
    return rounded(out, dtype), gate_up


def inference(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
) -> Tensor:
    dtype = x.dtype
    x, index, weights = operand(x, down_proj), index.contiguous(), weights.contiguous()
    if weights.dtype != down_proj.dtype:  # beside integers
        weights = widened(weights)
    gate_up_proj, down_proj = matrices(gate_up_proj), matrices(down_proj)
    scales = [None if scale is None else scale.contiguous() for scale in (gate_up_scale, down_scale)]
    out = empty(x, *x.shape)
    native = _native(x, weights, None, None, gate_up_proj, down_proj, None, *scales)
    wrong = gemm_kernel("experts_inference", x, down_proj)(
        native, index.data_ptr(), index.dtype == torch.int64, weights.data_ptr(), out.data_ptr()
    )
    if wrong >= 0:
        raise ValueError(out_of_range(index, down_proj.shape[0], wrong))
    return rounded(out, dtype)


def backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    row_map: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up: Tensor,
    needed: list[bool],
    grad_dtype: torch.dtype,
    into: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = x.dtype
    grad_out, x, weights = operand(grad_out), operand(x), widened(weights.contiguous())
    gate_up_proj, down_proj = matrices(gate_up_proj), matrices(down_proj)
    (T, H), R, I = x.shape, row_map.shape[0], down_proj.shape[2]
    grad_weights = torch.empty_like(weights)  # the kernel writes those of slots without a row too
    grad_x = empty(x, T, H) if needed[0] else x.new_empty(0)
    of_gate_up, of_down = into or (
        empty(p, *p.shape, dtype=grad_dtype) if n else None
        for p, n in zip((gate_up_proj, down_proj), needed[1:], strict=True)
    )
    stored = next((place.dtype for place in (of_gate_up, of_down) if place is not None), grad_dtype)
    is_wider = stored == torch.float32 != down_proj.dtype
    grad_gate_up, hidden = empty(x, R, 2 * I), empty(x, R, I)
    by_slot = empty(x, R, H, dtype=torch.float32) if weights.shape[1] > 1 else grad_x
    found = _rows_if_absent(row_map, weights.numel())
    native = _native(x, weights, offsets, row_map, gate_up_proj, down_proj, gate_up, rows=found)
    kernel = gemm_kernel("experts_backward", x, down_proj, "_f32" if is_wider else "")
    kernel(
        native, grad_out.data_ptr(), grad_out.stride(0), grad_gate_up.data_ptr(), hidden.data_ptr(),
        by_slot.data_ptr(), grad_weights.data_ptr(), grad_x.data_ptr() if needed[0] else 0,
        0 if of_gate_up is None else of_gate_up.data_ptr(), 0 if of_down is None else of_down.data_ptr(),
        into is not None,
    )  # fmt: skip
    grad_x = rounded(grad_x, dtype) if needed[0] else grad_x.to(dtype)
    nothing = x.new_empty(0, dtype=grad_dtype)
    return (
        grad_x,
        rounded(grad_weights, dtype),
        nothing if into or of_gate_up is None else of_gate_up,
        nothing if into or of_down is None else of_down,
    )
