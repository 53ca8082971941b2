"""moe_experts and its pieces equal the reference in f64, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_close, tolerance, value_and_grads

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.ops.grouped_gemm import grouped_outer_

SHAPES = [  # T, H, I, E, k
    (0, 16, 16, 4, 1),
    (0, 16, 16, 4, 2),
    (1, 1, 1, 1, 1),
    (1, 17, 33, 5, 2),
    (7, 33, 17, 5, 1),
    (64, 64, 48, 96, 1),
    (65, 67, 66, 3, 3),
    (300, 130, 70, 9, 1),
    (200, 96, 129, 4, 2),
    (5, 24, 1100, 4, 1),  # few rows of more columns than a task of the plain product has
]


def experts_inputs(T: int, H: int, I: int, E: int, k: int) -> list[torch.Tensor]:
    index = (
        torch.stack([torch.randperm(E)[:k] for _ in range(T)]) if T else torch.zeros(0, k, dtype=torch.long)
    )
    return [
        torch.randn(T, H),
        index,
        torch.rand(T, k) + 0.1,
        torch.randn(E, 2 * I, H) / H**0.5,
        torch.randn(E, H, I) / I**0.5,
    ]


def check_experts(inputs: list[torch.Tensor], grad_out: torch.Tensor | None = None) -> None:
    T, H = inputs[0].shape
    if grad_out is None:
        grad_out = torch.randn(T, H)
    got = value_and_grads(sk.moe_experts, inputs, grad_out)
    wide = [x.double() if x.dtype.is_floating_point else x for x in inputs]
    want = value_and_grads(reference.moe_experts, wide, grad_out.double())
    depth = max(T, H, inputs[4].shape[2])
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(torch.float32, depth))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moe_experts_equals_reference(backend, shape):
    """Defends: ragged tails, empty experts, no tokens, gate and up swapped, output left unwritten."""
    check_experts(experts_inputs(*shape))


def test_moe_experts_at_a_real_size():
    """Defends: what only large blocks reach: row chunks, panels, prefetch past the end, parallel schedules."""
    check_experts(experts_inputs(1024, 512, 256, 48, 1))


@pytest.mark.parametrize("dtype, page", [(torch.float32, 1024), (torch.bfloat16, 2048)], ids=str)
def test_rows_whole_pages_apart(dtype, page):
    """Defends: an expert's rows in its neighbour's place, where they are copied; bits that depend on how x lies."""
    counts = torch.tensor([3, 4, 0, 62, 63, 64, 200, 5])  # too few to be copied, and too many
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()
    x = torch.randn(int(offsets[-1]), page, dtype=dtype)[:, : page - 24]
    weight = torch.randn(len(counts), 70, page - 24, dtype=dtype)
    got = sk.grouped_gemm(x, weight, offsets)
    want = reference.grouped_gemm(x.double(), weight.double(), offsets)
    assert_close(got, want, tolerance(dtype, page))
    assert torch.equal(got, sk.grouped_gemm(x.contiguous(), weight, offsets))
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(got, sk.grouped_gemm(x, weight, offsets))
    torch.set_num_threads(before)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    "H", [1024, 1008]
)  # the second so that a line between rows would put them a page apart again
def test_tokens_whole_pages_apart(k, H):
    """Defends: rows that are copied by another token's place, in the layer, forward and backward."""
    inputs = experts_inputs(120, H, 70, 5, k)
    inputs[0] = torch.randn(120, 1024)[:, :H]
    check_experts(inputs)


@pytest.mark.parametrize("k", [1, 2])
def test_all_tokens_on_one_expert(k):
    """Defends: contraction longer than one chunk in the weight gradient; 15 experts without a row get zero."""
    inputs = experts_inputs(700, 64, 48, 16, k)
    inputs[1] = torch.full((700, k), 3)
    check_experts(inputs)


def test_non_contiguous_inputs():
    """Defends: row strides of x, strides of the weights, an expanded gradient."""
    x, index, weights, gate_up, down = experts_inputs(40, 32, 24, 6, 2)
    inputs = [
        torch.randn(40, 70)[:, 3:67:2],
        index.t().contiguous().t(),
        weights.t().contiguous().t(),
        torch.randn(6, 32, 48).transpose(1, 2),
        torch.randn(6, 32, 50)[:, :, :24],
    ]
    check_experts(inputs)
    leaf = x.clone().requires_grad_()
    sk.moe_experts(leaf, index, weights, gate_up, down).sum().backward()
    wide = x.double().requires_grad_()
    reference.moe_experts(wide, index, weights.double(), gate_up.double(), down.double()).sum().backward()
    assert_close(leaf.grad, wide.grad, tolerance(torch.float32, 64))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 70), st.integers(1, 70), st.integers(1, 70), st.integers(1, 9), st.data())
