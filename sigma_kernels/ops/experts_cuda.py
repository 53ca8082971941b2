"""The expert layer on csrc/cuda: two grouped products that gather and scatter their rows, SwiGLU between them."""

import torch
from torch import Tensor

from sigma_kernels.ops import cuda
from sigma_kernels.ops.library import SUFFIX, saturated, weights_of_slots


def forward(
    x: Tensor,
    weights: Tensor,
    offsets: Tensor,
    row_map: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    saves: bool = True,
) -> tuple[Tensor, Tensor]:
    k = weights.shape[1]
    gate_up = cuda.product(x, gate_up_proj, offsets, True, gather=(row_map, k))
    hidden = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _activate("swiglu", hidden, gate_up, hidden)
    factors = weights.float().contiguous()
    by_slot = cuda.product(
        hidden, down_proj, offsets, True, scatter=row_map, scale=factors, slots=weights.numel()
    )
    out = by_slot if k == 1 else cuda.combine(by_slot, None, None, k)
    return out, gate_up if saves else gate_up.new_empty(0, gate_up.shape[1])


def inference(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
) -> Tensor:
    if gate_up_scale is not None or down_scale is not None:
        raise TypeError("moe_experts: backend 'cuda' takes no int8 weights")
    _, offsets, row_map = cuda.group_by_expert(saturated(index), down_proj.shape[0])
    return forward(x, weights, offsets, row_map, gate_up_proj, down_proj, saves=False)[0]


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
    k, by_slot = weights.shape[1], (row_map, weights.shape[1])
    grad_hidden = cuda.product(grad_out, down_proj, offsets, False, gather=by_slot)
    factors = weights.float().contiguous()
    grad_weights = weights_of_slots(factors, row_map)
    grad_gate_up, weighted = torch.empty_like(gate_up), torch.empty_like(grad_hidden)
    _activate(
        "swiglu_backward",
        grad_hidden,
        gate_up,
        grad_hidden,
        factors,
        row_map,
        grad_gate_up,
        weighted,
        grad_weights,
    )
    nothing = x.new_empty(0)
    grad_x = nothing
    if needed[0]:
        rows = cuda.product(
            grad_gate_up, gate_up_proj, offsets, False, scatter=row_map, slots=weights.numel()
        )
        grad_x = rows if k == 1 else cuda.combine(rows, None, None, k)
    of_gate_up, of_down = into or (
        p.new_empty(p.shape, dtype=grad_dtype) if n else None
        for p, n in zip((gate_up_proj, down_proj), needed[1:], strict=True)
    )
    adds = into is not None
    if of_gate_up is not None:
        cuda.grouped_outer(of_gate_up, grad_gate_up, x, offsets, adds, gather_b=by_slot)
    if of_down is not None:
        cuda.grouped_outer(of_down, grad_out, weighted, offsets, adds, gather_a=by_slot)
    return (
        grad_x,
        grad_weights.to(weights.dtype),
        nothing.to(grad_dtype) if adds or of_gate_up is None else of_gate_up,
        nothing.to(grad_dtype) if adds or of_down is None else of_down,
    )


def _activate(name: str, hidden: Tensor, *tensors: Tensor) -> None:
    cuda.launch(name + SUFFIX[hidden.dtype], hidden, *hidden.shape, *(t.data_ptr() for t in tensors))
