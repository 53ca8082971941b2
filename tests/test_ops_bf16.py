"""bf16 tensors: sums in f32, results rounded once; on processors that multiply bf16 the operands between GEMMs too."""

import pytest
import torch
from support import assert_close, tolerance, value_and_grads
from test_ops_experts import SHAPES, experts_inputs

import sigma_kernels as sk
from sigma_kernels import reference

ROUNDED_ONCE = 2.0**-8  # half a unit in the last place of 8 bits, and as much again for ties on the way
# Where bf16 is multiplied in hardware the operands between two GEMMs are rounded as well.  An error is then as large as
# that of the largest terms, and a token or expert of large values beside small ones shows it: the mean is the measure.
OPERANDS_ROUNDED = sk._C.multiplies_bf16()


def bf16_inputs(*shape: int) -> list[torch.Tensor]:
    return [x.bfloat16() if x.dtype.is_floating_point else x for x in experts_inputs(*shape)]


def check(inputs: list[torch.Tensor]) -> None:
    """Against f64 on the same bf16 numbers: one rounding of the result and the f32 sums' own error."""
    grad_out = torch.randn(inputs[0].shape).bfloat16()
    got = value_and_grads(sk.moe_experts, inputs, grad_out)
    wide = [x.double() if x.dtype.is_floating_point else x for x in inputs]
    want = value_and_grads(reference.moe_experts, wide, grad_out.double())
    depth = max(*inputs[0].shape, inputs[4].shape[2])
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.bfloat16
        bound = ROUNDED_ONCE + tolerance(torch.float32, depth)
        if OPERANDS_ROUNDED and g.numel():
            error = (g.double() - w).square().mean().sqrt() / w.square().mean().sqrt().clamp(min=1e-30)
            assert error <= bound, f"mean relative error {error:.2e} over {bound:.2e}"
            bound *= 8
        assert_close(g, w, bound)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_is_rounded_once(shape):
    """Defends: conversions at ragged ends, empty experts, the packed panel, intermediate roundings."""
    check(bf16_inputs(*shape))


def test_a_crowded_expert_is_rounded_once():
    """Defends: weight gradients summed over several passes in bf16."""
    inputs = bf16_inputs(1500, 48, 40, 3, 1)
    inputs[1] = torch.zeros_like(inputs[1])
    check(inputs)


def test_a_real_size():
    check(bf16_inputs(1024, 512, 256, 48, 1))


def test_tokens_whole_pages_apart():
    """Defends: rows of bf16 that are copied, in the layer."""
    check(bf16_inputs(120, 2048, 40, 5, 1))


@pytest.mark.parametrize("R, N, K", [(0, 5, 7), (1, 1, 1), (60, 33, 17), (300, 96, 130), (700, 20, 64)])
def test_grouped_gemm_in_bf16(R, N, K):
    """Defends: both layouts and the weight gradient at odd contractions, whose last pair is half; few and many rows."""
    offsets = torch.tensor([0, R // 9, R // 9, R])
    x = torch.randn(R, K).bfloat16()
    for transposed in (True, False):
        weight = torch.randn(3, *((N, K) if transposed else (K, N))).bfloat16()

        def gemm(x, w, transposed=transposed):
            return sk.grouped_gemm(x, w, offsets, transpose_weight=transposed)

        def wanted(x, w, transposed=transposed):
            return reference.grouped_gemm(x, w, offsets, transpose_weight=transposed)

        grad = torch.randn(R, N).bfloat16()
        got = value_and_grads(gemm, (x, weight), grad)
        want = value_and_grads(wanted, (x.double(), weight.double()), grad.double())
        for g, w in zip(got, want, strict=True):
            assert g.dtype == torch.bfloat16
            assert_close(g, w, ROUNDED_ONCE + tolerance(torch.float32, max(R, N, K)))


def test_permute_and_unpermute_in_bf16():
    """Defends: the weighted sum of k rows rounded once, and its two gradients."""
    routing = sk.route(torch.randn(70, 9), 3)
    routing = routing._replace(weights=routing.weights.bfloat16())
    x = torch.randn(70, 35).bfloat16()
    rows = sk.permute(x, routing)
    assert torch.equal(rows, x[(routing.row_map // 3).long()])
    grad = torch.randn(70, 35).bfloat16()
    got = value_and_grads(
        lambda y, w: sk.unpermute(y, routing._replace(weights=w)), (rows, routing.weights), grad
    )
    want = value_and_grads(
        lambda y, w: reference.unpermute(y, routing.row_map, w, 3, 70),
        (rows.double(), routing.weights.double()),
        grad.double(),
    )
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, ROUNDED_ONCE + tolerance(torch.float32, 35))


def test_same_bits_at_any_thread_count():
    inputs = bf16_inputs(300, 130, 70, 9, 2)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(value_and_grads(sk.moe_experts, inputs))
    torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_strided_inputs():
    x, index, weights, gate_up, down = bf16_inputs(40, 32, 24, 5, 1)
    wide = torch.empty(40, 64, dtype=torch.bfloat16)[:, ::2].copy_(x)
    turned = gate_up.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(
        sk.moe_experts(wide, index, weights, turned, down), sk.moe_experts(x, index, weights, gate_up, down)
    )


def test_opcheck_and_compile():
    x, index, weights, gate_up, down = bf16_inputs(20, 16, 12, 4, 1)
    routing = sk.group_by_expert(index, 4, weights)
    leaves = [t.requires_grad_() for t in (x, gate_up, down)]
    torch.library.opcheck(
        torch.ops.sigma.moe_experts.default,
        (leaves[0], weights, routing.offsets, routing.row_map, *leaves[1:]),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(sk.moe_experts, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(x, index, weights, gate_up, down), sk.moe_experts(x, index, weights, gate_up, down)
    )


def test_a_layer_in_bf16_trains():
    moe = sk.nn.MoE(32, 24, 8, output_scale=8.0, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
    x, target = torch.randn(64, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    losses = []
    for _ in range(30):
        loss = (moe(x) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
