"""The expert layer with weights of one byte: forward only, for decoding, whose time is that of reading the weights."""

import torch
from torch import Tensor

from sigma_kernels.ops.experts import inference
from sigma_kernels.ops.library import check_device, check_float, check_index, check_shape, has_tangent


def quantize_experts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each output channel of weight to 255 levels, symmetric about zero.

    values[e, n, k] = round(weight[e, n, k] / scale[e, n]), scale[e, n] = max_k |weight[e, n, k]| / 127, 2^-126 at least
    (absmax quantization per output channel: Dettmers et al. 2022, arXiv 2208.07339).

    Args:    weight [E, N, K] floating point.
    Returns: values [E, N, K] int8; scale [E, N] f32.  |weight - values * scale| <= scale / 2.
    Raises:  TypeError for a dtype; ValueError for a shape, or a channel with infinity or NaN.
    """
    if not weight.dtype.is_floating_point:
        raise TypeError(f"quantize_experts: weight must be floating point, found {weight.dtype}")
    check_shape("quantize_experts", "weight", weight, ("E", "N", "K"))
    if weight.is_meta:
        raise ValueError("quantize_experts: weight must hold values, found a tensor on meta")
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[:2], dtype=torch.float32, device=weight.device)
    for e, matrix in enumerate(weight.detach()):  # an expert at a time: no copy of all of them in f32
        wide = matrix.float()
        largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
        if not largest.isfinite().all():
            channel = int((~largest.isfinite()).nonzero()[0])
            raise ValueError(
                f"quantize_experts: weight must be finite, found {largest[channel]} in expert {e}, channel {channel}"
            )
        # A denormal factor would be coarse, and zero no factor at all.
        scale[e] = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
        values[e] = (wide / scale[e][:, None]).round().to(torch.int8)
    return values, scale


def moe_experts_int8(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_scale: Tensor,
    down_proj: Tensor,
    down_scale: Tensor,
) -> Tensor:
    """`moe_experts` with weights gate_up_proj * gate_up_scale and down_proj * down_scale, as `quantize_experts` made.

    Activations stay floating point; products are summed in f32 and scaled once per output channel.

    Args:
        hidden_states: [T, H] f32, bf16 or f16; top_k_weights [T, k] of the same dtype.
        top_k_index: [T, k] int32 or int64, in 0..E-1.
        gate_up_proj, gate_up_scale: [E, 2I, H] int8 and [E, 2I] f32.
        down_proj, down_scale: [E, H, I] int8 and [E, H] f32.
    Returns: [T, H], without a gradient.
    Raises: TypeError for a dtype, ValueError for a shape, a device or an index out of range, RuntimeError where a
        gradient would be wanted.
    """
    op = "moe_experts_int8"
    check_float(op, hidden_states=hidden_states, top_k_weights=top_k_weights)
    check_index(op, "top_k_index", top_k_index)
    check_shape(op, "hidden_states", hidden_states, ("T", "H"))
    T, H = hidden_states.shape
    check_shape(op, "top_k_index", top_k_index, (T, "k"))
    check_shape(op, "top_k_weights", top_k_weights, (T, top_k_index.shape[1]))
    check_shape(op, "down_proj", down_proj, ("E", H, "I"))
    E, _, I = down_proj.shape
    check_shape(op, "gate_up_proj", gate_up_proj, (E, 2 * I, H))
    check_shape(op, "gate_up_scale", gate_up_scale, (E, 2 * I))
    check_shape(op, "down_scale", down_scale, (E, H))
    if top_k_index.shape[1] == 0 or E == 0:
        raise ValueError(
            f"{op}: at least one expert must be there and chosen, found E={E}, k={top_k_index.shape[1]}"
        )
    kinds = {"gate_up_proj": (gate_up_proj, torch.int8), "down_proj": (down_proj, torch.int8),
             "gate_up_scale": (gate_up_scale, torch.float32), "down_scale": (down_scale, torch.float32)}  # fmt: skip
    for name, (tensor, dtype) in kinds.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype}, found {tensor.dtype}")
        check_device(op, name, tensor, "hidden_states", hidden_states)
    check_device(op, "top_k_index", top_k_index, "hidden_states", hidden_states)
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        raise RuntimeError(f"{op}: forward only, call it under torch.no_grad()")
    if has_tangent(hidden_states) or has_tangent(top_k_weights):
        raise NotImplementedError(f"{op}: forward only, it has no jvp")
    return inference(
        hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_scale, down_scale
    )
