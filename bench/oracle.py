"""What is right: the expert layer and its gradients in f64, expert by expert, and how far f32 may be from it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def layer(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, grad_out: Tensor | None = None
) -> list[Tensor]:
    """[out], and with grad_out the gradients by x, weights, gate_up and down; in x's dtype, summed in f64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    grads = [torch.zeros_like(t, dtype=torch.float64) for t in (x, weights)]
    if grad_out is not None:
        grads += [torch.zeros_like(gate_up), torch.zeros_like(down)]
    for e in range(down.shape[0]):
        token, slot = torch.where(index == e)
        if not len(token):
            continue
        leaves = [t.double() for t in (x[token], weights[token, slot], gate_up[e], down[e])]
        for leaf in leaves:
            leaf.requires_grad_(grad_out is not None)
        gate, up = F.linear(leaves[0], leaves[2]).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, leaves[3]) * leaves[1][:, None]
        out.index_add_(0, token, y.detach())
        if grad_out is not None:
            of_x, of_weights, *of_experts = torch.autograd.grad(y, leaves, grad_out[token].double())
            grads[0].index_add_(0, token, of_x)
            grads[1][token, slot] += of_weights
            grads[2][e], grads[3][e] = of_experts
    return [out.to(x.dtype)] if grad_out is None else [t.to(x.dtype) for t in (out, *grads)]


def assert_agrees(who: str, got: Sequence[Tensor], want: Sequence[Tensor], depth: int) -> None:
    """|got - want| <= bound * (typical size of want + |want|) everywhere; rounding grows as sqrt(depth).

    As a whole it may be off by an eighth at most: in bf16 the bound alone, 4 at depth 1,024, would let zeros pass.

    Raises: AssertionError naming who is wrong, where, and by how much.
    """
    bound = 16 * torch.finfo(want[0].dtype).eps * depth**0.5
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        size = b.square().mean().sqrt().clamp(min=1e-30)
        rows = max(1, 2**22 * len(b) // b.numel())  # so that temporaries stay small
        parts = zip(a.detach().split(rows), b.split(rows), strict=True)
        error = torch.stack([((p - q).abs() / (size + q.abs())).max() for p, q in parts]).max().item()
        assert error <= bound, f"{who}: output {i} is off by {error:.2e}, allowed is {bound:.2e}"
        parts = zip(a.detach().split(rows), b.split(rows), strict=True)
        wrong = torch.stack([(p - q).float().square().sum() for p, q in parts]).sum().sqrt()
        whole = (wrong / (size.float() * b.numel() ** 0.5)).item()
        assert whole <= 1 / 8, f"{who}: output {i} is off by {whole:.0%} as a whole"


def assert_step(
    who: str, loss: Tensor, gradient: Tensor, want: float, want_gradient: Tensor, dtype: torch.dtype
) -> None:
    """Of a first step: its loss, and the gradient of experts, since a loss at the first step hardly tells experts.

    Within 1e-3; in bf16 a quarter of the gradient's norm, as a router that is rounded sends some tokens to another
    expert, and half where weights are rounded too.  Zeros are off by all of it, those of other experts by more.

    Raises: AssertionError naming who is wrong.
    """
    loose = dtype != torch.float32
    limit = 1e-3 if not loose else 1 / 2 if who.endswith("bf16_weights") else 1 / 4
    off = abs(loss.item() - want)
    assert off < (5e-3 if loose else 1e-3), f"{who}: the first loss is {loss.item():.6f}, not {want:.6f}"
    wrong = ((gradient.float() - want_gradient).norm() / want_gradient.norm()).item()
    assert wrong < limit, f"{who}: the first gradient of experts is off by {wrong:.1%}"
