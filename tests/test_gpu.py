"""What only a GPU shows: `pytest --device cuda`.

Real sizes, equal bits under every schedule, no wait for the device, graphs, addresses past 32 bits.
"""

import pytest
import torch
from support import assert_close, tolerance, value_and_grads
from test_ops_experts import experts_inputs
from test_ops_fp8 import quantized
from test_ops_route import check_order
from test_ops_route_with_sums import check_sums

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.ops.grouped_gemm import grouped_outer_

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
by_backend = pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
LAYERS = {  # T, H, I, E, k
    "sigma-moe-tiny": (2048, 1536, 768, 96, 1),
    "qwen3-30b-a3b": (512, 2048, 768, 128, 8),
    "mixtral-tp8": (300, 4096, 1792, 8, 2),
    "odd": (777, 1030, 517, 40, 3),
    "long": (9000, 512, 256, 16, 1),
}


def crowded(index: torch.Tensor) -> torch.Tensor:
    """Half of the tokens' first choice is expert 1: every kind of tile is met."""
    index = index.clone()
    index[::2, 0] = 1
    return index


def close_in_norm(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    assert got.isfinite().all()
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error <= bound, f"off by {error:.1e}, allowed are {bound:.1e}"


def norm_bound(dtype: torch.dtype, *sizes: int) -> float:
    """Of the rounding that counts: f32 rounds each of a sum's terms, narrow types their result alone."""
    return torch.finfo(dtype).eps * (max(sizes) ** 0.5 if dtype == f32 else 1)


@by_backend
@pytest.mark.parametrize("dtype", [bf16, f16, f32], ids=str)
@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
def test_experts_at_real_sizes(backend, shape, dtype):
    """Defends: matrix instructions, pipelines and barriers, which no interpreter and no emulator has."""
    if backend == "cuda" and dtype == f32:
        pytest.skip("products of f32 are Triton's alone")
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in experts_inputs(*shape)]
    inputs[1] = crowded(inputs[1])
    grad_out = torch.randn(inputs[0].shape).to(dtype)
    got = value_and_grads(sk.moe_experts, inputs, grad_out)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    want = value_and_grads(reference.moe_experts, wide, grad_out.double())
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(dtype, max(shape) if dtype == f32 else 4))
        close_in_norm(g, w, norm_bound(dtype, *shape))
    with torch.no_grad():
        assert_close(sk.moe_experts(*inputs), want[0], tolerance(dtype, max(shape) if dtype == f32 else 4))


