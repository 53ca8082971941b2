"""The same expert layer by everyone else.  x [T, H], index and weights [T, k], gate_up [E, 2I, H], down [E, H, I]."""

import types

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The bound: one expert for all tokens, the same FLOPs at k = 1."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def _sorted(index: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=E).cumsum(0)
    return order, order // index.shape[1], ends


def grouped_mm(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """torch's own grouped GEMM over sorted tokens."""
    order, token, ends = _sorted(index, gate_up.shape[0])
    offs = ends.int()
    gate, up = F.grouped_mm(x[token], gate_up.transpose(-2, -1), offs=offs).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * up, down.transpose(-2, -1), offs=offs) * weights.reshape(-1)[order, None]
    return torch.zeros_like(x).index_add(0, token, y)


def sorted_loop(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A GEMM per expert over sorted tokens; unbind, since indexing would make a full-size gradient per expert."""
    order, token, ends = _sorted(index, gate_up.shape[0])
    rows, sizes = x[token], ends.diff(prepend=ends.new_zeros(1)).tolist()
    experts = zip(rows.split(sizes), gate_up.unbind(0), down.unbind(0), strict=True)
    y = torch.cat([dense(part, g, d) for part, g, d in experts])
    return torch.zeros_like(x).index_add(0, token, y * weights.reshape(-1)[order, None])


def padded_bmm(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One batched GEMM, every expert padded to the busiest."""
    E = gate_up.shape[0]
    order, token, ends = _sorted(index, E)
    counts = ends.diff(prepend=ends.new_zeros(1))
    expert = index.reshape(-1)[order]
    place = torch.arange(len(order)) - (ends - counts)[expert]
    padded = x.new_zeros(E, int(counts.max()), x.shape[1]).index_put((expert, place), x[token])
    gate, up = torch.bmm(padded, gate_up.transpose(1, 2)).chunk(2, -1)
    y = torch.bmm(F.silu(gate) * up, down.transpose(1, 2))[expert, place]
    return torch.zeros_like(x).index_add(0, token, y * weights.reshape(-1)[order, None])


def hugging_face(name: str):
    """transformers' experts of that name: 'eager', 'grouped_mm' or 'batched_mm'."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    def run(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        E, H, I = down.shape
        config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=I, num_experts=E)
        config._experts_implementation = name
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        holder = types.SimpleNamespace(gate_up_proj=gate_up, down_proj=down)
        for parameter in ("gate_up_proj", "down_proj"):
            delattr(module, parameter)
            object.__setattr__(module, parameter, getattr(holder, parameter))
        return module(x, index, weights)

    return run
