"""The expert layer: forward, and forward with backward, against everyone else, one dense layer and one stream."""

import bounds
import oracle
import peers
import pytest
import shapes
import torch
from shapes import DECODE, DTYPES, LAYERS, LOADS, short

import sigma_kernels as sk

TRAINED = [shape for shape in LAYERS if shape is not DECODE]


def rivals(shape):
    return peers.LAYERS | (peers.FEW_TOKENS if shape.T <= 16 else {})


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("shape", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_forward(race, dtype, shape, load):
    x, weights, gate_up, down = shapes.layer_inputs(shape, dtype)
    index = shapes.choices(shape, load)
    want = oracle.layer(x, weights, gate_up, down, index)
    rows = x.repeat_interleave(shape.k, 0)
    touched = index.unique()
    read = [gate_up, down] if len(touched) == shape.E else [gate_up[touched], down[touched]]

    def call(layer):
        return torch.no_grad()(lambda: layer(x, index, weights, gate_up, down))

    race(
        f"layer/forward/{short(dtype)}",
        call(sk.moe_experts),
        shape=shape,
        load=load,
        check=lambda who, got: oracle.assert_agrees(who, [got], want, shape.H),
        limits={"padded_bmm": 2} if load == "zipf" else {},
        flops=shape.flops,
        moved=sum(t.nbytes for t in read),
        bound_dense=torch.no_grad()(lambda: bounds.dense(rows, gate_up[0], down[0])),
        bound_read=bounds.read(*read),
        **{name: call(layer) for name, layer in rivals(shape).items()},
    )


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("memory", ["fresh", "kept"])
@pytest.mark.parametrize("shape", TRAINED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_forward_backward(race, dtype, shape, memory, load):
    """Fresh: gradients are allocated, filled and released in the timed call.  Kept: added to memory that exists."""
    index = shapes.choices(shape, load)
    leaves = [t.requires_grad_() for t in shapes.layer_inputs(shape, dtype)]
    grad_out = torch.randn(shape.T, shape.H).to(dtype)
    want = oracle.layer(*(t.detach() for t in leaves), index, grad_out)[1:]

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
        layer = sk.moe_experts if who == "sigma" else rivals(shape)[who]
        kept = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        x, w, g, d = leaves
        layer(x, index, w, g, d).backward(grad_out)
        oracle.assert_agrees(who, [leaf.grad for leaf in leaves], want, shape.H)
        for leaf, grad in zip(leaves, kept, strict=True):
            leaf.grad = grad

    rows = leaves[0].detach().repeat_interleave(shape.k, 0)
    dense_leaves = [t.detach().clone().requires_grad_() for t in (rows, leaves[2][0], leaves[3][0])]
    dense_grad = grad_out.repeat_interleave(shape.k, 0)
    slow = {"hf_eager"}  # autograd of an indexed weight is a full-size zero tensor for every expert
    names = [n for n in rivals(shape) if n not in slow]
    race(
        f"layer/forward+backward/{short(dtype)}",
        moe(sk.moe_experts),
        shape=shape,
        load=load,
        memory=memory,
        check=check,
        limits={"padded_bmm": 2 if load == "balanced" else 1},
        flops=3 * shape.flops,
        moved=3 * sum(t.nbytes for t in leaves[2:]),
        bound_dense=call(bounds.dense, dense_leaves, dense_grad),
        **{name: moe(rivals(shape)[name]) for name in names},
    )