def test_tf32_where_torch_allows_it(monkeypatch):
    """Defends: the setting not heard; errors that TF32's 10 bits do not explain."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    inputs = experts_inputs(600, 1024, 512, 24, 1)
    grad_out = torch.randn(600, 1024)
    with sk.backend("triton"):
        got = value_and_grads(sk.moe_experts, inputs, grad_out)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    want = value_and_grads(reference.moe_experts, wide, grad_out.double())
    for g, w in zip(got, want, strict=True):
        close_in_norm(g, w, 4e-3)
    x, w = torch.randn(300, 1024), torch.randn(1, 512, 1024)
    exact = x.double() @ w[0].double().T
    with sk.backend("triton"):
        ours = sk.grouped_gemm(x, w, torch.tensor([0, 300], dtype=torch.int32))
    off, theirs = ((y - exact).norm() / exact.norm() for y in (ours, x @ w[0].T))
    assert 1e-5 < off <= 4 * theirs, (off, theirs)  # theirs rounds to 10 bits, units alone cut them off


@by_backend
@pytest.mark.parametrize("score, normalize", [("softmax", False), ("softmax", True), ("sigmoid", True)])
@pytest.mark.parametrize("T, E, k", [(65_536, 96, 1), (20_000, 256, 8), (3000, 1024, 2), (100_000, 7, 3)])
def test_route_at_real_sizes(backend, T, E, k, score, normalize):
    """Defends: counts and ranks across many blocks, sums of many rows."""
    logits = torch.randn(T, E).mul_(2).requires_grad_()
    check_sums(logits, k, score, depth=T, score=score, normalize=normalize)
    routing = sk.route(logits.detach(), k, score=score, normalize=normalize)
    check_order(routing.indices, routing, E)


@by_backend
@pytest.mark.parametrize("dtype", [bf16, f16, f32], ids=str)
@pytest.mark.parametrize("T, H, k", [(8192, 1536, 1), (3000, 1030, 8)])
def test_permutations_at_real_sizes(backend, T, H, k, dtype):
    index = torch.randint(0, 96, (T, k))
    routing = sk.group_by_expert(index, 96)
    check_order(index, routing, 96)
    x, weights = torch.randn(T, H).to(dtype), torch.rand(T, k).to(dtype)
    grad = torch.randn(T, H).to(dtype)

    def through(permute, unpermute):
        return lambda x, w: unpermute(2 * permute(x, routing.row_map, k), routing.row_map, w, k, len(x))

    ops = torch.ops.sigma
    got = value_and_grads(through(ops.permute, ops.unpermute), [x, weights], grad)
    wide = [x.double(), weights.double()]
    want = value_and_grads(through(reference.permute, reference.unpermute), wide, grad.double())
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(dtype, H))


def counts_at_edges(E: int) -> torch.Tensor:
    """Offsets of experts whose counts are at the edges of every tile, in random order, the last ones crowded."""
    edges = torch.tensor([0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 300, 0])
    counts = edges.repeat(E // len(edges) + 1)[torch.randperm(E)]
    return torch.cat([torch.zeros(1), counts.cumsum(0)]).int()


@by_backend
@pytest.mark.parametrize("dtype", [bf16, f16, f32], ids=str)
@pytest.mark.parametrize("transpose", [True, False])
@pytest.mark.parametrize("N, K, E", [(1024, 512, 96), (264, 1000, 33), (517, 1031, 5), (2048, 7168, 8)])
def test_products_at_real_sizes(backend, N, K, E, transpose, dtype):
    """Defends: an expert without a tile, both layouts, depths that no stage divides, the gradient of the weights."""
    if backend == "cuda" and dtype == f32:
        pytest.skip("products of f32 are Triton's alone")
    offsets = counts_at_edges(E)
    x = torch.randn(int(offsets[-1]), K).to(dtype)
    weight = torch.randn((E, N, K) if transpose else (E, K, N)).to(dtype) / K**0.5
    grad = torch.randn(x.shape[0], N).to(dtype)

    def product(of):
        return lambda x, w: of(x, w, offsets, transpose_weight=transpose)

    got = value_and_grads(product(sk.grouped_gemm), [x, weight], grad)
    want = value_and_grads(product(reference.grouped_gemm), [x.double(), weight.double()], grad.double())
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(dtype, max(N, K) if dtype == f32 else 4))
        close_in_norm(g, w, norm_bound(dtype, N, K))
    with sk.backend("reference"):
        added = torch.randn(weight.shape).to(dtype)
    a, b = (grad, x) if transpose else (x, grad)
    total = added.double() + want[2]
    grouped_outer_(added, a, b, offsets, accumulate=True)
    assert_close(added, total, tolerance(dtype, 600 if dtype == f32 else 4))


@pytest.mark.parametrize("block", [None, 128])
def test_fp8_at_real_sizes(block):
    x, index, weights, gate_up, down = experts_inputs(2048, 1536, 768, 96, 1)
    narrow = quantized(gate_up, down, block=block)
    x, weights = x.bfloat16(), weights.bfloat16()
    got = sk.moe_experts_fp8(x, crowded(index), weights, *narrow)
    with sk.backend("reference"):
        want = sk.moe_experts_fp8(x.float(), crowded(index), weights.float(), *narrow)
    assert (got - want).norm() <= 0.02 * want.norm()


def test_int8_at_real_sizes():
    x, index, weights, gate_up, down = experts_inputs(512, 1536, 768, 96, 1)
    narrow = [*sk.quantize_experts(gate_up), *sk.quantize_experts(down)]
    x, weights = x.bfloat16(), weights.bfloat16()
    got = sk.moe_experts_int8(x, index, weights, *narrow)
    whole = [narrow[i].double() * narrow[i + 1].double()[..., None] for i in (0, 2)]
    want = reference.moe_experts(x.double(), index, weights.double(), *whole)
    close_in_norm(got, want, 0.02)


@by_backend
def test_same_bits_beside_other_work(backend):
    """Defends: a sum whose order the schedule decides, memory that another stream's launch writes."""
    inputs = [x.to(bf16) if x.is_floating_point() else x for x in experts_inputs(2000, 512, 384, 48, 2)]
    inputs[1] = crowded(inputs[1])
    logits, grad_out = torch.randn(2000, 48), torch.randn(2000, 512).to(bf16)

    def step() -> list[torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        routing, sums = sk.route_with_sums(leaf, 2)
        (routing.weights.square().sum() + sums.probabilities.square().sum() + sums.square).backward()
        return [*routing, sums.square, leaf.grad, *value_and_grads(sk.moe_experts, inputs, grad_out)]

    want = step()
    streams = [torch.cuda.Stream() for _ in range(3)]
    noise = torch.randn(2048, 2048)
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                noise @ noise
                found.append(step())
    torch.cuda.synchronize()
    for got in found:
        assert all(map(torch.equal, want, got))


@by_backend
@pytest.mark.parametrize("k", [1, 2])
def test_a_step_waits_for_nothing_and_a_graph_replays_it(backend, k):
    """Defends: a value asked for, memory that a graph does not own, a schedule fixed when the graph was captured."""
    layer = sk.nn.MoE(512, 256, 32, top_k=k).to(bf16)
    x = torch.randn(1024, 512, dtype=bf16)
    grad_out = torch.randn(1024, 512, dtype=bf16)

    def step() -> list[torch.Tensor]:
        for p in layer.parameters():
            p.grad = None
        leaf = x.requires_grad_()
        leaf.grad = None
        out = layer(leaf)
        losses = sk.nn.load_balancing_loss(layer.last_sums, layer.last_routing.counts)
        torch.autograd.backward([out, losses], [grad_out, torch.ones_like(losses)])
        return [out.detach(), layer.last_routing.counts, leaf.grad, *(p.grad for p in layer.parameters())]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    for scale in (1.0, 3.0, 0.0):  # the last: all tokens to one expert
        with torch.no_grad():
            x.copy_(torch.randn(1024, 512).to(bf16) * scale)
        graph.replay()
        got = [t.clone() for t in held]
        want = step()
        assert all(map(torch.equal, got, want))


def test_compiled_by_inductor():
    """Defends: shapes that the fakes promise and the kernels do not keep, strides that inductor chooses."""
    torch._dynamo.reset()
    layer = sk.nn.MoE(256, 128, 16, top_k=2).to(bf16)
    x = torch.randn(300, 256, dtype=bf16)
    compiled = torch.compile(layer, fullgraph=True)
    grads = []
    for call in (layer, compiled):
        layer.zero_grad()
        call(x).float().square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(b, a.double(), 8 * torch.finfo(bf16).eps)


@by_backend
def test_rows_beyond_what_32_bits_count(backend):
    """Defends: an address computed in 32 bits, of rows, of weights and of results."""
    T, H, E, N = 2**31 // 2048 + 3000, 2048, 2, 64  # 4.3 GB, of which there are up to four
    index = (torch.arange(T) % 7 == 0).long()[:, None]
    x = torch.zeros(T, H, dtype=bf16)
    rows = torch.cat([torch.arange(50), torch.arange(T - 2950, T)])
    x[rows] = torch.randn(len(rows), H).to(bf16)
    routing = sk.group_by_expert(index, E, torch.ones(T, 1, dtype=bf16))
    packed = sk.permute(x, routing)
    assert torch.equal(packed[-1], x[routing.row_map[-1].long()])
    weight = torch.randn(E, N, H).to(bf16) / H**0.5
    out = sk.grouped_gemm(packed, weight, routing.offsets)
    back = sk.unpermute(out, routing)
    want = torch.einsum("th,tnh->tn", x[rows].double(), weight[index[rows, 0]].double())
    assert_close(back[rows], want, tolerance(bf16, 4))
    wide = sk.grouped_gemm(
        out, weight.mT.contiguous(), routing.offsets
    )  # [T, H] once more, written past 32 bits
    last = wide[-5:].double()
    assert_close(last, out[-5:].double() @ weight[1].double(), tolerance(bf16, 4))


def test_weights_beyond_what_32_bits_count():
    """Defends: an expert's place, or a place along K, in 32 bits."""
    E, N, K = 600, 2048, 2048
    weight = torch.zeros(E, N, K, dtype=bf16)
    weight[E - 1] = torch.randn(N, K).to(bf16)
    x = torch.randn(40, K).to(bf16)
    offsets = torch.zeros(E + 1, dtype=torch.int32)
    offsets[E] = 40
    far = torch.empty(2_500_000 * 1024).as_strided((1, 16, 1024), (0, 1, 2_500_000))
    far.copy_(torch.randn(1, 16, 1024))
    y = torch.randn(3, 1024)
    for backend in ("triton", "cuda"):
        with sk.backend(backend):
            got = value_and_grads(
                lambda x: sk.grouped_gemm(x, weight, offsets), [x], torch.ones(40, N).to(bf16)
            )
            assert_close(got[0], x.double() @ weight[-1].double().T, tolerance(bf16, 4))
            assert_close(got[1], torch.ones(40, N).double() @ weight[-1].double(), tolerance(bf16, 4))
    with sk.backend("triton"):
        ends = torch.tensor([0, 3], dtype=torch.int32)
        assert_close(sk.grouped_gemm(y, far, ends), y.double() @ far[0].double().T, tolerance(f32, 1024))
