"""Routing and grouping in Triton equal the reference: choice, weights, order, gradient."""

import pytest
import torch
from support import assert_close, tolerance
from test_ops_route import check_normalised_sigmoid, check_order, check_route, check_ties
from test_ops_route_with_sums import ROWS, SCORES, check_row, check_sums

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.triton import group


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("T, E, k", [(0, 5, 1), (1, 1, 1), (90, 37, 1), (130, 96, 8), (40, 33, 33)])
def test_route_equals_reference(backend, T, E, k, score, normalize, use_bias):
    """Defends: choice, weights and gradient for every kind of score, padding of E and k to powers of two."""
    check_route(T, E, k, score, normalize, use_bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_and_strided_logits(backend, dtype):
    """Defends: row strides, a gradient that is not contiguous, rounding of the weights alone."""
    logits = torch.randn(50, 80).to(dtype)[:, 3:36].requires_grad_()
    wide = logits.detach().double().requires_grad_()
    got, want = sk.route(logits, 3, normalize=True), reference.route(wide, 3, normalize=True)
    assert torch.equal(got.indices, want.indices)
    assert_close(got.weights, want.weights, tolerance(dtype, 1))
    grad = torch.randn(3, 50).to(dtype).t()
    got.weights.backward(grad)
    want.weights.backward(grad.double())
    assert wide.grad.abs().max() > 1e-2
    assert_close(logits.grad, wide.grad, tolerance(dtype, 1))


@pytest.mark.parametrize("k", [1, 4])
def test_ties_go_to_the_lower_index_and_nan_ranks_last(backend, k):
    check_ties(k)


@pytest.mark.parametrize("E", [2, 20])
@pytest.mark.parametrize("k", [1, 2])
def test_nan_ranks_as_minus_infinity(backend, k, E):
    """Defends: the choice among NaN and -inf alone, where lanes of padding hold -inf as well."""
    nan, low = float("nan"), float("-inf")
    for head in ([nan, low], [low, nan], [nan, nan], [low, low]):
        logits = torch.full((1, E), nan)
        logits[0, :2] = torch.tensor(head)
        want = reference.route(logits.double(), k).indices
        assert torch.equal(sk.route(logits, k).indices, want)


@pytest.mark.parametrize("shift", [-1000.0, -30.0, 100.0])
def test_normalised_sigmoid_of_any_size(backend, shift):
    """Defends: 0 / 0 where every sigmoid underflows."""
    check_normalised_sigmoid(shift)


@pytest.mark.parametrize(
    "T, k, E", [(0, 1, 3), (1, 1, 1), (127, 1, 7), (129, 1, 64), (450, 2, 127), (1500, 1, 2)]
)
def test_group_by_expert_is_a_stable_sort(backend, T, k, E):
    """Defends: ranks across blocks of 128 slots, a block that ends within, E at a power of two."""
    indices = torch.randint(0, E, (T, k))
    check_order(indices, sk.group_by_expert(indices, E), E)


def test_an_index_out_of_range_goes_behind_all_experts(backend):
    """Defends: an address outside the data where a GPU's caller, unchecked, names an expert that is not there."""
    routing = sk.group_by_expert(torch.tensor([[2], [7], [0], [-1]]), 3)
    assert routing.counts.tolist() == [1, 0, 1]
    assert routing.offsets.tolist() == [0, 1, 1, 2]
    assert routing.row_map.tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("balance_score", SCORES)
@pytest.mark.parametrize("T, E, k", [(0, 5, 1), (1, 1, 1), (700, 37, 2)])
def test_route_with_sums_equals_reference(backend, T, E, k, balance_score):
    """Defends: sums across blocks of tokens, idle lanes in them, three gradients in one."""
    logits = torch.randn(T, E) + 200 * torch.randn(T, 1)
    check_sums(logits.requires_grad_(), k, balance_score, depth=T + E)


def test_rows_without_a_number(backend):
    """Defends: NaN in the gradient of experts that were not chosen."""
    logits = torch.tensor([[float("-inf")] * 4, [float("nan")] * 4, [0, float("inf"), 1, 2], [3, 1, 2, 0]])
    for row in logits:
        narrow, wide = row[None].clone().requires_grad_(), row[None].double().requires_grad_()
        sk.route(narrow, 2, normalize=True).weights.sum().backward()
        reference.route(wide, 2, normalize=True).weights.sum().backward()
        assert torch.equal(narrow.grad.isnan(), wide.grad.isnan())


@pytest.mark.parametrize("balance_score", SCORES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_sums_of_rows_without_a_finite_largest(backend, row, balance_score):
    """Defends: NaN where the squared log sum exp is infinite."""
    check_row(row, balance_score)


def test_more_blocks_of_slots_than_are_summed_at_once(backend, monkeypatch):
    """Defends: what one turn of the scan hands to the next."""
    monkeypatch.setattr(group, "CHUNK", 4)
    indices = torch.randint(0, 9, (1500, 1))
    check_order(indices.int(), sk.group_by_expert(indices, 9), 9)
