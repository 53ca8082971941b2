"""route and group_by_expert: equal to the reference, and sound by their own invariants."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_close, tolerance

import sigma_kernels as sk
from sigma_kernels import reference


def check_order(indices: torch.Tensor, routing: sk.Routing, E: int) -> None:
    flat = indices.reshape(-1).long()
    assert torch.equal(routing.row_map.long(), torch.argsort(flat, stable=True))
    assert torch.equal(routing.counts.long(), torch.bincount(flat, minlength=E))
    assert routing.offsets[0] == 0
    assert torch.equal(routing.offsets[1:].long(), routing.counts.long().cumsum(0))


def check_route(T: int, E: int, k: int, score: str, normalize: bool, use_bias: bool) -> None:
    """Choice, weights, order and gradient are the reference's in f64."""
    logits = torch.randn(T, E)
    bias = torch.randn(E) * 0.1 if use_bias else None
    narrow, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = sk.route(narrow, k, score=score, normalize=normalize, bias=bias)
    want = reference.route(
        wide, k, score=score, normalize=normalize, bias=bias.double() if use_bias else None
    )
    assert torch.equal(got.indices, want.indices)
    check_order(got.indices, got, E)
    grad = torch.randn(T, k)
    got.weights.backward(grad)
    want.weights.backward(grad.double())
    assert_close(got.weights, want.weights, tolerance(torch.float32, E))
    error = (narrow.grad.double() - wide.grad).abs()
    assert T == 0 or error.max() <= tolerance(torch.float32, E)


def check_ties(k: int) -> None:
    logits = torch.zeros(3, 20)
    logits[1] = torch.nan
    logits[2, :10] = torch.nan
    indices = sk.route(logits, k).indices
    assert indices.tolist() == [list(range(k)), list(range(k)), list(range(10, 10 + k))]


def check_normalised_sigmoid(shift: float) -> None:
    logits = torch.randn(50, 9) * 3 + shift
    narrow, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = sk.route(narrow, 4, score="sigmoid", normalize=True).weights
    want = reference.route(wide, 4, score="sigmoid", normalize=True).weights
    assert_close(got.sum(1), torch.ones(50), tolerance(torch.float32, 1))
    assert_close(got, want, tolerance(torch.float32, 16) * max(1.0, abs(shift) / 100))
    grad = torch.randn(50, 4)
    got.backward(grad)
    want.backward(grad.double())
    assert_close(narrow.grad, wide.grad, tolerance(torch.float32, 16))


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "T, E, k", [(0, 5, 1), (1, 1, 1), (200, 37, 1), (200, 96, 1), (300, 96, 8), (40, 33, 33)]
)
def test_route_equals_reference(backend, T, E, k, score, normalize, use_bias):
    """Defends: choice, weights and gradient for every kind of score."""
    check_route(T, E, k, score, normalize, use_bias)


@pytest.mark.parametrize("k", [1, 4])
def test_ties_go_to_the_lower_index_and_nan_ranks_last(backend, k):
    """Defends: a choice that differs between backends, or an index out of range from a row of NaN."""
    check_ties(k)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 400), st.integers(1, 4), st.integers(1, 130))
def test_group_by_expert_is_a_stable_sort(T, k, E):
    """Defends: pieces of tokens counted by different threads."""
    indices = torch.randint(0, E, (T, k))
    check_order(indices, sk.group_by_expert(indices, E), E)


def test_top_1_softmax_reaches_the_router_and_normalised_does_not():
    """Defends: softmax after the choice, which kills the router's gradient at k = 1."""
    logits = torch.randn(10, 8, requires_grad=True)
    sk.route(logits, 1).weights.sum().backward()
    assert logits.grad.abs().max() > 1e-3
    logits.grad = None
    sk.route(logits, 1, normalize=True).weights.sum().backward()
    assert logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("shift", [-1000.0, -100.0, -30.0, 0.0, 100.0])
def test_normalised_sigmoid_of_any_size(backend, shift):
    """Defends: 0 / 0 where every sigmoid underflows, and ratios of clamped exponentials."""
    check_normalised_sigmoid(shift)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_computed_in_f32(dtype):
    """Defends: a choice by rounded scores, a gradient that stops at the conversion."""
    logits = torch.randn(50, 33).to(dtype).requires_grad_()
    wide = logits.detach().float().requires_grad_()
    got, want = sk.route(logits, 3, normalize=True), sk.route(wide, 3, normalize=True)
    assert got.weights.dtype == dtype
    assert torch.equal(got.indices, want.indices)
    assert torch.equal(got.weights, want.weights.to(dtype))
    grad = torch.randn(50, 3).to(dtype)
    got.weights.backward(grad)
    want.weights.backward(grad.float())
    assert torch.equal(logits.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("E", [2, 20, 40])
@pytest.mark.parametrize("k", [1, 2])
def test_nan_ranks_as_minus_infinity(k, E):
    """Defends: the choice among NaN and -inf alone, where the maximum is -inf and k = 1 looks for its place."""
    nan, low = float("nan"), float("-inf")
    for head in ([nan, low], [low, nan], [nan, nan], [low, low]):
        logits = torch.full((1, E), nan)
        logits[0, :2] = torch.tensor(head)
        assert torch.equal(
            sk.route(logits, k).indices.long(), reference.route(logits.double(), k).indices.long()
        )
