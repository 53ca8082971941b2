"""Modules and balance losses."""

import copy
import pickle
import re

import forked
import numpy as np
import pytest
import torch
from support import assert_close, balance_rank, tolerance

import sigma_kernels as sk
from sigma_kernels import nn, reference


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


NO_SIZES = {
    "2.0": 2.0,
    "'2'": "2",
    "True": True,
    "np.float64(2.0)": np.float64(2),
    "array(2.)": np.array(2.0),
    "a Tensor [] of torch.float32": torch.tensor(2.0),
    "a Tensor [] of torch.bool": torch.tensor(True),
    "a Tensor [2] of torch.int64": torch.tensor([2, 2]),
}


@pytest.mark.parametrize("found, size", NO_SIZES.items(), ids=NO_SIZES)
def test_a_size_that_is_no_integer_is_refused(found, size):
    """Defends: tensors and arrays, which have an __index__ whatever they hold."""
    calls = {
        "group_by_expert: num_experts": lambda: sk.group_by_expert(torch.zeros(2, 1).int(), size),
        "Experts: intermediate_size": lambda: nn.Experts(4, size, 2),
        "TopKRouter: hidden_size": lambda: nn.TopKRouter(size, 4),
    }
    for who, call in calls.items():
        with pytest.raises(TypeError, match=re.escape(f"{who} must be an integer, found {found}") + "$"):
            call()


@pytest.mark.parametrize("size", [np.int64(2), np.array(2), torch.tensor(2)], ids=repr)
def test_whatever_holds_one_integer_is_a_size(size):
    assert sk.group_by_expert(torch.zeros(2, 1).int(), size).counts.tolist() == [2, 0]


def test_a_size_is_looked_at_in_a_compiled_call():
    """Defends: what torch.compile cannot follow of a size that may change."""
    compiled = torch.compile(
        lambda indices, E: sk.group_by_expert(indices, E).counts,
        backend="eager",
        fullgraph=True,
        dynamic=True,
    )
    for size in (4, 5):
        assert compiled(torch.zeros(2, 1).int(), size).tolist() == [2] + [0] * (size - 1)


def test_top_k_of_one_call():
    moe = nn.MoE(8, 8, 5, top_k=1)
    moe(torch.randn(4, 8), top_k=3)
    assert moe.last_routing.indices.shape == (4, 3)


def test_normalised_top_1_warns():
    with pytest.warns(UserWarning, match="router gets no gradient"):
        nn.MoE(8, 8, 5, normalize=True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_task_reaches_the_router_of_one_expert_only_without_normalize(score):
    """Defends: training that goes on with a router that learns nothing, where k falls to 1 in a call."""
    moe = nn.MoE(16, 8, 96, top_k=8, score=score, normalize=True)
    x = torch.randn(64, 16)

    def gradient(top_k: int) -> float:
        moe.zero_grad()
        moe(x, top_k=top_k).square().sum().backward()
        return moe.router.weight.grad.abs().max().item()

    with pytest.warns(UserWarning, match="router gets no gradient"):
        assert gradient(1) < 1e-6  # rounding of the sum of one
    assert gradient(2) > 1e-4
    with torch.no_grad():
        moe(x, top_k=1)
    moe.router.normalize = False
    assert gradient(1) > 1e-5


def test_weights_at_each_k_of_one_router():
    """Those of fewer are the first of those of more; their sum is 1 at each k, or the mass of the chosen."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    by_hand = {1: [1.0], 2: [0.625, 0.375], 3: [10 / 19, 6 / 19, 3 / 19], 4: [0.5, 0.3, 0.15, 0.05]}
    for k, want in by_hand.items():
        routing = sk.route(logits, k, normalize=True)
        assert routing.weights.flatten().tolist() == pytest.approx(want)
        assert routing.indices.flatten().tolist() == list(range(k))
        assert sk.route(logits, k).weights.flatten().tolist() == pytest.approx(by_hand[4][:k])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_choices_of_fewer_are_the_first_of_more(score):
    """Nesting, on which a model of several k rests: the order is each token's own, at every k."""
    logits = torch.randn(50, 12)
    most = sk.route(logits, 12, score=score).indices
    for k in range(1, 12):
        assert torch.equal(sk.route(logits, k, score=score).indices, most[:, :k])


@pytest.mark.parametrize("k", range(1, 9))
def test_a_flat_router_has_a_balance_loss_of_one_at_every_k(k):
    """Defends: f that is divided by T and not by T k, with which the loss is k."""
    logits = torch.zeros(16, 8)
    counts = sk.route(logits, k).counts
    assert nn.load_balancing_loss(logits, counts).item() == pytest.approx(1.0)
    assert 8 * (counts / 16 @ logits.softmax(-1).mean(0)).item() == pytest.approx(k)


def test_one_normalised_expert_gives_the_router_no_gradient_in_f64():
    """g / g leaves nothing but rounding; two experts do."""
    moe = nn.MoE(16, 8, 12, top_k=4, normalize=True).double()
    x = torch.randn(40, 16, dtype=torch.float64)
    with pytest.warns(UserWarning, match="router gets no gradient"):
        moe(x, top_k=1).square().sum().backward()
    assert moe.router.weight.grad.abs().max() <= 1e-15
    moe(x, top_k=2).square().sum().backward()
    assert moe.router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("k", range(1, 7))
def test_the_layer_is_the_reference_at_every_k(k):
    """And experts that no token goes to have a gradient of zero."""
    moe, x = nn.MoE(12, 8, 6, top_k=6, normalize=True), torch.randn(3, 12)
    moe.router.normalize = k > 1  # which would warn
    y = moe(x, top_k=k)
    routing = moe.last_routing
    want = reference.moe_experts(
        x.double(), routing.indices, routing.weights.double(), *(p.double() for p in moe.experts.parameters())
    )
    assert_close(y, want, tolerance(torch.float32, depth=12))
    y.square().sum().backward()
    for weight in moe.experts.parameters():
        per_expert = weight.grad.flatten(1).abs().amax(1)
        assert torch.equal(per_expert == 0, routing.counts == 0)


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


@pytest.mark.parametrize("shift", [-200.0, 0.0, 50.0])
def test_load_balancing_loss_of_sigmoids_of_any_size(shift):
    """Defends: 0 / 0 where every sigmoid underflows."""
    logits = (torch.randn(20, 6) + shift).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    counts = torch.tensor([9, 1, 4, 0, 3, 3])
    loss = nn.load_balancing_loss(logits, counts, score="sigmoid")
    p = wide.sigmoid() / wide.sigmoid().sum(-1, keepdim=True)
    want = 6 * (counts / 20 * p.mean(0)).sum()
    torch.testing.assert_close(loss.double(), want)
    loss.backward()
    want.backward()
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)


