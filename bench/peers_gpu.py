"""The same layer by libraries that run on a GPU alone, on weights as they lie in Hugging Face: none wants a copy.

None is a dependency; one that is not installed is a line of the page.
"""

import inspect
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from peers import Layer, combined, in_expert_order
from race import CannotRun
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FORWARD_ALONE = "it has no backward"


def module(name: str) -> Any:
    try:
        return import_module(name)
    except Exception as error:  # an extension built for another torch fails in its own ways
        text = " ".join(str(error).split())
        raise CannotRun(f"not importable: {type(error).__name__}: {text}") from error


def takes(who: str, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...], why: str) -> None:
    if dtype not in dtypes:
        raise CannotRun(f"{who} {why}")


def gmm_layer(gmm: Any, rows: Tensor, sizes: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = gmm(rows, gate_up, sizes, trans_b=True).chunk(2, -1)
    return gmm(F.silu(gate) * up, down, sizes, trans_b=True)


def grouped_gemm(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sorted as for torch's grouped_mm; sizes go to the host, since only a build with CUTLASS takes them on a GPU."""
    takes("grouped_gemm", down.dtype, HALF[:1], "takes bf16 alone")
    slot, token, ends = in_expert_order(index, gate_up.shape[0])
    sizes = ends.diff(prepend=ends.new_zeros(1)).cpu()
    y = gmm_layer(module("grouped_gemm.ops").gmm, x[token], sizes, gate_up, down)
    return combined(y, weights, slot, token, x.shape[0])


def megablocks(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Its grouped path, which its authors advise for Hopper, but with gate and up in one product where it has two."""
    takes("MegaBlocks", down.dtype, HALF[:1], "multiplies by grouped_gemm, which takes bf16 alone")
    ops, gmm = module("megablocks.ops"), module("grouped_gemm.ops").gmm
    E, k = gate_up.shape[0], index.shape[1]
    flat = index.reshape(-1).int()
    with torch.no_grad():
        expert, slot = ops.sort(flat, max(1, (E - 1).bit_length()))
        counts = ops.histogram(flat, E)
        ends = ops.inclusive_cumsum(counts, 0).view(-1)  # [E], also where E = 1
    rows = ops.gather(x, slot, expert, ends, k)
    y = gmm_layer(gmm, rows, counts.cpu().long(), gate_up, down)
    return ops.scatter(y, slot, expert, weights.reshape(-1), ends, k)


def sonicmoe(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Its entry for a choice made elsewhere: slots by token, weights [2I, H, E] and [H, I, E] as views."""
    takes("SonicMoE", down.dtype, HALF, "has no f32 kernels")
    run = module("sonicmoe.functional").moe_general_routing_inputs
    if "concat_layout" not in inspect.signature(run).parameters:
        raise CannotRun("this sonicmoe wants gate and up rows to alternate (no concat_layout)")
    activation = module("sonicmoe.enums").ActivationType.SWIGLU
    T, k = index.shape
    token = torch.arange(T, dtype=torch.int32, device=x.device).repeat_interleave(k)
    w1, w2 = (w.permute(1, 2, 0) for w in (gate_up, down))
    out, _ = run(
        x, weights.reshape(-1).float(), token, index.reshape(-1).int(), w1, None, w2, None, gate_up.shape[0], None,
        activation, is_inference_mode_enabled=not torch.is_grad_enabled(), concat_layout=True,
    )  # fmt: skip
    return out


def liger(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    takes("Liger", down.dtype, HALF, "multiplies f32 as TF32, too far from f64 for the check")
    return module("liger_kernel.ops").LigerFusedMoEFunction.apply(x, gate_up, down, index.int(), weights)


def vllm_fused_experts(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    takes("vLLM", down.dtype, HALF, "multiplies f32 as TF32, too far from f64 for the check")
    run = module("vllm.model_executor.layers.fused_moe").fused_experts
    return run(x, gate_up, down, topk_weights=weights.float(), topk_ids=index.int())


LAYERS: dict[str, Layer] = {
    "grouped_gemm": grouped_gemm,
    "megablocks": megablocks,
    "sonicmoe": sonicmoe,
    "liger": liger,
}
FORWARD: dict[str, Layer] = {"vllm_fused_experts": vllm_fused_experts}


def gmm_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """weight is [E, K, N] or a transposed view of that shape."""
    takes("grouped_gemm", x.dtype, HALF[:1], "takes bf16 alone")
    gmm, sizes = module("grouped_gemm.ops").gmm, offsets.diff().cpu().long()
    if weight.is_contiguous():
        return gmm(x, weight, sizes)
    return gmm(x, weight.transpose(1, 2), sizes, trans_b=True)


def gmm_outer(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    takes("grouped_gemm", a.dtype, HALF[:1], "takes bf16 alone")
    sizes = offsets.diff().cpu().long()
    return module("grouped_gemm.backend").gmm(a, b, sizes, trans_a=True, c=out)
