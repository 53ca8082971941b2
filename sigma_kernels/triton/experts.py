"""The expert layer on a GPU: which kernels, in what order, with what memory."""

from typing import Any

import torch
from torch import Tensor

from sigma_kernels.ops.library import rows, saturated, saved_dtype
from sigma_kernels.triton.fp8 import quantize_rows
from sigma_kernels.triton.group import group_by_expert
from sigma_kernels.triton.grouped_gemm import multiply_rows
from sigma_kernels.triton.grouped_outer import outer_of_tokens
from sigma_kernels.triton.permute import combine, slots_with_rows
from sigma_kernels.triton.product import SCALE_BLOCK, scaled_by
from sigma_kernels.triton.swiglu import gate_up, swiglu_backward
from sigma_kernels.triton.tiles import has_fp8


def forward(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    row_map: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    saves: bool = True,
) -> tuple[Tensor, Tensor]:
    """out [T, H] and what the backward needs beside the inputs: gate_up [R, 2I], before SwiGLU."""
    kept = x.new_empty(row_map.shape[0] if saves else 0, gate_up_proj.shape[1], dtype=saved_dtype(x))
    out = layer(x, weights, offsets, row_map, gate_up_proj, down_proj, kept if saves else None)
    return out, kept


def inference(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
) -> Tensor:
    _, offsets, row_map = group_by_expert(saturated(index), down_proj.shape[0])
    scales = [None if scale is None else scale.contiguous() for scale in (gate_up_scale, down_scale)]
    return layer(x, weights, offsets, row_map, gate_up_proj, down_proj, None, *scales)


def inference_fp8(x: Tensor, *rest: Any) -> Tensor:
    """Weights in e4m3 with scales by channel or by block; rows are rounded to e4m3 before each projection."""
    if not has_fp8(x.device):
        raise RuntimeError("moe_experts_fp8: needs a GPU of sm_90, sm_100, gfx942 or gfx950")
    return inference(x, *rest)


def layer(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    row_map: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    kept: Tensor | None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    x, weights = rows(x), weights.contiguous()
    R, top_k, I = row_map.shape[0], weights.shape[1], down_proj.shape[2]
    hidden, by_slot = x.new_empty(R, I), slots_of(x, row_map, weights)
    left, row_scale = as_stored(x, gate_up_proj, gate_up_scale)
    gate_up(left, gate_up_proj, offsets, row_map, top_k, kept, hidden, gate_up_scale, row_scale)
    left, row_scale = as_stored(hidden, down_proj, down_scale)
    multiply_rows(left, down_proj, offsets, by_slot, row_map, weights, down_scale, row_scale)
    return summed(by_slot, row_map, top_k, x.dtype)


def as_stored(x: Tensor, w: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows as they are multiplied with w: in fp8, with scales like those of w, where w is fp8."""
    if scale is None or w.dtype != torch.float8_e4m3fn:
        return x, None
    return quantize_rows(x, SCALE_BLOCK.value if scaled_by(scale) == "block" else max(1, x.shape[1]))


def slots_of(x: Tensor, row_map: Tensor, weights: Tensor) -> Tensor:
    """Memory for a row of each slot: in f32 where rows are summed yet, so that only their sum is rounded."""
    slots, is_summed = weights.numel(), weights.shape[1] > 1
    is_written = is_summed or row_map.shape[0] == slots
    new = x.new_empty if is_written else x.new_zeros
    return new((slots, x.shape[1]), dtype=torch.float32 if is_summed else x.dtype)


def summed(by_slot: Tensor, row_map: Tensor, top_k: int, dtype: torch.dtype) -> Tensor:
    """[T, H] of the rows of all slots that have one."""
    if top_k == 1:
        return by_slot
    return combine(by_slot, slots_with_rows(row_map, by_slot.shape[0]), None, top_k, dtype)


def backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    row_map: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    kept: Tensor,
    needed: list[bool],
    grad_dtype: torch.dtype,
    into: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up_proj and down_proj; the last two are added to `into` where that is given."""
    grad_out, x, weights = rows(grad_out), rows(x), weights.contiguous()
    R, top_k, I, nothing = row_map.shape[0], weights.shape[1], down_proj.shape[2], x.new_empty(0)
    of_gate_up, of_down = into or (
        torch.empty_like(p, memory_format=torch.contiguous_format, dtype=grad_dtype) if n else None
        for p, n in zip((gate_up_proj, down_proj), needed[1:], strict=True)
    )
    grad_gate_up = x.new_empty(R, 2 * I)
    hidden = None if of_down is None else x.new_empty(R, I)
    grad_hidden = x.new_empty(R, I)
    columns_of_down = down_proj.transpose(1, 2)
    multiply_rows(grad_out, columns_of_down, offsets, grad_hidden, token_map=row_map, top_k=top_k)
    grad_weights = swiglu_backward(grad_hidden, row_map, weights, kept, grad_gate_up, hidden)
    accumulates = into is not None
    if of_down is not None and hidden is not None:
        outer_of_tokens(of_down, grad_out, hidden, offsets, accumulates, top_k=top_k, a_map=row_map)
    if of_gate_up is not None:
        outer_of_tokens(of_gate_up, grad_gate_up, x, offsets, accumulates, top_k=top_k, b_map=row_map)
    grad_x = nothing
    if needed[0]:
        by_slot = slots_of(x, row_map, weights)
        multiply_rows(grad_gate_up, gate_up_proj.transpose(1, 2), offsets, by_slot, row_map)
        grad_x = summed(by_slot, row_map, top_k, x.dtype)
    return (
        grad_x,
        grad_weights,
        nothing.to(grad_dtype) if into or of_gate_up is None else of_gate_up,
        nothing.to(grad_dtype) if into or of_down is None else of_down,
    )