def test_moe_experts_at_any_shape(T, H, I, E, data):
    """Defends: every combination of block edges.

    Of positive numbers: where one row of one unit is all there is, a sum that cancels has any relative error.
    """
    k = data.draw(st.integers(1, E))
    torch.manual_seed(
        T + 71 * (H + 71 * (I + 71 * (E + 10 * k)))
    )  # the same numbers when a case is tried again
    x, index, weights, gate_up, down = experts_inputs(T, H, I, E, k)
    check_experts([x.abs(), index, weights, gate_up.abs(), down.abs()], torch.rand(T, H) + 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("N", [5, 1100])
def test_numbers_that_are_not_finite_reach_what_they_are_part_of(N, transpose, dtype):
    """Defends: a zero that skips the weight it multiplies; an expert's NaN in its neighbour; few rows and many, more
    columns than a task has, a contraction whose last pair is half."""
    K, offsets = 33, torch.tensor([0, 1, 3, 6, 6, 26])
    x, weight = torch.randn(26, K).to(dtype), torch.randn(5, K, N).to(dtype)
    x[:, 7] = 0
    for first in (0, 1, 3, 6):  # of each expert
        x[first, 3], x[first + (first > 0), 4] = torch.inf, torch.nan
    weight[:4, 7, 0] = torch.inf  # times zero
    weight[1:, 2, N - 1] = -torch.inf
    weight[4, K - 1, 2] = torch.nan
    weight[3] = torch.nan  # of nobody
    given = weight.transpose(1, 2).contiguous() if transpose else weight
    got = sk.grouped_gemm(x, given, offsets, transpose_weight=transpose).double()
    want = reference.grouped_gemm(x.double(), weight.double(), offsets, transpose_weight=False)
    finite = want.isfinite()
    assert 0 < finite.sum() < finite.numel()
    torch.testing.assert_close(got[~finite], want[~finite], rtol=0, atol=0, equal_nan=True)
    assert_close(got[finite], want[finite], tolerance(dtype, K))


@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("R, N, K, E", [(0, 5, 3, 2), (1, 1, 1, 1), (9, 67, 33, 4), (400, 130, 300, 3)])
def test_grouped_gemm_equals_reference(backend, R, N, K, E, transpose):
    """Defends: both layouts, their gradients in each other's kernel, depth past one panel."""
    cuts = torch.randint(0, R + 1, (E - 1,)).sort().values
    offsets = torch.cat([torch.zeros(1), cuts, torch.full((1,), R)]).int()
    x, weight = torch.randn(R, K), torch.randn((E, N, K) if transpose else (E, K, N))
    got = value_and_grads(
        lambda x, w: sk.grouped_gemm(x, w, offsets, transpose_weight=transpose), [x, weight]
    )
    want = value_and_grads(
        lambda x, w: reference.grouped_gemm(x, w, offsets, transpose_weight=transpose),
        [x.double(), weight.double()],
    )
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(torch.float32, max(R, N, K)))


@pytest.mark.parametrize("accumulate", [False, True])
def test_grouped_outer_writes_or_adds(accumulate):
    """Defends: an idle expert gets zero when writing and is left alone when adding."""
    offsets = torch.tensor([0, 0, 300, 307], dtype=torch.int32)
    a, b = torch.randn(307, 37), torch.randn(307, 80)
    out = torch.randn(3, 37, 80)
    want = reference.grouped_outer(a.double(), b.double(), offsets) + (out.double() if accumulate else 0)
    grouped_outer_(out, a, b, offsets, accumulate=accumulate)
    assert_close(out, want, tolerance(torch.float32, 307))


@pytest.mark.parametrize("k", [1, 3])
def test_permute_and_unpermute(backend, k):
    """Defends: the map and its inverse; the gradient of the weights."""
    T, H, E = 50, 37, 7
    index = torch.stack([torch.randperm(E)[:k] for _ in range(T)])
    x, weights = torch.randn(T, H), torch.rand(T, k)

    def round_trip(op_permute, op_unpermute, x, weights):
        return op_unpermute(op_permute(x).sin(), weights)

    routing = sk.group_by_expert(index, E, weights)
    got = value_and_grads(
        lambda x, w: sk.unpermute(sk.permute(x, routing).sin(), routing._replace(weights=w)), [x, weights]
    )
    want = value_and_grads(lambda x, w: w.sum(1, keepdim=True) * x.sin(), [x.double(), weights.double()])
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(torch.float32, H))


def test_same_bits_at_any_thread_count():
    """Defends: determinism, as the docstring promises it."""
    inputs = experts_inputs(300, 128, 96, 12, 2)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(value_and_grads(sk.moe_experts, inputs))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
