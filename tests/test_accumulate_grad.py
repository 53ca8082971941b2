"""sk.accumulate_grad: the same sums in the same memory, by the kernel instead of by autograd."""

import pytest
import torch
from support import assert_close, tolerance

import sigma_kernels as sk


def layer(dtype: torch.dtype = torch.float32) -> sk.nn.MoE:
    torch.manual_seed(1)
    return sk.nn.MoE(37, 21, 6, output_scale=6.0).to(dtype)


def backwards(moe: sk.nn.MoE, times: int, inside: bool) -> None:
    for seed in range(times):
        torch.manual_seed(seed)
        x = torch.randn(20, 37, dtype=moe.experts.down_proj.dtype)
        if inside:
            with sk.accumulate_grad():
                loss = moe(x).square().sum()
        else:
            loss = moe(x).square().sum()
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_autograd(dtype):
    """Defends: the first backward, which has no place yet, adding twice, an idle expert set to zero."""
    ours, theirs = layer(dtype), layer(dtype)
    for times in (1, 2):
        backwards(ours, times, inside=True)
        backwards(theirs, times, inside=False)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_close(a.grad, b.grad.double(), tolerance(dtype, 64))


def test_adds_in_place_and_only_inside():
    """Defends: a gradient that is made and added, which is what this is there to avoid."""
    moe = layer()
    backwards(moe, 1, inside=True)
    experts = (moe.experts.gate_up_proj, moe.experts.down_proj)
    seen = []
    for p in experts:
        p.register_hook(lambda g: None if g is None else seen.append(g.shape))  # what autograd brings
    places = [p.grad.data_ptr() for p in experts]
    backwards(moe, 1, inside=True)
    assert seen == []
    assert [p.grad.data_ptr() for p in experts] == places
    backwards(moe, 1, inside=False)
    assert len(seen) == 2


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj"])
def test_a_frozen_parameter(frozen):
    ours, theirs = layer(), layer()
    for moe in (ours, theirs):
        getattr(moe.experts, frozen).requires_grad_(False)
    backwards(ours, 2, inside=True)
    backwards(theirs, 2, inside=False)
    for a, b in zip(ours.experts.parameters(), theirs.experts.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert_close(a.grad, b.grad, tolerance(torch.float32, 64))


def test_bf16_rounds_each_sum_once():
    moe = layer(torch.bfloat16)
    backwards(moe, 1, inside=True)
    before = moe.experts.down_proj.grad.clone()
    fresh = layer(torch.bfloat16)
    backwards(fresh, 1, inside=False)
    backwards(moe, 1, inside=True)
    assert_close(moe.experts.down_proj.grad, before.double() + fresh.experts.down_proj.grad.double(), 2.0**-7)


def test_opcheck():
    routing = sk.route(torch.randn(5, 3))
    x, grad, gate_up, down = torch.randn(5, 6), torch.randn(5, 6), torch.randn(3, 8, 6), torch.randn(3, 6, 4)
    places = torch.randn_like(gate_up), torch.randn_like(down)
    saved = torch.randn(5, 8)
    torch.library.opcheck(
        torch.ops.sigma.moe_experts_backward_.default,
        (*places, grad, x, routing.weights, routing.offsets, routing.row_map, gate_up, down, saved, True),
    )
