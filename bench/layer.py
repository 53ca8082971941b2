"""The races of the whole layer: forward, and forward with backward, against everyone else and the bounds."""

from collections.abc import Sequence

import bounds
import oracle
import peer_kt
import peers
import peers_gpu
import torch
import torch.nn.functional as F
from race import OURS
from shapes import Shape, choices, layer_inputs, short, spread

import sigma_kernels as sk

NOTHING_KEPT, KT = "sigma_nothing_kept", "kt_kernel"
TOO_SLOW = "not raced: autograd of an indexed weight is a full-size zero tensor for every expert"


def forward(race, device, group: str, dtype: torch.dtype, shape: Shape, load: str) -> None:
    x, weights, gate_up, down = layer_inputs(shape, dtype, device)
    index = choices(shape, load, device)
    rivals = peers.LAYERS | (peers_gpu.LAYERS | peers_gpu.FORWARD if device.type == "cuda" else {})
    if has_kt(dtype, device):
        rivals[KT] = peers.built(peer_kt.Layer, shape.T, shape.k, gate_up, down)
    want = oracle.layer(x, weights, gate_up, down, index)
    rows = x.repeat_interleave(shape.k, 0)
    read = of_touched(index, gate_up, down)

    def call(layer):
        return torch.no_grad()(lambda: layer(x, index, weights, gate_up, down))

    def dense(dtype):
        arguments = [t.to(dtype) for t in (rows, gate_up[0], down[0])]
        return torch.no_grad()(lambda: bounds.dense(*arguments))

    race(
        f"{group}/forward/{short(dtype)}",
        call(sk.moe_experts),
        shape=shape,
        load=load,
        check=lambda who, got: oracle.assert_agrees(who, [got], want, shape.H),
        limits=slow_under_skew(index, shape, 2),
        apart=[KT],
        flops=shape.flops,
        moved=sum(t.nbytes for t in read),
        index=index,
        **bounds.of_dtypes("dense", dense, dtype),
        bound_read=bounds.read(*read),
        **{name: call(layer) for name, layer in (variants(dtype) | rivals).items()},
    )


def forward_backward(
    race, device, group: str, dtype: torch.dtype, shape: Shape, memory: str, load: str
) -> None:
    """Fresh: gradients are allocated, filled and released in the timed call.  Kept: added to memory that exists.

    Released, ours stay with the library and the next call gets them; NOTHING_KEPT gives them back to the system before
    its backward, and touches each page for the first time, as peers do.
    """
    index = choices(shape, load, device)
    leaves = [t.requires_grad_() for t in layer_inputs(shape, dtype, device)]
    grad_out = torch.randn(shape.T, shape.H).to(device, dtype)
    want = oracle.layer(*(t.detach() for t in leaves), index, grad_out)[1:]
    rivals = {name: layer for name, layer in peers.LAYERS.items() if name != "hf_eager"}
    missing = {"hf_eager": TOO_SLOW}
    if device.type == "cuda":
        rivals |= peers_gpu.LAYERS
        missing |= dict.fromkeys(peers_gpu.FORWARD, peers_gpu.FORWARD_ALONE)

    layers = {OURS: sk.moe_experts} | variants(dtype) | rivals
    if memory == "fresh" and device.type == "cpu":
        layers[NOTHING_KEPT] = sk.moe_experts

    apart = {}
    if has_kt(dtype, device):
        apart[KT] = peer_kt.Training(leaves, index, grad_out, releases=memory == "fresh")

    def call(function, leaves, grad_out, before_backward=lambda: None):
        def run():
            out = function(*leaves)
            before_backward()
            out.backward(grad_out)
            if memory == "fresh":
                forget(leaves)

        return run

    def moe(layer, before_backward=lambda: None):
        return call(lambda x, w, g, d: layer(x, index, w, g, d), leaves, grad_out, before_backward)

    def check(who, _):
        """Of gradients made once more; where memory is kept, it is theirs from now on."""
        if who in apart:
            return oracle.assert_agrees(who, apart[who].gradients(), want, shape.H)
        forget(leaves)
        sk.empty_cache()
        x, w, g, d = leaves
        layers[who](x, index, w, g, d).backward(grad_out)
        oracle.assert_agrees(who, [leaf.grad for leaf in leaves], want, shape.H)
        if memory == "fresh":
            forget(leaves)

    def dense(dtype):
        rows = leaves[0].detach().repeat_interleave(shape.k, 0)
        dense_leaves = [
            t.detach().to(dtype, copy=True).requires_grad_() for t in (rows, leaves[2][0], leaves[3][0])
        ]
        return call(bounds.dense, dense_leaves, grad_out.repeat_interleave(shape.k, 0).to(dtype))

    experts = [t.detach() for t in leaves[2:]]
    read, added = of_touched(index, *experts), memory == "kept"
    written = read if added else experts  # what no row reached stays as it is, or is zero
    race(
        f"{group}/forward+backward/{short(dtype)}",
        moe(sk.moe_experts),
        shape=shape,
        load=load,
        memory=memory,
        check=check,
        limits={"padded_bmm": 2} | slow_under_skew(index, shape, 1),
        apart=apart,
        missing=missing,
        flops=3 * shape.flops,
        moved=sum(2 * t.nbytes for t in read) + (1 + added) * sum(t.nbytes for t in written),
        index=index,
        **bounds.of_dtypes("dense", dense, dtype),
        bound_read_write=bounds.read_write(read, written, added),
        **({"beside_accumulate_grad": moe(accumulating)} if added else {}),
        **{
            name: moe(layer, *([sk.empty_cache] if name == NOTHING_KEPT else []))
            for name, layer in layers.items()
            if name != OURS
        },
        **apart,
    )


def has_kt(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether KTransformers' experts might take part: they are of bf16, on a CPU."""
    return dtype == torch.bfloat16 and device.type == "cpu"


def forget(leaves: Sequence[torch.Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def of_touched(index: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
    """The weights of experts that have rows: the others need not be read."""
    touched = index.unique()
    return [w if len(touched) == len(w) else w[touched] for w in weights]


def variants(dtype: torch.dtype) -> dict[str, peers.Layer]:
    return {"sigma_permuted": permuted} if dtype == torch.float32 else {}


def permuted(
    x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Ours as separate operations: rows are copied into expert order, which sk.moe_experts gathers within its GEMM."""
    routing = sk.group_by_expert(index, gate_up.shape[0], weights)
    gate, up = sk.grouped_gemm(sk.permute(x, routing), gate_up, routing.offsets).chunk(2, -1)
    return sk.unpermute(sk.grouped_gemm(F.silu(gate) * up, down, routing.offsets), routing)


@sk.accumulate_grad()
def accumulating(*arguments: torch.Tensor) -> torch.Tensor:
    """Ours with weight gradients added where they are computed, around autograd."""
    return sk.moe_experts(*arguments)


def slow_under_skew(index: torch.Tensor, shape: Shape, rounds: int) -> dict[str, int]:
    """Who pads to the busiest expert is not waited for in every round where that one has many times its share."""
    rows = spread(index, shape.E)
    return {"padded_bmm": rounds} if rows["most"] > 3 * rows["mean"] else {}
