"""The libraries of bench/peers_gpu.py as their sources have them: what they demand is asserted, the rest is torch."""

from enum import Enum
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F


def experts(x, index, weights, gate_up, down):
    """The layer in f32, expert by expert, differentiable."""
    out = torch.zeros(x.shape, device=x.device)
    for e in range(down.shape[0]):
        token, slot = torch.where(index == e)
        gate, up = F.linear(x[token].float(), gate_up[e].float()).chunk(2, -1)
        y = F.linear(F.silu(gate) * up, down[e].float())
        out = out.index_add(0, token, y * weights[token, slot, None].float())
    return out.to(x.dtype)


def backend_gmm(a, b, batch_sizes, trans_a=False, trans_b=False, c=None):
    assert not (trans_a and trans_b)
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.dim() == 1
    assert batch_sizes.device.type == "cpu"
    assert a.dtype == b.dtype == torch.bfloat16
    assert a.is_contiguous()
    assert b.is_contiguous()
    assert (a.dim(), b.dim()) == (2, 2 if trans_a else 3)
    sizes = batch_sizes.tolist()
    if trans_a:
        made = torch.stack([p.t() @ q for p, q in zip(a.split(sizes), b.split(sizes), strict=True)])
    else:
        turned = b.transpose(1, 2) if trans_b else b
        made = torch.cat([p @ w for p, w in zip(a.split(sizes), turned, strict=True)])
    return made if c is None else c.copy_(made)


class Gmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, sizes, trans_b):
        ctx.save_for_backward(a, b, sizes)
        ctx.trans_b = trans_b
        return backend_gmm(a, b, sizes, trans_b=trans_b)

    @staticmethod
    def backward(ctx, grad):
        a, b, sizes = ctx.saved_tensors
        grad = grad.contiguous()
        left, right = (grad, a) if ctx.trans_b else (a, grad)
        of_a = backend_gmm(grad, b, sizes, trans_b=not ctx.trans_b)
        return of_a, backend_gmm(left, right, sizes, trans_a=True), None, None


def sort(x, end_bit=None):
    assert x.dtype == torch.int32
    assert x.dim() == 1
    assert int(x.max()) < 2**end_bit
    values, order = x.sort(stable=True)
    return values, order.int()


def inclusive_cumsum(x, dim):
    assert x.dtype == torch.int32
    return x.cumsum(dim).int().squeeze()


def check_bins(rows, indices, bin_ids, bins):
    assert indices.shape == bin_ids.shape == (rows,)
    assert {t.dtype for t in (indices, bin_ids, bins)} == {torch.int32}
    assert bins.dim() == 1


def gather(x, indices, bin_ids, bins, top_k):
    check_bins(x.shape[0] * top_k, indices, bin_ids, bins)
    return x[indices.long() // top_k]


def scatter(x, indices, bin_ids, weights, bins, top_k):
    check_bins(x.shape[0], indices, bin_ids, bins)
    assert weights.shape == (x.shape[0],)
    slot = indices.long()
    out = torch.zeros_like(x).index_copy(0, slot, x * weights[slot, None])
    return out.view(-1, top_k, x.shape[1]).sum(1)


class ActivationType(Enum):
    SWIGLU = "swiglu"


def moe_general_routing_inputs(
    x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type,
    is_inference_mode_enabled=False, concat_layout=False,
):  # fmt: skip
    I2, H, _ = w1.shape
    assert b1 is b2 is None
    assert w1.shape == (I2, H, E)
    assert w2.shape == (H, I2 // 2, E)
    for w in (w1, w2):
        assert w.stride(2) > w.stride(0) > w.stride(1) == 1
    assert x.dtype == w1.dtype == w2.dtype == torch.bfloat16
    assert router_scores.dtype == torch.float32
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert (token_indices.diff() >= 0).all()
    assert activation_type is ActivationType.SWIGLU
    assert is_inference_mode_enabled != torch.is_grad_enabled()
    assert concat_layout, "gate and up rows would be taken to alternate"
    k = len(token_indices) // x.shape[0]
    index, scores = expert_indices.view(-1, k), router_scores.view(-1, k)
    return experts(x, index, scores, w1.permute(2, 0, 1), w2.permute(2, 0, 1)), None


class LigerFusedMoEFunction:
    @staticmethod
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        assert top_k_index.dtype == torch.int32
        assert top_k_index.shape == top_k_weights.shape
        return experts(x, top_k_index, top_k_weights, gate_up_proj, down_proj)


def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, inplace=False):
    assert not torch.is_grad_enabled()
    assert topk_weights.dtype == torch.float32
    assert topk_ids.dtype == torch.int32
    assert hidden_states.shape[1] == w1.shape[2] == w2.shape[1]
    assert w1.shape[1] == 2 * w2.shape[2]
    assert all(t.is_contiguous() for t in (hidden_states, w1, w2))
    return experts(hidden_states, topk_ids, topk_weights, w1, w2)


def histogram(x, max_val):
    return torch.bincount(x, minlength=max_val).int()


MODULES = {
    "grouped_gemm.ops": {"gmm": lambda a, b, sizes, trans_b=False: Gmm.apply(a, b, sizes, trans_b)},
    "grouped_gemm.backend": {"gmm": backend_gmm},
    "megablocks.ops": {
        "sort": sort,
        "histogram": histogram,
        "inclusive_cumsum": inclusive_cumsum,
        "gather": gather,
        "scatter": scatter,
    },
    "sonicmoe.functional": {"moe_general_routing_inputs": moe_general_routing_inputs},
    "sonicmoe.enums": {"ActivationType": ActivationType},
    "liger_kernel.ops": {"LigerFusedMoEFunction": LigerFusedMoEFunction},
    "vllm.model_executor.layers.fused_moe": {"fused_experts": fused_experts},
}


def modules() -> dict[str, ModuleType | SimpleNamespace]:
    """Entries of sys.modules, with packages above them."""
    out: dict[str, ModuleType | SimpleNamespace] = {}
    for name, content in MODULES.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            out.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
        out[name] = SimpleNamespace(**content)
    return out
