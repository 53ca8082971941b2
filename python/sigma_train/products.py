"""Linear layers and attention of bf16, on any processor.

Without instructions for it torch multiplies bf16 many times more slowly than f32 (docs/train.md).  A product of two
bf16 numbers is exact in f32, so there operands are rounded to bf16 and multiplied in f32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd


def has_products_of_bf16() -> bool:
    """Whether torch multiplies bf16 by instructions of this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiplies_in_f32() -> bool:
    """Whether operands are to be rounded to bf16, and then multiplied in f32."""
    return torch.is_autocast_enabled("cpu") and not has_products_of_bf16()


class Linear(nn.Linear):
    """x @ weight.T, without a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _LinearInF32.apply(x, self.weight) if multiplies_in_f32() else super().forward(x)


class _LinearInF32(torch.autograd.Function):
    """As torch's under autocast: operands, what is kept of them, result and gradients are bf16, sums f32."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).bfloat16()

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), grad = ctx.saved_tensors, grad.float()
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = (grad @ weight.float()).bfloat16()
        if ctx.needs_input_grad[1]:
            of_weight = (grad.flatten(0, -2).t() @ x.float().flatten(0, -2)).bfloat16()
        return of_x, of_weight


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, heads, S, d], k and v [B, kv_heads, S, d]."""
    if multiplies_in_f32():
        return _AttentionInF32.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class _AttentionInF32(torch.autograd.Function):
    """As torch's under autocast; the operations are those that it takes on a CPU, and what is kept is bf16, too."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = op(q.float(), k.float(), v.float(), 0.0, True)
        ctx.save_for_backward(q, k, v, out := out.bfloat16(), logsumexp)
        return out

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        made = op(grad.float(), *(x.float() for x in ctx.saved_tensors), 0.0, True)
        return tuple(x.bfloat16() for x in made)