def test_z_loss_by_hand():
    """And where every expert is there twice: lse + ln 2."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    for x, lse in (logits, 2.4401896986), (logits.repeat(1, 2), 3.1333368791):
        assert nn.router_z_loss(x).sqrt().item() == pytest.approx(lse)


def test_bias_moves_against_the_load():
    router = nn.TopKRouter(4, 3, use_bias=True)
    nn.update_expert_bias(router, torch.tensor([4, 1, 1]), rate=0.5)
    assert router.expert_bias.tolist() == [-0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="make it with use_bias=True"):
        nn.update_expert_bias(nn.TopKRouter(4, 3), torch.ones(3))


@pytest.mark.parametrize(
    "cast", [nn.MoE.bfloat16, nn.MoE.half, nn.MoE.double, lambda m: m.to(torch.bfloat16)]
)
def test_the_bias_stays_f32(cast):
    """Defends: steps of 1e-3 that stop at 0.5, where bf16 has no number in between; a bias rounded on its way."""
    moe, plain = nn.MoE(8, 8, 2, use_bias=True), nn.MoE(8, 8, 2, use_bias=True)
    counts = torch.tensor([1, 3])
    for step in range(2000):
        if step == 1:
            assert cast(moe).router.weight.dtype != torch.float32
        for layer in (moe, plain):
            nn.update_expert_bias(layer.router, counts)
    assert torch.equal(moe.router.expert_bias, plain.router.expert_bias)
    assert plain.router.expert_bias[0] == pytest.approx(2.0, rel=1e-4)
    twin = cast(nn.MoE(8, 8, 2, use_bias=True))
    twin.load_state_dict(moe.state_dict())
    assert torch.equal(twin.router.expert_bias, moe.router.expert_bias)
    assert twin.to("meta").router.expert_bias.device.type == "meta"


def test_a_layer_on_meta_has_shapes():
    """Defends: autocast, which meta does not know."""
    moe = nn.MoE(24, 20, 6, top_k=2, use_bias=True, device="meta")
    x = torch.empty(3, 5, 24, device="meta")
    assert moe(x).shape == x.shape
    assert nn.MoE(24, 20, 6).to("meta")(x).device.type == "meta"


def test_global_batch_loss_of_ranks_of_one_domain_each_is_that_of_the_whole(tmp_path):
    """Defends: f of the global batch, p of the rank: averaged gradients equal one process on all tokens.

    Each rank's tokens lean to experts of their own, so that its own f is far from the whole's.
    """
    ranks, tokens, experts = 4, 16, 12
    domains = 4 * torch.eye(ranks).repeat_interleave(experts // ranks, 1)
    logits = domains.repeat_interleave(tokens, 0) + torch.randn(ranks * tokens, experts)
    whole = logits.clone().requires_grad_()
    counts = sk.route(whole).counts
    loss = nn.load_balancing_loss(whole, counts)
    loss.backward()
    path = str(tmp_path / "store")
    forked.spawn(balance_rank, (path, logits, counts.tolist(), loss.item(), whole.grad.tolist()), ranks)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operations_under_autocast_compute_in_the_dtype_of_the_weights(dtype):
    """Defends: mixed dtypes, which autocast makes and nobody chose, refused."""
    experts = nn.Experts(24, 20, 6)
    gate_up, down = experts.gate_up_proj, experts.down_proj
    x, weights = torch.randn(7, 24).to(dtype).requires_grad_(), torch.rand(7, 2)
    routing = sk.group_by_expert(torch.randint(0, 6, (7, 2)), 6, weights)
    offsets = torch.tensor([0, 1, 1, 3, 4, 5, 7])
    calls = [
        lambda x: sk.moe_experts(x, routing.indices, weights, gate_up, down),
        lambda x: experts.forward_routed(x, routing),
        lambda x: sk.grouped_gemm(x, gate_up, offsets),
    ]
    for call in calls:
        with torch.autocast("cpu", torch.bfloat16):
            got = call(x)
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        assert got.dtype == dtype
        assert torch.equal(got, call(x.float()).to(dtype))
        assert torch.equal(got, compiled)
        got.sum().backward()
        assert x.grad.dtype == dtype
        with pytest.raises(TypeError, match="must have the dtype of"):
            call(x)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="must have the dtype of"):
            call(x.double())  # autocast leaves f64 alone


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
