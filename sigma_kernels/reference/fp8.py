"""The expert layer in fp8 e4m3, defined: both sides of each product are rounded, with scales; the rest is exact."""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 448  # of e4m3
SCALE_BLOCK = 128


def quantize_rows(x: Tensor, by_block: bool) -> tuple[Tensor, Tensor]:
    """x [T, K] in e4m3 and its scales: [T, 1], or of each 128 numbers of a row [T, ceil(K/128)]."""
    T, K = x.shape
    size = SCALE_BLOCK if by_block else max(1, K)
    groups = F.pad(x.float(), (0, -K % size if K else size)).view(T, max(1, -(-K // size)), size)
    scale = scale_of(groups.abs().amax(2), LARGEST)
    return (groups / scale[..., None]).to(torch.float8_e4m3fn).flatten(1)[:, :K], scale


def scale_of(largest: Tensor, level: int) -> Tensor:
    """A denormal factor would be coarse, and zero no factor at all.

    By a tensor: a GPU's torch multiplies by the reciprocal of a number, which is not the quotient's last bit.
    """
    return (largest / largest.new_full((), level)).clamp(min=torch.finfo(torch.float32).tiny)


def dequantized(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """values [..., K] times scale [..., 1] or [..., ceil(K/128)]."""
    return values.to(dtype) * by_number(scale, values.shape[-1])


def by_number(scale: Tensor, size: int) -> Tensor:
    """The last dimension, of blocks, as one of numbers; a single one is for all."""
    return scale if scale.shape[-1] == 1 else scale.repeat_interleave(SCALE_BLOCK, -1)[..., :size]


def moe_experts_fp8(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_scale: Tensor,
    down_scale: Tensor,
) -> Tensor:
    """moe_experts of what e4m3 leaves of the rows of each product, and of weights [E, N, K] e4m3 times their scales.

    Scales [E, N] are of channels, and rows then have one each; [E, ceil(N/128), ceil(K/128)] are of blocks.
    """
    by_block, dtype = down_scale.dim() == 3, hidden_states.dtype

    def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        if by_block:
            scale = scale.repeat_interleave(SCALE_BLOCK, 0)[: weight.shape[0]]
        w = dequantized(weight, scale if by_block else scale[:, None], dtype)
        return dequantized(*quantize_rows(x, by_block), dtype) @ w.T

    out = torch.zeros_like(hidden_states)
    for e in range(gate_up_proj.shape[0]):
        token, slot = torch.where(top_k_index == e)
        gate, up = product(hidden_states[token], gate_up_proj[e], gate_up_scale[e]).chunk(2, dim=-1)
        y = product(F.silu(gate) * up, down_proj[e], down_scale[e])
        out = out.index_add(0, token, y * top_k_weights[token, slot, None].to(y.dtype))
    return out
