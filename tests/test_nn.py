"""Modules and balance losses."""

import copy
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from support import balance_rank

import sigma_kernels as sk
from sigma_kernels import nn


def test_moe_equals_its_equation(backend):
    moe = nn.MoE(24, 20, 6, top_k=2, score="sigmoid", output_scale=1.5)
    x = torch.randn(3, 5, 24)
    out = moe(x)
    routing = moe.last_routing
    want = 1.5 * sum(
        routing.weights[:, j, None]
        * torch.stack([expert(moe, e, v) for e, v in zip(routing.indices[:, j], x.view(-1, 24), strict=True)])
        for j in range(2)
    )
    torch.testing.assert_close(out.view(-1, 24), want, rtol=1e-4, atol=1e-5)


def expert(moe: nn.MoE, e: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = (moe.experts.gate_up_proj[e] @ x).chunk(2)
    return moe.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)


def test_top_k_of_one_call():
    moe = nn.MoE(8, 8, 5, top_k=1)
    moe(torch.randn(4, 8), top_k=3)
    assert moe.last_routing.indices.shape == (4, 3)


def test_normalised_top_1_warns():
    with pytest.warns(UserWarning, match="router gets no gradient"):
        nn.MoE(8, 8, 5, normalize=True)


def test_load_balancing_loss_by_hand():
    """Defends: the factor E, f normalised by k, no gradient through the counts."""
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]]))
    counts = torch.tensor([3, 1])
    assert nn.load_balancing_loss(logits, counts).item() == pytest.approx(1.15)
    assert nn.load_balancing_loss(logits, 7 * counts).item() == pytest.approx(1.15)
    flat = torch.zeros(5, 8)
    assert nn.load_balancing_loss(flat, torch.tensor([5, 0, 0, 0, 0, 0, 0, 0])).item() == pytest.approx(1.0)
    sharp = torch.full((5, 8), -100.0)
    sharp[:, 2] = 100
    assert nn.load_balancing_loss(sharp, torch.tensor([0, 0, 5, 0, 0, 0, 0, 0])).item() == pytest.approx(8.0)
    assert nn.load_balancing_loss(torch.zeros(0, 4), torch.zeros(4)).item() == 0
    assert nn.load_balancing_loss(flat, torch.ones(8), score="sigmoid").item() == pytest.approx(1.0)


def test_z_loss_by_hand():
    assert nn.router_z_loss(torch.tensor([[2.0, 1.0, 0.0, -1.0]])).item() == pytest.approx(5.9545257650)


def test_bias_moves_against_the_load():
    router = nn.TopKRouter(4, 3, use_bias=True)
    nn.update_expert_bias(router, torch.tensor([4, 1, 1]), rate=0.5)
    assert router.expert_bias.tolist() == [-0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="make it with use_bias=True"):
        nn.update_expert_bias(nn.TopKRouter(4, 3), torch.ones(3))


def test_global_batch_loss_of_two_ranks_is_that_of_the_whole(tmp_path):
    """Defends: f of the global batch, p of the rank: averaged gradients equal one process on all tokens."""
    logits = torch.randn(8, 5)
    whole = logits.clone().requires_grad_()
    nn.load_balancing_loss(whole, sk.route(whole).counts).backward()
    mp.spawn(balance_rank, (str(tmp_path / "store"), logits, whole.grad.tolist()), nprocs=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_layer_in_its_own_dtype(dtype):
    """Defends: logits that autocast rounds to bf16; activations in bf16 beside weights in f32."""
    moe = nn.MoE(24, 20, 6)
    x = torch.randn(7, 24).to(dtype)
    want = moe(x.float()).to(dtype)
    routing, _ = moe.router(x)
    chosen = routing.indices, routing.weights
    want_of_experts = moe.experts(x.float(), *chosen).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = moe(x)
        got_of_experts = moe.experts(x, *chosen)
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert torch.equal(got_of_experts, want_of_experts)


def test_a_layer_that_has_run_is_copied_and_pickled():
    moe = nn.MoE(24, 20, 6)
    x = torch.randn(7, 24)
    out = moe(x)
    for twin in copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)):
        assert twin.last_routing is None
        assert torch.equal(twin(x), out)
    assert moe.last_routing is not None


@pytest.mark.parametrize("shape", [(7, 23), (24, 7), ()])
def test_a_wrong_width_is_named(shape):
    with pytest.raises(ValueError, match=r"MoE: x must be \[\.\.\., 24\], found \["):
        nn.MoE(24, 20, 6)(torch.zeros(shape))
