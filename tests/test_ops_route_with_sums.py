"""route_with_sums: the choice of route, and sums and gradients that equal those of the losses apart."""

from typing import Any

import pytest
import torch
from support import assert_close, tolerance

import sigma_kernels as sk
from sigma_kernels import reference

SCORES = ["softmax", "sigmoid"]


INF, NAN = float("inf"), float("nan")
ROWS = [
    [-INF] * 5,
    [0, INF, 1, 2, -INF],
    [INF] * 5,
    [-INF, 1, 2, 0, -INF],
    [-INF, NAN, -INF, -INF, -INF],
    [NAN] * 5,
]


def problem(T, E, k):
    return torch.randn(T, E) * 2, torch.randn(T, k), torch.randn(E), torch.randn(())


def leaf(T: int, E: int, strided: bool) -> torch.Tensor:
    return torch.randn(T, 2 * E if strided else E)[:, :E].mul_(2).requires_grad_()


def check_sums(
    narrow: torch.Tensor, k: int, balance_score: str, depth: int | None = None, **flags: Any
) -> list[torch.Tensor]:
    """The Routing is that of route; sums and the gradient of all three are the reference's in f64.

    `depth` of the sums: E where those over tokens are taken by blocks, the blocks in f64.
    """
    E = narrow.shape[1]
    wide = narrow.detach().double().requires_grad_()
    routing, sums = sk.route_with_sums(narrow, k, **flags, balance_score=balance_score)
    plain = sk.route(narrow.detach(), k, **flags)
    assert all(torch.equal(a, b) for a, b in zip(routing, plain, strict=True))
    choice = reference.route(wide, k, **flags)
    assert torch.equal(routing.indices, choice.indices)

    want = choice.weights, *reference.router_sums(wide, balance_score)
    got = routing.weights, sums.probabilities, sums.square
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, tolerance(torch.float32, depth or E))
    grads = [torch.randn(x.shape) for x in got]
    (grad,) = torch.autograd.grad(got, narrow, grads)
    torch.autograd.backward(want, [g.double() for g in grads])
    assert_close(grad, wide.grad, tolerance(torch.float32, E))
    return [*routing, sums.probabilities, sums.square, grad]


def check_row(row: list[float], balance_score: str) -> None:
    """Numbers, infinities and NaN are where the reference has them, in the sums and in their gradient."""
    narrow = torch.tensor([row], requires_grad=True)
    wide = narrow.detach().double().requires_grad_()
    sums = sk.route_with_sums(narrow, 2, balance_score=balance_score)[1]
    want = reference.router_sums(wide, balance_score)
    for a, b in zip((sums.probabilities, sums.square), want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6, equal_nan=True)
    (sums.probabilities.sum() + sums.square).backward()
    (want[0].sum() + want[1]).backward()
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("balance_score", SCORES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "T, E, k, strided",
    [
        (0, 5, 1, 0),
        (1, 1, 1, 0),
        (65, 7, 2, 0),
        (130, 3, 3, 0),
        (700, 96, 1, 0),
        (300, 96, 8, 1),
        (200, 37, 1, 1),
    ],
)
def test_sums_and_gradient_equal_reference(backend, T, E, k, strided, score, normalize, balance_score):
    """Defends: every term of the fused gradient, tails of vectors and blocks, tokens that no block fills."""
    check_sums(leaf(T, E, bool(strided)), k, balance_score, score=score, normalize=normalize)


@pytest.mark.parametrize("balance_score", SCORES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_rows_without_a_finite_largest(backend, row, balance_score):
    """Defends: NaN where the squared log sum exp is infinite, a number where the reference has NaN."""
    check_row(row, balance_score)


@pytest.mark.parametrize("alone", [0, 1, 2])
@pytest.mark.parametrize("score", SCORES)
def test_each_gradient_alone(score, alone):
    """Defends: a loss that is not taken adds nothing, and one that is needs no other."""
    logits, *grads = problem(90, 20, 2)
    narrow, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    routing, sums = sk.route_with_sums(narrow, 2, score=score, balance_score=score)
    got = routing.weights, sums.probabilities, sums.square
    want = reference.route(wide, 2, score=score).weights, *reference.router_sums(wide, score)
    got[alone].backward(grads[alone])
    want[alone].backward(grads[alone].double())
    assert_close(narrow.grad, wide.grad, tolerance(torch.float32, 20))


@pytest.mark.parametrize("balance_score", SCORES)
def test_same_bits_at_any_number_of_threads(balance_score):
    logits, *grads = problem(1000, 96, 1)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            leaf = logits.clone().requires_grad_()
            routing, sums = sk.route_with_sums(leaf, balance_score=balance_score)
            torch.autograd.backward((routing.weights, sums.probabilities, sums.square), grads)
            seen.append((*routing, sums.probabilities, sums.square, leaf.grad))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("shift", [-1000.0, 0.0, 80.0])
def test_logits_of_any_size(shift):
    """Defends: probabilities that are ratios of what underflows, and a log of a sum that would overflow."""
    logits = torch.randn(50, 33) + shift
    _, sums = sk.route_with_sums(logits, balance_score="sigmoid")
    want = reference.router_sums(logits.double(), "sigmoid")
    assert_close(sums.probabilities, want[0], tolerance(torch.float32, 33))
    assert_close(sums.square, want[1], tolerance(torch.float32, 33))


@pytest.mark.parametrize("score", SCORES)
def test_losses_of_sums_are_those_of_logits(score):
    logits = torch.randn(200, 24)
    one, other = logits.clone().requires_grad_(), logits.double().requires_grad_()
    routing, sums = sk.route_with_sums(one, 2, balance_score=score)
    got = sk.nn.load_balancing_loss(sums, routing.counts) + 0.1 * sk.nn.router_z_loss(sums)
    want = sk.nn.load_balancing_loss(other, routing.counts, score=score) + 0.1 * sk.nn.router_z_loss(other)
    assert_close(got, want, tolerance(torch.float32, 24))
    got.backward()
    want.backward()
    assert_close(one.grad, other.grad, tolerance(torch.float32, 24))


def test_a_score_that_the_sums_do_not_have_is_named():
    routing, sums = sk.route_with_sums(torch.randn(4, 3), balance_score="sigmoid")
    with pytest.raises(ValueError, match="score is 'softmax', the sums are of 'sigmoid'"):
        sk.nn.load_balancing_loss(sums, routing.counts, score="softmax")


def test_no_tokens_have_no_loss():
    routing, sums = sk.route_with_sums(torch.zeros(0, 3, requires_grad=True))
    loss = sk.nn.load_balancing_loss(sums, routing.counts) + sk.nn.router_z_loss(sums)
    assert loss.item() == 0.0
    loss.backward()


def test_the_layer_keeps_the_sums_of_its_last_forward():
    moe = sk.nn.MoE(16, 8, 5, balance_score="sigmoid")
    moe(torch.randn(7, 16))
    want = reference.router_sums(moe.last_logits, "sigmoid")
    torch.testing.assert_close(moe.last_sums.probabilities, want[0])
    with torch.no_grad():
        moe(torch.randn(7, 16))
    assert moe.last_sums is None, "sums of an earlier forward"
