"""route_with_sums: the choice of route, and sums and gradients that equal those of the losses apart."""

import pytest
import torch
from support import assert_close, tolerance

import sigma_kernels as sk
from sigma_kernels import reference

SCORES = ["softmax", "sigmoid"]


def problem(T, E, k, strided=False):
    logits = torch.randn(T, 2 * E if strided else E)[:, :E] * 2
    return logits, torch.randn(T, k), torch.randn(E), torch.randn(())


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
    logits, *grads = problem(T, E, k, bool(strided))
    narrow, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    if strided:
        narrow = torch.randn(T, 2 * E)[:, :E].copy_(logits).requires_grad_()
    flags = {"score": score, "normalize": normalize}
    routing, sums = sk.route_with_sums(narrow, k, **flags, balance_score=balance_score)
    plain = sk.route(narrow.detach(), k, **flags)
    assert all(torch.equal(a, b) for a, b in zip(routing, plain, strict=True))

    want = reference.route(wide, k, **flags).weights, *reference.router_sums(wide, balance_score)
    got = routing.weights, sums.probabilities, sums.square
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, tolerance(torch.float32, E))
    torch.autograd.backward(got, grads)
    torch.autograd.backward(want, [g.double() for g in grads])
    if T:
        assert_close(narrow.grad, wide.grad, tolerance(torch.float32, E))


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
