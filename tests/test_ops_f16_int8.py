"""f16 tensors, summed in f32 and rounded once; weights of one byte, forward only."""

import pytest
import torch
from support import assert_close, tolerance, value_and_grads
from test_ops_experts import SHAPES, experts_inputs

import sigma_kernels as sk
from sigma_kernels import reference

ROUNDED_ONCE = 2.0**-11


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_f16_is_rounded_once(shape):
    """Defends: conversions at ragged ends, empty experts, intermediate roundings."""
    inputs = [x.half() if x.dtype.is_floating_point else x for x in experts_inputs(*shape)]
    grad_out = torch.randn(inputs[0].shape).half()
    got = value_and_grads(sk.moe_experts, inputs, grad_out)
    wide = [x.double() if x.dtype.is_floating_point else x for x in inputs]
    want = value_and_grads(reference.moe_experts, wide, grad_out.double())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float16
        assert_close(g, w, ROUNDED_ONCE + tolerance(torch.float32, max(*inputs[0].shape, inputs[4].shape[2])))


def test_f16_through_permute_grouped_gemm_and_unpermute():
    routing = sk.route(torch.randn(60, 5), 2)
    routing = routing._replace(weights=routing.weights.half())
    x, weight = torch.randn(60, 33).half(), torch.randn(5, 19, 33).half()

    def layer(x, w):
        return sk.unpermute(sk.grouped_gemm(sk.permute(x, routing), w, routing.offsets), routing)

    got = value_and_grads(layer, (x, weight))
    rows = x.double()[(routing.row_map // 2).long()]
    y = reference.grouped_gemm(rows, weight.double(), routing.offsets)
    want = reference.unpermute(y, routing.row_map, routing.weights.double(), 2, 60)
    assert_close(got[0], want, 3 * ROUNDED_ONCE + tolerance(torch.float32, 33))


def test_every_half_survives_and_sums_beyond_it_are_infinite():
    """Defends: denormals, infinity and the halfway cases of the conversion without an instruction."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    halves = bits.view(torch.float16)
    ones = torch.eye(1)[None].half()
    finite = halves[halves.isfinite()][:, None]
    assert torch.equal(sk.grouped_gemm(finite, ones, torch.tensor([0, len(finite)])), finite + 0)
    big = torch.full((1, 2), 60000.0).half()
    assert sk.grouped_gemm(big, torch.ones(1, 1, 2).half(), torch.tensor([0, 1])).isinf().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_equals_its_definition(shape, dtype):
    """Defends: the factors of gate, up and down channels, tails of bytes, rows scattered to tokens."""
    x, index, weights, gate_up, down = experts_inputs(*shape)
    x, weights = x.to(dtype), weights.to(dtype)
    (g, gs), (d, ds) = sk.quantize_experts(gate_up), sk.quantize_experts(down)
    got = sk.moe_experts_int8(x, index, weights, g, gs, d, ds)
    real = (g.double() * gs[..., None]), (d.double() * ds[..., None])
    want = reference.moe_experts(x.double(), index, weights.double(), *real)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: ROUNDED_ONCE}[dtype]
    assert got.dtype == dtype
    assert_close(got, want, rounding + tolerance(torch.float32, max(*x.shape, down.shape[2])))
    with sk.backend("reference"):
        if dtype == torch.float32:
            assert_close(sk.moe_experts_int8(x, index, weights, g, gs, d, ds), want, tolerance(dtype, 512))


def test_int8_error_against_f32_is_that_of_the_rounding():
    """Each weight is off by at most half a step, 1/254 of the largest of its channel; two GEMMs deep."""
    x, index, weights, gate_up, down = experts_inputs(256, 512, 256, 16, 1)
    (g, gs), (d, ds) = sk.quantize_experts(gate_up), sk.quantize_experts(down)
    assert ((g * gs[..., None] - gate_up).abs() <= gs[..., None] * 0.5001).all()
    exact = sk.moe_experts(x, index, weights, gate_up, down)
    error = (sk.moe_experts_int8(x, index, weights, g, gs, d, ds) - exact).square().mean().sqrt()
    assert 0.005 <= error / exact.square().mean().sqrt() <= 0.016  # 0.0126 on average


def test_int8_refuses():
    x, index, weights, gate_up, down = experts_inputs(4, 6, 5, 3, 1)
    (g, gs), (d, ds) = sk.quantize_experts(gate_up), sk.quantize_experts(down)
    with pytest.raises(RuntimeError, match="forward only"):
        sk.moe_experts_int8(x.requires_grad_(), index, weights, g, gs, d, ds)
    x = x.detach()
    with pytest.raises(TypeError, match=r"gate_up_proj must be torch.int8, found torch.float32"):
        sk.moe_experts_int8(x, index, weights, gate_up, gs, d, ds)
    with pytest.raises(ValueError, match=r"down_scale must be \[3, 6\], found \[3, 5\]"):
        sk.moe_experts_int8(x, index, weights, g, gs, d, ds[:, :5])
    with pytest.raises(ValueError, match=r"expert indices must lie in 0\.\.2"):
        sk.moe_experts_int8(x, index + 3, weights, g, gs, d, ds)
    gate_up[1, 2, 0] = torch.inf
    with pytest.raises(ValueError, match="must be finite, found inf in expert 1, channel 2"):
        sk.quantize_experts(gate_up)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
def test_int8_has_no_silent_derivative():
    """Defends: tangents that are zero, gradients that stop without a word."""
    x, index, weights, gate_up, down = experts_inputs(4, 6, 5, 3, 1)
    (g, gs), (d, ds) = sk.quantize_experts(gate_up), sk.quantize_experts(down)

    def layer(x):
        return sk.moe_experts_int8(x, index, weights, g, gs, d, ds)

    with pytest.raises(RuntimeError, match="forward only"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        torch.func.jvp(layer, (x,), (x,))


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-37, 1.0, 1e37])
def test_quantized_weights_are_off_by_half_a_step_at_any_size(size):
    """Defends: factors that are denormal or zero, integers that wrap."""
    weight = (torch.rand(2, 5, 7) - 0.5) * size
    values, scale = sk.quantize_experts(weight)
    assert values.abs().max() <= 127
    assert scale.min() > 0
    error = (weight.double() - values.double() * scale[..., None].double()).abs()
    assert (error <= 0.5001 * scale[..., None]).all()


def test_int8_opcheck():
    x, index, weights, gate_up, down = experts_inputs(9, 6, 5, 3, 2)
    (g, gs), (d, ds) = sk.quantize_experts(gate_up), sk.quantize_experts(down)
    torch.library.opcheck(torch.ops.sigma.moe_experts_inference.default, (x, index, weights, g, d, gs, ds))
