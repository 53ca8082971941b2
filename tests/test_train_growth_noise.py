"""Noise of copied experts: where it is, how large, and that nothing but its key decides it."""

import pytest
import torch
from sigma_train.growth import grow, grow_experts
from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_noise import noisy
from sigma_train.growth_pieces import Growth


def test_noise_is_of_copies_alone_and_one_percent():
    """Defends: noise on originals, of another size or of all experts' std, the same draw for two, another again."""
    torch.manual_seed(0)
    weight = torch.randn(3, 400, 300) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    state = {"layers.0.mlp.experts.down_proj": weight, "layers.0.mlp.router.weight": torch.randn(3, 9)}
    grown = grow_experts(state, noise=0.01, seed=7)
    for name, x in state.items():
        assert torch.equal(grown[name][:3], x)
    copies = grown["layers.0.mlp.experts.down_proj"][3:] - weight
    shares = (copies.flatten(1).std(1) / weight.flatten(1).std(1)).tolist()
    assert shares == pytest.approx([0.01] * 3, rel=0.02)
    units = copies.flatten(1) / weight.flatten(1).std(1, keepdim=True)
    assert (torch.corrcoef(units) - torch.eye(3)).abs().max() < 0.02
    again, other, none = (
        grow_experts(state, noise=noise, seed=seed) for noise, seed in ((0.01, 7), (0.01, 8), (0.0, 7))
    )
    for name in state:
        assert torch.equal(again[name], grown[name])
        assert not torch.equal(other[name], grown[name])
        assert torch.equal(none[name][3:], none[name][:3])


def test_noise_does_not_depend_on_who_draws_it():
    """Defends: an expert's noise that depends on the others of its rank, or on fused and single matrices."""
    torch.manual_seed(0)
    gate_up, down = torch.randn(4, 6, 8), torch.randn(4, 8, 3)
    fused = {"layers.2.mlp.experts.gate_up_proj": gate_up, "layers.2.mlp.experts.down_proj": down}
    single = {"layers.0.x": down, "layers.1.x": down}
    for e in range(4):
        gate, up = gate_up[e].chunk(2)
        for part, x in (("gate", gate), ("up", up), ("down", down[e])):
            single[f"layers.2.mlp.experts.{e}.{part}_proj.weight"] = x
    whole = grow_experts({"layers.0.x": down, "layers.1.x": down} | fused)
    parts = grow_experts(single)
    for e in range(8):
        got = [parts[f"layers.2.mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")]
        assert torch.equal(torch.cat(got[:2]), whole["layers.2.mlp.experts.gate_up_proj"][e])
        assert torch.equal(got[2], whole["layers.2.mlp.experts.down_proj"][e])
    alone = noisy(down[3], 0.01, "0 2 7 of 8 down")
    assert torch.equal(alone, whole["layers.2.mlp.experts.down_proj"][7])


@pytest.mark.parametrize("in_turn", [False, True])
def test_gate_and_up_have_noise_of_their_own_wherever_they_lie(in_turn):
    """Defends: one std for both, in layouts [E, H, 2I] of Llama 4 and of gpt-oss, whose columns take turns."""
    torch.manual_seed(0)
    gate, up, down = torch.randn(1, 300, 200), 100 * torch.randn(1, 300, 200), torch.randn(1, 200, 300)
    both = torch.stack([gate, up], -1).flatten(-2) if in_turn else torch.cat([gate, up], -1)
    state = {"layers.0.mlp.experts.gate_up_proj": both, "layers.0.mlp.experts.down_proj": down}
    grown = grow(state, Growth(LayerGrowthPlan.none(1), 2, alternates=in_turn))
    noise = grown["layers.0.mlp.experts.gate_up_proj"][1] - both[0]
    halves = (noise[:, ::2], noise[:, 1::2]) if in_turn else noise.chunk(2, -1)
    assert [float(half.std()) for half in halves] == pytest.approx([0.01, 1.0], rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_noise_is_added_before_it_is_rounded(dtype):
    """Defends: noise drawn or added in bf16, in which it would come in a few sizes only, or be lost."""
    x = torch.randn(300, 300).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    got = noisy(x, 0.01, "key")
    assert got.dtype == dtype
    exact = x.to(wide) + (noisy(x.to(wide), 0.01, "key") - x.to(wide))
    assert torch.equal(got, exact.to(dtype))
    assert 0.009 < (got.float() - x.float()).std() < 0.0125
    assert torch.equal(noisy(torch.ones(1), 0.5, "key"), torch.ones(1))  # one number has no std


@pytest.mark.parametrize("interleave", [False, True])
def test_grown_twice_no_two_experts_are_the_same(interleave):
    """Defends: a second growth by the same seed that gives copies the noise of the first, and so makes twins."""
    state = {"layers.0.mlp.experts.down_proj": torch.randn(3, 5, 4)}
    for _ in range(2):
        state = grow_experts(state, noise=0.01, interleave=interleave)
    flat = state["layers.0.mlp.experts.down_proj"].flatten(1)
    assert flat.unique(dim=0).shape[0] == 12


def test_interleaved_copies_stand_beside_their_expert():
    x = torch.arange(6.0).view(3, 2)
    state = {
        "layers.0.mlp.router.weight": x,
        "layers.0.mlp.experts.1.w2.weight": x,
        "layers.0.mlp.experts.2.w2.weight": x,
    }
    state |= {"layers.0.mlp.experts.0.w2.weight": x + 9}
    grown = grow_experts(state, 2, 0.0, interleave=True)
    assert torch.equal(grown["layers.0.mlp.router.weight"], x.repeat_interleave(2, 0))
    of_first = [torch.equal(grown[f"layers.0.mlp.experts.{e}.w2.weight"], x + 9) for e in range(6)]
    assert of_first == [True, True, False, False, False, False]
