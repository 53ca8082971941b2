"""The same layer by everyone else.  x [T, H], index and weights [T, k], gate_up [E, 2I, H], down [E, H, I]."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from bounds import dense
from torch import Tensor

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def counts_of(flat: Tensor, E: int) -> Tensor:
    """torch.bincount, which on a GPU waits for it to learn the largest."""
    if flat.is_cpu:
        return torch.bincount(flat, minlength=E)
    return flat.new_zeros(E).scatter_add_(0, flat, torch.ones_like(flat))


def in_expert_order(index: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """slot of each row, token of each row, end of each expert's rows."""
    flat = index.reshape(-1)
    slot_of_row = flat.argsort(stable=True)
    return slot_of_row, slot_of_row // index.shape[1], counts_of(flat, E).cumsum(0)


def combined(y: Tensor, weights: Tensor, slot_of_row: Tensor, token_of_row: Tensor, T: int) -> Tensor:
    return y.new_zeros(T, y.shape[1]).index_add(0, token_of_row, y * weights.reshape(-1)[slot_of_row, None])


def grouped_mm(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """torch's own grouped GEMM over sorted tokens."""
    slot, token, ends = in_expert_order(index, gate_up.shape[0])
    offs = ends.int()
    gate, up = F.grouped_mm(x[token], gate_up.transpose(-2, -1), offs=offs).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=offs)
    return combined(y, weights, slot, token, x.shape[0])


def padded_bmm(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One batched GEMM, every expert padded to the busiest."""
    E = gate_up.shape[0]
    slot, token, ends = in_expert_order(index, E)
    counts = ends.diff(prepend=ends.new_zeros(1))
    expert = index.reshape(-1)[slot]
    place = torch.arange(len(slot), device=x.device) - (ends - counts)[expert]
    padded = x.new_zeros(E, int(counts.max()), x.shape[1]).index_put((expert, place), x[token])
    gate, up = torch.bmm(padded, gate_up.transpose(1, 2)).chunk(2, -1)
    y = torch.bmm(F.silu(gate) * up, down.transpose(1, 2))[expert, place]
    return combined(y, weights, slot, token, x.shape[0])


def sorted_loop(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A GEMM per expert over sorted tokens, each into its part of memory that is allocated once for all."""
    return _SortedLoop.apply(x, index, weights, gate_up, down)


class _SortedLoop(torch.autograd.Function):
    """The loop as one writes it by hand: backward fills one gradient per weight tensor, expert by expert."""

    @staticmethod
    def forward(ctx, x, index, weights, gate_up, down):
        E, H, I = down.shape
        slot, token, ends = in_expert_order(index, E)
        ctx.sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        rows = x[token]
        h, y = x.new_empty(len(token), 2 * I), x.new_empty(len(token), H)
        for part, w, out in zip(rows.split(ctx.sizes), gate_up, h.split(ctx.sizes), strict=True):
            torch.mm(part, w.t(), out=out)
        a = F.silu(h[:, :I]) * h[:, I:]
        for part, w, out in zip(a.split(ctx.sizes), down, y.split(ctx.sizes), strict=True):
            torch.mm(part, w.t(), out=out)
        ctx.save_for_backward(rows, slot, token, weights, gate_up, down, h, a, y)
        return combined(y, weights, slot, token, x.shape[0])

    @staticmethod
    def backward(ctx, grad_out):
        rows, slot, token, weights, gate_up, down, h, a, y = ctx.saved_tensors
        T, I, sizes = grad_out.shape[0], down.shape[2], ctx.sizes
        grad_rows = grad_out[token]
        grad_weights = torch.empty_like(weights)
        grad_weights.view(-1)[slot] = (grad_rows * y).sum(-1)
        grad_y = grad_rows * weights.reshape(-1)[slot, None]
        grad_a, grad_h = torch.empty_like(a), torch.empty_like(h)
        grad_x, grad_gate_up, grad_down = (torch.empty_like(t) for t in (rows, gate_up, down))
        for e, (g, part, ga) in enumerate(
            zip(grad_y.split(sizes), a.split(sizes), grad_a.split(sizes), strict=True)
        ):
            torch.mm(g, down[e], out=ga)
            torch.mm(g.t(), part, out=grad_down[e])
        gate, up = h[:, :I], h[:, I:]
        sigmoid = gate.sigmoid()
        torch.mul(grad_a, up * sigmoid * (1 + gate * (1 - sigmoid)), out=grad_h[:, :I])
        torch.mul(grad_a, gate * sigmoid, out=grad_h[:, I:])
        for e, (g, part, gx) in enumerate(
            zip(grad_h.split(sizes), rows.split(sizes), grad_x.split(sizes), strict=True)
        ):
            torch.mm(g, gate_up[e], out=gx)
            torch.mm(g.t(), part, out=grad_gate_up[e])
        by_token = grad_x.new_zeros(T, grad_x.shape[1]).index_add(0, token, grad_x)
        return by_token, None, grad_weights, grad_gate_up, grad_down


def hugging_face(name: str) -> Layer:
    """transformers' experts of that name: 'eager', 'grouped_mm' or 'batched_mm', on the very same weights."""
    modules: dict[torch.Size, torch.nn.Module] = {}

    def module_for(shape: torch.Size) -> torch.nn.Module:
        if shape not in modules:
            # Here, as who imports this file does not run all of it, and they take seconds.
            from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

            E, H, I = shape
            config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E)
            config._experts_implementation = name
            with torch.device("meta"):
                modules[shape] = Qwen3MoeExperts(config)
            del modules[shape].gate_up_proj, modules[shape].down_proj
        return modules[shape]

    def run(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        module = module_for(down.shape)
        object.__setattr__(module, "gate_up_proj", gate_up)
        object.__setattr__(module, "down_proj", down)
        return module(x, index, weights)

    return run


def built(make: Callable[..., Callable], T: int, k: int, gate_up: Tensor, down: Tensor) -> Layer:
    """Who has weights or a graph of its own, made at its first call: one that cannot run says so there."""
    made = cache(lambda: make(T, k, gate_up, down))
    return lambda x, index, weights, gate_up, down: made()(x, index, weights)


LAYERS: dict[str, Layer] = {
    "torch_grouped_mm": grouped_mm,
    "padded_bmm": padded_bmm,
    "sorted_loop": sorted_loop,
    "hf_grouped_mm": hugging_face("grouped_mm"),
    "hf_eager": hugging_face("eager"),
}
FEW_TOKENS: dict[str, Layer] = {
    "hf_batched_mm": hugging_face("batched_mm")
}  # copies the weights of every token

__all__ = [
    "FEW_TOKENS",
    "LAYERS",
    "Layer",
    "built",
    "dense",
    "grouped_mm",
    "hugging_face",
    "padded_bmm",
    "sorted_loop",
]
