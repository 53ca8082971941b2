"""The expert layer with weights of one byte, int8 or fp8: forward only."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_kernels.backends import Backend, register_table, select
from sigma_kernels.ops.experts import inference
from sigma_kernels.ops.library import (
    REFERENCE,
    STORED,
    check_device,
    check_experts,
    check_float,
    check_shape,
    define,
    has_tangent,
    saturated,
)
from sigma_kernels.ops.triton_rows import triton_row
from sigma_kernels.reference import fp8

LEVELS = {torch.int8: 127, torch.float8_e4m3fn: fp8.LARGEST}


def quantize_experts(
    weight: Tensor, dtype: torch.dtype = torch.int8, *, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Round weight to int8 or to fp8 e4m3, with a scale for each output channel or for each block of 128 x 128.

    values[e, n, k] = round(weight[e, n, k] / s), s = max |weight| / 127, or / 448 for fp8, over the channel e, n or the
    block e, n/128, k/128; 2^-126 at least.  (By channel: Dettmers et al. 2022, arXiv 2208.07339; by block: DeepSeek-V3
    2024, arXiv 2412.19437, section 3.3.2.)

    Args:
        weight: [E, N, K] floating point.
        dtype: torch.int8 or torch.float8_e4m3fn.
        block: None for scales by channel; 128, with fp8, for scales by block.
    Returns: values [E, N, K] of that dtype; scale f32 [E, N], or [E, ceil(N/128), ceil(K/128)].  |weight - values * s|
        <= s/2 for int8; for fp8 at most 1/16 of |weight|, or s/1024 where that is more.
    Raises: TypeError for a dtype; ValueError for a shape, a block, or a channel with infinity or NaN.
    """
    op = "quantize_experts"
    if not weight.dtype.is_floating_point:
        raise TypeError(f"{op}: weight must be floating point, found {weight.dtype}")
    if dtype not in LEVELS:
        raise TypeError(f"{op}: dtype must be {' or '.join(map(str, LEVELS))}, found {dtype}")
    if block not in ((None, fp8.SCALE_BLOCK) if dtype.is_floating_point else (None,)):
        raise ValueError(
            f"{op}: block must be None, or {fp8.SCALE_BLOCK} for fp8, found {block!r} for {dtype}"
        )
    check_shape(op, "weight", weight, ("E", "N", "K"))
    if weight.is_meta:
        raise ValueError(f"{op}: weight must hold values, found a tensor on meta")
    E, N, K = weight.shape
    high, wide = (block, block) if block else (1, max(1, K))
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    scale = torch.empty(E, -(-N // high), max(1, -(-K // wide)), dtype=torch.float32, device=weight.device)
    for e, matrix in enumerate(weight.detach()):  # an expert at a time: no copy of all of them in f32
        finite = matrix.isfinite().all(1)
        if not finite.all():
            n = int((~finite).nonzero()[0])
            raise ValueError(
                f"{op}: weight must be finite, found {matrix[n].abs().amax()} in expert {e}, channel {n}"
            )
        whole = F.pad(matrix.float(), (0, scale.shape[2] * wide - K, 0, scale.shape[1] * high - N))
        blocks = whole.view(scale.shape[1], high, scale.shape[2], wide)
        scale[e] = fp8.scale_of(blocks.abs().amax((1, 3)), LEVELS[dtype])
        ratio = (blocks / scale[e][:, None, :, None]).view(whole.shape)[:N, :K]
        values[e] = (ratio if dtype.is_floating_point else ratio.round()).to(dtype)
    return values, scale if block else scale[..., 0]


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
    inputs = hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_scale, down_scale
    _check("moe_experts_int8", torch.int8, False, *inputs)
    return inference(*inputs)


def moe_experts_fp8(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    gate_up_scale: Tensor,
    down_proj: Tensor,
    down_scale: Tensor,
) -> Tensor:
    """`moe_experts` in fp8 e4m3: weights as `quantize_experts` made them, rows rounded before each projection.

    With scales by channel each row has one scale, max |x| / 448, and the sum is scaled at its end.  With scales by
    block each 128 numbers of a row have one, and the sum over them is scaled before it is added in f32 (DeepSeek-V3:
    arXiv 2412.19437, section 3.3.2).  A token with infinity or NaN has no finite result.

    Args:
        hidden_states: [T, H] f32, bf16 or f16; top_k_weights [T, k] of the same dtype.
        top_k_index: [T, k] int32 or int64, in 0..E-1.
        gate_up_proj, gate_up_scale: [E, 2I, H] e4m3fn and f32 [E, 2I] or [E, ceil(2I/128), ceil(H/128)].
        down_proj, down_scale: [E, H, I] e4m3fn and f32 [E, H] or [E, ceil(H/128), ceil(I/128)].
    Returns: [T, H], without a gradient.  Runs on GPUs of sm_90, sm_100, gfx942 and gfx950.
    Raises: TypeError for a dtype, ValueError for a shape, a device or, on a CPU, an index out of range, RuntimeError
        where a gradient would be wanted or no backend has fp8.
    """
    inputs = hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_scale, down_scale
    _check("moe_experts_fp8", torch.float8_e4m3fn, down_scale.dim() == 3, *inputs)
    return torch.ops.sigma.moe_experts_fp8(*inputs)


def _check(
    op: str,
    stored: torch.dtype,
    by_block: bool,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_scale: Tensor,
    down_scale: Tensor,
) -> None:
    """Raises: what moe_experts_int8 and moe_experts_fp8 say."""
    check_float(op, hidden_states=hidden_states, top_k_weights=top_k_weights)
    E, H, I = check_experts(op, hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)

    def scale_shape(N: int, K: int) -> tuple[int, ...]:
        blocks = -(-N // fp8.SCALE_BLOCK), max(1, -(-K // fp8.SCALE_BLOCK))
        return (E, *blocks) if by_block else (E, N)

    check_shape(op, "gate_up_scale", gate_up_scale, scale_shape(2 * I, H))
    check_shape(op, "down_scale", down_scale, scale_shape(H, I))
    kinds = {"gate_up_proj": (gate_up_proj, stored), "down_proj": (down_proj, stored),
             "gate_up_scale": (gate_up_scale, torch.float32), "down_scale": (down_scale, torch.float32)}  # fmt: skip
    for name, (tensor, dtype) in kinds.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} must be {dtype}, found {tensor.dtype}")
        check_device(op, name, tensor, "hidden_states", hidden_states)
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        raise RuntimeError(f"{op}: forward only, call it under torch.no_grad()")
    if has_tangent(hidden_states) or has_tangent(top_k_weights):
        raise NotImplementedError(f"{op}: forward only, it has no jvp")


def _fp8_reference(x: Tensor, index: Tensor, weights: Tensor, gate_up_proj: Tensor, *rest: Tensor) -> Tensor:
    torch.ops.sigma.group_by_expert(saturated(index), gate_up_proj.shape[0])  # refuses what is out of range
    return fp8.moe_experts_fp8(x, index, weights, gate_up_proj, *rest)


register_table("moe_experts_fp8", [
    triton_row("experts", "inference_fp8", STORED),
    Backend("reference", _fp8_reference, REFERENCE, by_name=True),
])  # fmt: skip
define(
    "moe_experts_fp8(Tensor x, Tensor index, Tensor weights, Tensor gate_up_proj, Tensor down_proj,"
    " Tensor gate_up_scale, Tensor down_scale) -> Tensor",
    lambda x, *rest: select("moe_experts_fp8", x)(x, *rest),
    lambda x, *rest: x.new_empty(x.shape),
)
