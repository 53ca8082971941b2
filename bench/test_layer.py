"""The expert layer at shape A: 96 experts, one active, f32, against everyone else and the dense bound."""

import peers
import pytest
import torch

import sigma_kernels as sk

T, H, I, E = 2048, 1024, 512, 96


def inputs(load: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    if load == "balanced":
        index = (torch.arange(T) % E)[torch.randperm(T)]
    else:
        index = torch.multinomial(1 / torch.arange(1, E + 1) ** 1.2, T, replacement=True)
    floats = [
        torch.randn(T, H),
        torch.rand(T, 1),
        torch.randn(E, 2 * I, H) / H**0.5,
        torch.randn(E, H, I) / I**0.5,
    ]
    return floats, index[:, None]


PEERS = {
    "torch grouped_mm": peers.grouped_mm,
    "padded bmm": peers.padded_bmm,
    "sorted loop": peers.sorted_loop,
    "HF grouped_mm": peers.hugging_face("grouped_mm"),
    "HF eager": peers.hugging_face("eager"),
}
SLOW_BACKWARD = {"HF eager"}  # a full-size zero gradient for each expert: minutes at this shape


@pytest.mark.parametrize("load", ["balanced", "zipf"])
def test_forward(race, load):
    (x, weights, gate_up, down), index = inputs(load)
    want = sk.moe_experts(x, index, weights, gate_up, down)

    def call(peer):
        def run():
            with torch.no_grad():
                return peer(x, index, weights, gate_up, down)

        torch.testing.assert_close(run(), want, rtol=1e-3, atol=1e-4)
        return run

    race(
        f"layer/forward/f32/{load}",
        call(sk.moe_experts),
        **{"bound: dense": lambda: peers.dense(x, gate_up[0], down[0])},
        **{name: call(peer) for name, peer in PEERS.items()},
    )


@pytest.mark.parametrize("load", ["balanced", "zipf"])
@pytest.mark.parametrize("memory", ["fresh gradients", "kept gradients"])
def test_forward_backward(race, load, memory):
    """Fresh: the weight gradients are allocated anew each time.  Kept: they are added to memory that exists."""
    floats, index = inputs(load)
    grad_out = torch.randn(T, H)

    def call(function, tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]

        def run():
            if memory == "fresh gradients":
                for leaf in leaves:
                    leaf.grad = None
            function(*leaves).backward(grad_out)
            return leaves

        return run

    x, _, gate_up, down = floats
    want = call(lambda x, w, g, d: sk.moe_experts(x, index, w, g, d), floats)()
    runs = {}
    for name, peer in PEERS.items():
        if name in SLOW_BACKWARD:
            continue
        runs[name] = call(lambda x, w, g, d, peer=peer: peer(x, index, w, g, d), floats)
        for got, expected in zip(runs[name](), want, strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=1e-2, atol=1e-3)
    race(
        f"layer/forward+backward/f32/{load}/{memory}",
        call(lambda x, w, g, d: sk.moe_experts(x, index, w, g, d), floats),
        **{"bound: dense": call(peers.dense, [x, gate_up[0], down[0]])},
        **runs,
    )
