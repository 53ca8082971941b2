"""The single operations in Triton equal the reference: grouped products, permutations, accumulation."""

import pytest
import torch
from support import assert_close, tolerance, value_and_grads

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.ops.grouped_gemm import grouped_outer_
from sigma_kernels.triton import product

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def some_offsets(R: int, E: int) -> torch.Tensor:
    cuts = torch.randint(0, R + 1, (E - 1,)).sort().values
    return torch.cat([torch.zeros(1), cuts, torch.full((1,), R)]).int()


def depth(dtype: torch.dtype, *sizes: int) -> int:
    """Of the rounding that counts: f32 rounds each of a sum's terms, narrow types their result alone."""
    return max(sizes) if dtype == torch.float32 else 4


SMALL = [(0, 5, 3, 2), (1, 1, 1, 1), (9, 67, 33, 4)]
LARGE = (400, 300, 270, 3)  # of narrow types one layout each: both are in each other's gradient


@pytest.mark.parametrize(
    "R, N, K, E, transpose, dtype",
    [(*shape, transpose, dtype) for shape in SMALL for transpose in (True, False) for dtype in DTYPES]
    + [(*LARGE, True, torch.float32), (*LARGE, False, torch.float32)]
    + [(*LARGE, True, torch.bfloat16), (*LARGE, False, torch.float16)],
    ids=str,
)
def test_grouped_gemm_equals_reference(backend, R, N, K, E, transpose, dtype):
    """Defends: both layouts, their gradients in each other's kernel, depth past one block."""
    offsets = some_offsets(R, E)
    x = torch.randn(R, K).to(dtype)
    weight = torch.randn((E, N, K) if transpose else (E, K, N)).to(dtype)
    got = value_and_grads(
        lambda x, w: sk.grouped_gemm(x, w, offsets, transpose_weight=transpose), [x, weight]
    )
    want = value_and_grads(
        lambda x, w: reference.grouped_gemm(x, w, offsets, transpose_weight=transpose),
        [x.double(), weight.double()],
        torch.linspace(-1, 1, R * N, dtype=dtype).view(R, N).double(),
    )
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(dtype, depth(dtype, R, N, K)))


@every_dtype
@pytest.mark.parametrize("shape", [(96, 64, 80), (100, 72, 140)], ids=str)
def test_descriptors_and_pointers_fetch_the_same(backend, monkeypatch, shape, dtype):
    """Defends: a block past the last column or the end of the depth, both layouts, an expert's first row."""
    R, N, K = shape
    offsets, x = some_offsets(R, 3), torch.randn(R, K).to(dtype)
    for weight, transpose in ((torch.randn(3, N, K), True), (torch.randn(3, K, N), False)):
        got = sk.grouped_gemm(x, weight.to(dtype), offsets, transpose_weight=transpose)
        with monkeypatch.context() as patch:
            patch.setattr(product, "has_tma", lambda dtype, device: False)
            want = sk.grouped_gemm(x, weight.to(dtype), offsets, transpose_weight=transpose)
        assert torch.equal(got, want)


@every_dtype
@pytest.mark.parametrize("accumulate", [False, True])
def test_grouped_outer_writes_or_adds(backend, accumulate, dtype):
    """Defends: an idle expert gets zero when writing and is left alone when adding."""
    offsets = torch.tensor([0, 0, 300, 307], dtype=torch.int32)
    a, b, out = (torch.randn(*shape).to(dtype) for shape in ((307, 37), (307, 80), (3, 37, 80)))
    want = reference.grouped_outer(a.double(), b.double(), offsets) + (out.double() if accumulate else 0)
    grouped_outer_(out, a, b, offsets, accumulate=accumulate)
    assert_close(out, want, tolerance(dtype, depth(dtype, 307)))


@every_dtype
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("T, H", [(0, 5), (1, 1), (50, 37), (70, 1030)])
def test_permute_and_unpermute(backend, T, H, k, dtype):
    """Defends: the map and its inverse; rows wider than a block; the gradient of the weights."""
    E = 7
    index = torch.stack([torch.randperm(E)[:k] for _ in range(T)]) if T else torch.zeros(0, k).long()
    x, weights = torch.randn(T, H).to(dtype), torch.rand(T, k).to(dtype)
    routing = sk.group_by_expert(index, E, weights)
    grad = torch.randn(T, H).to(dtype)
    got = value_and_grads(
        lambda x, w: sk.unpermute(sk.permute(x, routing), routing._replace(weights=w)), [x, weights], grad
    )
    want = value_and_grads(
        lambda x, w: w.sum(1, keepdim=True) * x, [x.double(), weights.double()], grad.double()
    )
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(dtype, depth(dtype, H)))


def test_non_contiguous_rows(backend):
    routing = sk.group_by_expert(torch.randint(0, 5, (40, 2)), 5)
    wide = torch.randn(40, 100)
    for x in (wide[:, 7:55], wide.t().contiguous().t()[:, :48], wide[:, ::2]):
        assert torch.equal(sk.permute(x, routing), reference.permute(x, routing.row_map, 2))


@pytest.mark.parametrize("k", [1, 2])
def test_accumulate_grad(backend, k):
    """Defends: gradients added where they are computed, idle experts' left as they are."""
    T, H, I, E = 30, 24, 20, 6
    x, index = torch.randn(T, H), torch.randint(0, E - 1, (T, k))
    weights = torch.rand(T, k)
    gate_up = torch.randn(E, 2 * I, H, requires_grad=True)
    down = torch.randn(E, H, I, requires_grad=True)
    with sk.accumulate_grad():
        sk.moe_experts(x, index, weights, gate_up, down).sum().backward()
        once = [p.grad.clone() for p in (gate_up, down)]
        sk.moe_experts(x, index, weights, gate_up, down).sum().backward()
    for p, g in zip((gate_up, down), once, strict=True):
        assert_close(p.grad, 2 * g, tolerance(torch.float32, T))
