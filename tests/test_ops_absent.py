"""Choices that no expert answers (dropped ones, or those of another rank): they add nothing and have no gradient."""

import math
import re

import pytest
import torch
from support import assert_close, tolerance, value_and_grads
from test_ops_experts import experts_inputs

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.ops.experts import experts_of_routing
from sigma_kernels.ops.route import group_where_present

SHAPES = [  # T, H, I, E, k, share of absent choices
    (9, 17, 12, 4, 1, 0.5),
    (40, 33, 20, 5, 3, 0.4),
    (40, 16, 8, 5, 2, 1.0),
    (0, 16, 8, 5, 2, 0.5),
    (300, 130, 70, 9, 2, 0.9),
    (64, 48, 40, 16, 1, 0.0),
]


def choices(T: int, E: int, k: int, share: float, weights: torch.Tensor) -> sk.Routing:
    """A share of random choices left out; of the first token all, and of the last none, where there are some."""
    index = torch.randint(0, E, (T, k), dtype=torch.int32)
    is_absent = torch.rand(T, k) < share
    if 0 < share < 1:
        is_absent[:1], is_absent[-1:] = True, False
    index[is_absent] = E
    return group_where_present(index, E, weights, T * k - int(is_absent.sum()))


def check_absent(shape: tuple[int, int, int, int, int, float], dtype: torch.dtype) -> None:
    """The layer, and permute beside unpermute, against the reference with a weight of zero where a choice is absent."""
    T, H, I, E, k, share = shape
    x, _, weights, gate_up, down = (
        t.to(dtype) if t.dtype.is_floating_point else t for t in experts_inputs(T, H, I, E, 1)
    )
    weights = (torch.rand(T, k) + 0.1).to(dtype)
    routing = choices(T, E, k, share, weights)
    is_there = routing.indices < E
    grad = torch.randn(T, H).to(dtype)
    depth = max(T, H, I) if dtype == torch.float32 else 4

    def layer(x, w, gate_up, down):
        return experts_of_routing(x, routing._replace(weights=w), gate_up, down)

    def defined(x, w, gate_up, down):
        return reference.moe_experts(x, routing.indices.clamp(max=E - 1), w * is_there, gate_up, down)

    def moved(x, w):
        return sk.unpermute(sk.permute(x, routing), routing._replace(weights=w))

    def summed(x, w):
        return x * (w * is_there).sum(1, keepdim=True)

    inputs = [x, weights, gate_up, down]
    wide = [t.double() for t in inputs]
    for call, want_call, n in ((layer, defined, 4), (moved, summed, 2)):
        got = value_and_grads(call, inputs[:n], grad)
        want = value_and_grads(want_call, wide[:n], grad.double())
        for g, w in zip(got, want, strict=True):
            assert_close(g, w, tolerance(dtype, depth))
        assert not (got[2] * ~is_there).any(), "a weight that counts for nothing has a gradient"
        with torch.no_grad():
            assert torch.equal(call(*inputs[:n]), got[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_absent_choices_add_nothing(backend, shape):
    """Defends: rows that were never written read as if they were; sums that begin with an absent choice."""
    check_absent(shape, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_absent_choices_in_narrow_types(shape, dtype):
    check_absent(shape, dtype)


def test_the_same_bits_at_any_number_of_threads():
    T, H, I, E, k = 200, 64, 48, 6, 4
    inputs = [torch.randn(T, H), torch.rand(T, k), torch.randn(E, 2 * I, H), torch.randn(E, H, I)]
    routing, grad = choices(T, E, k, 0.5, inputs[1]), torch.randn(T, H)

    def layer(x, w, gate_up, down):
        return experts_of_routing(x, routing._replace(weights=w), gate_up, down)

    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(value_and_grads(layer, inputs, grad))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_second_derivatives_of_unpermute():
    routing = choices(5, 3, 2, 0.4, torch.rand(5, 2).double())
    y = torch.randn(routing.row_map.shape[0], 3, dtype=torch.float64, requires_grad=True)
    w = routing.weights.clone().requires_grad_()
    with sk.backend("reference"):
        assert torch.autograd.gradgradcheck(lambda y, w: sk.unpermute(y, routing._replace(weights=w)), (y, w))
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda x: sk.permute(x, routing), (x,))


def naive_limit(routing: sk.Routing, capacity: int, drop: str) -> set[int]:
    """Slots that stay, each expert on its own."""
    stay: set[int] = set()
    for e in range(routing.num_experts):
        slots = (routing.indices.reshape(-1) == e).nonzero()[:, 0].tolist()
        if drop == "lightest":
            slots.sort(
                key=lambda s: -routing.weights.reshape(-1)[s].item()
            )  # stable: the later slot goes first
        stay.update(slots[:capacity])
    return stay


@pytest.mark.parametrize("drop", ["lightest", "last"])
@pytest.mark.parametrize(
    "T, E, k, capacity", [(50, 6, 2, 7), (50, 6, 2, 1), (9, 96, 1, 1), (40, 3, 1, 100), (0, 4, 2, 3)]
)
def test_limit_rows(T, E, k, capacity, drop):
    routing = sk.route(torch.randn(T, E), k)
    routing = routing._replace(weights=(routing.weights * 8).round() / 8)  # ties
    got, dropped = sk.limit_rows(routing, capacity, drop)
    stay = naive_limit(routing, capacity, drop)
    assert set(got.row_map.tolist()) == stay
    assert len(got.row_map) == len(stay)
    want = routing.indices.reshape(-1).clone()
    want[[s for s in range(T * k) if s not in stay]] = E
    assert torch.equal(got.indices.reshape(-1), want)
    assert torch.equal(got.counts + dropped, routing.counts)
    assert (got.counts <= capacity).all()
    expert = want[got.row_map.long()]
    assert torch.equal(expert, expert.sort(stable=True).values), "rows are not in expert order"


def test_limit_rows_refuses():
    routing = sk.route(torch.randn(4, 3))
    with pytest.raises(ValueError, match="limit_rows: capacity must be at least 1, found 0"):
        sk.limit_rows(routing, 0)
    with pytest.raises(ValueError, match="limit_rows: drop must be 'lightest' or 'last', found 'first'"):
        sk.limit_rows(routing, 1, "first")
    wrong = [
        ({}, 2.5, TypeError, "capacity must be an integer, found 2.5"),
        ({}, True, TypeError, "capacity must be an integer, found True"),
        (
            {"weights": routing.weights[:3]},
            1,
            ValueError,
            r"routing.weights must be \[4, 1\], found \[3, 1\]",
        ),
        (
            {"weights": routing.weights.to("meta")},
            1,
            ValueError,
            "routing.weights must lie where routing.indices does",
        ),
        (
            {"row_map": routing.row_map + 100},
            1,
            ValueError,
            "routing.row_map must name each slot of 0..3 once",
        ),
        (
            {"indices": routing.indices + 100},
            1,
            ValueError,
            r"expert indices must lie in 0..2 \(E=3\), found 10\d at",
        ),
    ]
    for fields, capacity, kind, message in wrong:
        with pytest.raises(kind, match=f"^limit_rows: {message}"):
            sk.limit_rows(routing._replace(**fields), capacity)


@pytest.mark.parametrize("mass, k", [(0.45, 1), (0.75, 2), (0.85, 3), (0.97, 4), (1.0, 4)])
def test_limit_mass_by_hand(mass, k):
    """Of .5, .3, .15, .05 as many as reach the mass, alone or divided by their sum."""
    probabilities = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    routing = sk.route(probabilities.log(), 4)
    got = sk.limit_mass(routing, mass)
    assert got.indices.tolist() == [[*range(k), *[4] * (4 - k)]]
    assert got.row_map.tolist() == list(range(k))
    torch.testing.assert_close(got.weights, probabilities)
    divided = sk.limit_mass(routing, mass, normalize=True).weights
    torch.testing.assert_close(divided[0, :k], probabilities[0, :k] / probabilities[0, :k].sum())
    assert not divided[0, k:].any()
    exact = routing._replace(weights=torch.tensor([[0.5, 0.25, 0.125, 0.125]]))
    assert sk.limit_mass(exact, 0.75).row_map.tolist() == [0, 1]  # reached is enough


@pytest.mark.parametrize("normalize", [False, True])
def test_limit_mass_is_the_experts_that_stay(normalize):
    """Each token is what the reference makes of its own k, and so are the gradients of the weights."""
    T, E, H = 30, 6, 8
    logits = (2 * torch.randn(T, E)).requires_grad_()
    x, down = torch.randn(T, H), torch.randn(E, H, H)
    got = sk.limit_mass(sk.route(logits, 5), 0.7, normalize=normalize)
    kept = (got.indices < E).sum(1)
    assert 1 == kept.min() < kept.max()
    y = sk.unpermute(sk.grouped_gemm(sk.permute(x, got), down, got.offsets), got)
    p = logits.double().softmax(1)
    want = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        best, expert = p[t].sort(descending=True)
        k = int((best.cumsum(0) < 0.7).sum()) + 1
        assert k == kept[t]
        share = best[:k] / best[:k].sum() if normalize else best[:k]
        want[t] = sum(w * (down[e].double() @ x[t].double()) for w, e in zip(share, expert[:k], strict=True))
    assert_close(y, want.detach(), tolerance(torch.float32, depth=H))
    (grad,) = torch.autograd.grad(y.square().sum(), logits)
    (want_grad,) = torch.autograd.grad(want.square().sum(), logits)
    assert_close(grad, want_grad, 100 * tolerance(torch.float32, depth=H))


def test_limit_mass_counts_what_is_there():
    """Defends: the weight of a choice that was dropped, by which its token would have none of its others."""
    routing = sk.route(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), 4)
    routing = group_where_present(torch.tensor([[4, 1, 2, 3]], dtype=torch.int32), 4, routing.weights, 3)
    got = sk.limit_mass(routing, 0.4, normalize=True)
    assert got.indices.tolist() == [[4, 1, 2, 4]]
    assert got.weights[0].tolist() == pytest.approx([0, 2 / 3, 1 / 3, 0])
    none = routing._replace(indices=torch.full((1, 4), 4, dtype=torch.int32), weights=routing.weights.half())
    assert not sk.limit_mass(none, 0.4, normalize=True).weights.any()


def test_limit_mass_keeps_what_was_left_out_and_refuses():
    routing, _ = sk.limit_rows(sk.route(torch.randn(40, 3), 2), 5)
    got = sk.limit_mass(routing, 1.0)
    assert torch.equal(got.indices, routing.indices)
    assert torch.equal(got.row_map, routing.row_map)
    assert torch.equal(
        sk.limit_mass(sk.route(torch.randn(0, 3), 2), 0.5).counts, torch.zeros(3, dtype=torch.int32)
    )
    for mass in (0, 1.5, math.nan, True, "1"):
        told = f"limit_mass: mass must be a number above 0 and at most 1, found {mass!r}"
        with pytest.raises(ValueError, match=re.escape(told)):
            sk.limit_mass(routing, mass)
    with pytest.raises(TypeError, match="limit_mass: weights must be"):
        sk.limit_mass(routing._replace(weights=routing.indices), 0.5)


def test_a_layer_of_limited_capacity():
    """Dropped tokens are zero, the others are what the drop-free layer says; what was dropped is told."""
    moe = sk.nn.MoE(16, 8, 4, capacity_factor=0.5)
    x = torch.randn(40, 16, requires_grad=True)
    y = moe(x)
    assert moe.last_dropped.sum() == (moe.last_routing.counts - 5).clamp(min=0).sum() > 0
    is_dropped = (y == 0).all(1)
    assert is_dropped.sum() == moe.last_dropped.sum()
    moe.capacity_factor = None
    whole = moe(x)
    assert torch.equal(y[~is_dropped], whole[~is_dropped])
    y.sum().backward()
    assert not x.grad[is_dropped].any()
    for factor in (0, -1.0, math.inf, math.nan, "2", True):
        with pytest.raises(
            ValueError, match=rf"^MoE: capacity_factor must be a number above 0, found {factor!r}"
        ):
            sk.nn.MoE(16, 8, 4, capacity_factor=factor)
    with pytest.raises(ValueError, match=r"^MoE: drop must be 'lightest' or 'last', found 'first'"):
        sk.nn.MoE(16, 8, 4, drop="first")
