"""The router's end of the layer: choose, bring rows into expert order and back; and what share of the layer that is."""

import bounds
import oracle
import peer_ops
import pytest
import shapes
import torch
from shapes import A_TOP_8, DTYPES, A, short

import sigma_kernels as sk

SHAPES = [A, A_TOP_8]
DIRECTIONS = ["forward", "forward+backward"]
CALLS = 20  # a turn: one call takes microseconds


def logits_of(shape, device):
    return torch.randn(shape.T, shape.E, generator=torch.Generator().manual_seed(0)).to(device)


def call(function, direction, leaves):
    """The function of its inputs, or that and the gradients by those of them that `leaves` names."""
    if direction == "forward":
        return torch.no_grad()(function)

    def run():
        out = function()
        first = out if isinstance(out, torch.Tensor) else out[0]
        return [first, *torch.autograd.grad(first, leaves, torch.ones_like(first))]

    return run


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route(race, device, shape, direction):
    logits = logits_of(shape, device).requires_grad_()
    k = shape.k
    wide = logits.detach().double().requires_grad_()
    p, best = (t[:, :k] for t in wide.softmax(-1).sort(dim=-1, descending=True, stable=True))
    (gradient,) = torch.autograd.grad(p.sum(), wide)
    order = best.reshape(-1).argsort(stable=True)

    def ours():
        r = sk.route(logits, k)
        return r.weights, r.indices, r.counts, r.row_map

    def check(who, got):
        want = [p.detach().float(), gradient.float()][: 1 if direction == "forward" else 2]
        oracle.assert_agrees(who, got[: len(want)], want, shape.E)
        if direction == "forward":
            assert torch.equal(got[1].long(), best), f"{who}: other experts"
            if len(got) == 4:
                counts = torch.bincount(best.reshape(-1), minlength=shape.E)
                assert torch.equal(got[2].long(), counts), f"{who}: other counts"
                assert torch.equal(got[3].long(), order), f"{who}: another order"

    rivals = {
        "softmax_topk_argsort": lambda: peer_ops.softmax_topk_argsort(logits, k),
        "softmax_topk": lambda: peer_ops.softmax_topk(logits, k),
    }
    if k == 1:
        rivals["softmax_argmax_argsort"] = lambda: peer_ops.softmax_argmax_argsort(logits)
    race(
        f"route/{direction}/f32",
        call(ours, direction, logits),
        shape=shape,
        check=check,
        calls=CALLS,
        moved=logits.nbytes,
        note="softmax_topk makes the choice alone, the others also the counts and the order of rows",
        index=best,
        bound_read=bounds.read(logits.detach()),
        **{name: call(f, direction, logits) for name, f in rivals.items()},
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_route_and_losses(race, device, shape):
    """A step of training: the choice, the balance and z losses, and one gradient of the logits from all three."""
    logits = logits_of(shape, device).requires_grad_()
    k, E = shape.k, shape.E
    grad_weights = torch.randn(shape.T, k, generator=torch.Generator().manual_seed(1)).to(device)

    def step(weights, balance, z):
        loss = balance + 1e-3 * z
        (grad,) = torch.autograd.grad((weights, loss), logits, (grad_weights, torch.ones_like(loss)))
        return weights.detach(), grad

    def fused():
        routing, sums = sk.route_with_sums(logits, k)
        return step(
            routing.weights, sk.nn.load_balancing_loss(sums, routing.counts), sk.nn.router_z_loss(sums)
        )

    def apart():
        routing = sk.route(logits, k)
        balance = sk.nn.load_balancing_loss(logits, routing.counts)
        return step(routing.weights, balance, sk.nn.router_z_loss(logits))

    def in_torch():
        p = logits.softmax(-1)
        weights, indices = p.topk(k)
        counts = torch.bincount(indices.flatten(), minlength=E)
        indices.flatten().argsort(stable=True)
        balance = E * (counts / counts.sum() * p.mean(0)).sum()
        return step(weights, balance, logits.logsumexp(-1).square().mean())

    wide = logits.detach().double().requires_grad_()
    weights, *sums = sk.reference.route(wide, k).weights, *sk.reference.router_sums(wide)
    counts = sk.route(logits.detach(), k).counts
    loss = E / shape.T * (counts / counts.sum() * sums[0]).sum() + 1e-3 * sums[1] / shape.T
    (want,) = torch.autograd.grad((weights, loss), wide, (grad_weights.double(), torch.ones_like(loss)))
    race(
        "route_and_losses/forward+backward/f32",
        fused,
        shape=shape,
        check=lambda who, got: oracle.assert_agrees(who, got, [weights.detach().float(), want.float()], E),
        calls=CALLS,
        moved=2 * logits.nbytes,
        index=sk.route(logits.detach(), k).indices,
        note="the same losses by sk.route and torch's operations (apart), and by torch alone with counts and order",
        bound_copy=bounds.copy(logits.detach()),
        sk_route_and_losses_apart=apart,
        torch_softmax_topk_argsort_losses=in_torch,
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_permute(race, device, dtype, shape, direction):
    routing = sk.route(logits_of(shape, device), shape.k)
    x = torch.randn(shape.T, shape.H).to(device, dtype).requires_grad_()
    token = routing.row_map.long() // shape.k
    rows = x.detach()[token]

    def check(who, got):
        out, *gradient = [got] if direction == "forward" else got
        assert torch.equal(out, rows), f"{who}: other rows"
        assert all(torch.equal(g, torch.full_like(g, shape.k)) for g in gradient), f"{who}: another gradient"

    race(
        f"permute/{direction}/{short(dtype)}",
        call(lambda: sk.permute(x, routing), direction, x),
        shape=shape,
        check=check,
        calls=CALLS,
        moved=2 * rows.nbytes if direction == "forward" else 4 * rows.nbytes,
        index=routing.indices,
        bound_copy=bounds.copy(rows) if direction == "forward" else bounds.copy(rows, rows),
        **{n: call(lambda f=f: f(x, token), direction, x) for n, f in peer_ops.PERMUTES.items()},
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_unpermute(race, device, dtype, shape, direction):
    routing = sk.route(logits_of(shape, device), shape.k)
    slot = routing.row_map.long()
    row_of_slot = slot.argsort()
    y = torch.randn(shape.R, shape.H).to(device, dtype).requires_grad_()
    weights = routing.weights.to(dtype).requires_grad_()
    routing = routing._replace(weights=weights)
    wide, wide_weights = (t.detach().double().requires_grad_() for t in (y, weights))
    out = peer_ops.index_add(wide, wide_weights, slot, row_of_slot)
    grads = torch.autograd.grad(out, (wide, wide_weights), torch.ones_like(out))
    want = [t.detach().to(dtype) for t in (out, *grads)]

    def check(who, got):
        got = [got] if direction == "forward" else got
        oracle.assert_agrees(who, got, want[: len(got)], shape.H)

    leaves = (y, weights)
    race(
        f"unpermute/{direction}/{short(dtype)}",
        call(lambda: sk.unpermute(y, routing), direction, leaves),
        shape=shape,
        check=check,
        calls=CALLS,
        moved=2 * y.nbytes if direction == "forward" else 4 * y.nbytes,
        index=routing.indices,
        bound_copy=bounds.copy(y.detach()) if direction == "forward" else bounds.copy(y.detach(), y.detach()),
        **{
            n: call(lambda f=f: f(y, weights, slot, row_of_slot), direction, leaves)
            for n, f in peer_ops.UNPERMUTES.items()
        },
    )


@pytest.mark.parametrize("shape", [A], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_router_end(race, device, dtype, shape):
    """All three, beside the forward of the layer that they surround."""
    x, _, gate_up, down = shapes.layer_inputs(shape, dtype, device)
    logits, k = logits_of(shape, device), shape.k
    want = sk.route(logits, k)
    same = x * want.weights.sum(1, keepdim=True).to(dtype)

    def ours():
        routing = sk.route(logits, k)
        routing = routing._replace(weights=routing.weights.to(dtype))
        return sk.unpermute(sk.permute(x, routing), routing)

    def theirs():
        weights, _, _, slot = peer_ops.softmax_argmax_argsort(logits)
        return peer_ops.index_add(x.index_select(0, slot), weights.to(dtype), slot, slot)

    race(
        f"router_end/forward/{short(dtype)}",
        torch.no_grad()(ours),
        shape=shape,
        check=lambda who, got: oracle.assert_agrees(who, [got], [same], shape.H),
        index=want.indices,
        note="route, permute and unpermute; the layer beside them is the forward of sk.moe_experts",
        beside_layer=torch.no_grad()(
            lambda: sk.moe_experts(x, want.indices, want.weights.to(dtype), gate_up, down)
        ),
        torch_argmax_index_select_index_add=torch.no_grad()(theirs),
    )
