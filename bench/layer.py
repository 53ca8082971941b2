"""The races of the whole layer: forward, and forward with backward, against everyone else and the bounds."""

import bounds
import oracle
import peers
import peers_gpu
import torch
from shapes import Shape, choices, layer_inputs, short, spread

import sigma_kernels as sk

TOO_SLOW = "not raced: autograd of an indexed weight is a full-size zero tensor for every expert"


def forward(race, device, group: str, dtype: torch.dtype, shape: Shape, load: str) -> None:
    x, weights, gate_up, down = layer_inputs(shape, dtype, device)
    index = choices(shape, load, device)
    rivals = peers.LAYERS | (peers_gpu.LAYERS | peers_gpu.FORWARD if device.type == "cuda" else {})
    want = oracle.layer(x, weights, gate_up, down, index)
    rows = x.repeat_interleave(shape.k, 0)
    touched = index.unique()
    read = [gate_up, down] if len(touched) == shape.E else [gate_up[touched], down[touched]]

    def call(layer):
        return torch.no_grad()(lambda: layer(x, index, weights, gate_up, down))

    race(
        f"{group}/forward/{short(dtype)}",
        call(sk.moe_experts),
        shape=shape,
        load=load,
        check=lambda who, got: oracle.assert_agrees(who, [got], want, shape.H),
        limits=slow_under_skew(index, shape, 2),
        flops=shape.flops,
        moved=sum(t.nbytes for t in read),
        index=index,
        bound_dense=torch.no_grad()(lambda: bounds.dense(rows, gate_up[0], down[0])),
        bound_read=bounds.read(*read),
        **{name: call(layer) for name, layer in rivals.items()},
    )


def forward_backward(
    race, device, group: str, dtype: torch.dtype, shape: Shape, memory: str, load: str
) -> None:
    """Fresh: gradients are allocated, filled and released in the timed call.  Kept: added to memory that exists."""
    index = choices(shape, load, device)
    leaves = [t.requires_grad_() for t in layer_inputs(shape, dtype, device)]
    grad_out = torch.randn(shape.T, shape.H).to(device, dtype)
    want = oracle.layer(*(t.detach() for t in leaves), index, grad_out)[1:]
    rivals = {name: layer for name, layer in peers.LAYERS.items() if name != "hf_eager"}
    missing = {"hf_eager": TOO_SLOW}
    if device.type == "cuda":
        rivals |= peers_gpu.LAYERS
        missing |= dict.fromkeys(peers_gpu.FORWARD, peers_gpu.FORWARD_ALONE)

    def call(function, leaves, grad_out):
        def run():
            function(*leaves).backward(grad_out)
            if memory == "fresh":
                for leaf in leaves:
                    leaf.grad = None

        return run

    def moe(layer):
        return call(lambda x, w, g, d: layer(x, index, w, g, d), leaves, grad_out)

    def check(who, _):
        """Of gradients made once more; where memory is kept, it is theirs from now on."""
        for leaf in leaves:
            leaf.grad = None
        sk.empty_cache()
        x, w, g, d = leaves
        (sk.moe_experts if who == "sigma" else rivals[who])(x, index, w, g, d).backward(grad_out)
        oracle.assert_agrees(who, [leaf.grad for leaf in leaves], want, shape.H)
        if memory == "fresh":
            for leaf in leaves:
                leaf.grad = None

    rows = leaves[0].detach().repeat_interleave(shape.k, 0)
    dense_leaves = [t.detach().clone().requires_grad_() for t in (rows, leaves[2][0], leaves[3][0])]
    dense_grad = grad_out.repeat_interleave(shape.k, 0)
    race(
        f"{group}/forward+backward/{short(dtype)}",
        moe(sk.moe_experts),
        shape=shape,
        load=load,
        memory=memory,
        check=check,
        limits={"padded_bmm": 2} | slow_under_skew(index, shape, 1),
        missing=missing,
        flops=3 * shape.flops,
        moved=3 * sum(t.nbytes for t in leaves[2:]),
        index=index,
        bound_dense=call(bounds.dense, dense_leaves, dense_grad),
        **({"beside_accumulate_grad": moe(accumulating)} if memory == "kept" else {}),
        **{name: moe(layer) for name, layer in rivals.items()},
    )


@sk.accumulate_grad()
def accumulating(*arguments: torch.Tensor) -> torch.Tensor:
    """Ours with weight gradients added where they are computed, around autograd."""
    return sk.moe_experts(*arguments)


def slow_under_skew(index: torch.Tensor, shape: Shape, rounds: int) -> dict[str, int]:
    """Who pads to the busiest expert is not waited for in every round where that one has many times its share."""
    rows = spread(index, shape.E)
    return {"padded_bmm": rounds} if rows["most"] > 3 * rows["mean"] else {}
