"""Weights in fp8 e4m3: how they are rounded, what the layer makes of them, and what it refuses."""

import pytest
import torch
from test_ops_experts import experts_inputs

import sigma_kernels as sk

FP8 = torch.float8_e4m3fn
by_both = pytest.mark.parametrize("block", [None, 128])


def quantized(*weights: torch.Tensor, block: int | None) -> list[torch.Tensor]:
    return [x for w in weights for x in sk.quantize_experts(w, FP8, block=block)]


def whole(scale: torch.Tensor, N: int, K: int) -> torch.Tensor:
    if scale.dim() == 2:
        return scale[..., None]
    return scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :N, :K]


@by_both
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-37, 1.0, 1e37])
@pytest.mark.parametrize("N, K", [(5, 7), (130, 257), (128, 128)])
def test_quantized_weights_are_off_by_what_e4m3_explains(N, K, size, block):
    """Defends: blocks at the edge, denormal factors, numbers that overflow to NaN."""
    weight = (torch.rand(2, N, K) - 0.5) * size
    values, scale = sk.quantize_experts(weight, FP8, block=block)
    assert scale.shape == ((2, N) if block is None else (2, -(-N // 128), -(-K // 128)))
    s = whole(scale, N, K).double()
    error = (weight.double() - values.double() * s).abs()
    assert (error <= torch.maximum(weight.double().abs() / 16, s / 1024) * 1.001).all()


def test_a_block_is_scaled_by_its_own_largest():
    weight = torch.ones(1, 200, 300)
    weight[0, 150, 280] = -896
    _, scale = sk.quantize_experts(weight, FP8, block=128)
    want = torch.full((1, 2, 3), 1 / 448)
    want[0, 1, 2] = 2
    torch.testing.assert_close(scale, want)


@by_both
def test_error_against_f32_is_that_of_the_rounding(block):
    """Weights and rows are each off by 2.6 % of their size on average, twice; no more is added in between."""
    x, index, weights, gate_up, down = experts_inputs(256, 512, 256, 16, 1)
    exact = sk.moe_experts(x, index, weights, gate_up, down)
    with sk.backend("reference"):
        got = sk.moe_experts_fp8(x, index, weights, *quantized(gate_up, down, block=block))
    assert 0.05 <= (got - exact).norm() / exact.norm() <= 0.07


def test_on_a_cpu_it_says_that_there_is_no_kernel():
    x, index, weights, gate_up, down = experts_inputs(4, 6, 5, 3, 1)
    with pytest.raises(
        RuntimeError, match=r"no backend can run moe_experts_fp8 here: 'triton': it runs on cuda"
    ):
        sk.moe_experts_fp8(x, index, weights, *quantized(gate_up, down, block=None))


def test_refuses():
    x, index, weights, gate_up, down = experts_inputs(4, 6, 5, 3, 1)
    g, gs, d, ds = quantized(gate_up, down, block=None)
    with pytest.raises(RuntimeError, match="forward only"):
        sk.moe_experts_fp8(x.requires_grad_(), index, weights, g, gs, d, ds)
    x = x.detach()
    with pytest.raises(TypeError, match=r"gate_up_proj must be torch.float8_e4m3fn, found torch.float32"):
        sk.moe_experts_fp8(x, index, weights, gate_up, gs, d, ds)
    with pytest.raises(ValueError, match=r"gate_up_scale must be \[3, 1, 1\], found \[3, 10\]"):
        sk.moe_experts_fp8(x, index, weights, g, gs, d, ds[:, :1, None])
    with pytest.raises(ValueError, match=r"down_scale must be \[3, 6\], found \[3, 5\]"):
        sk.moe_experts_fp8(x, index, weights, g, gs, d, ds[:, :5])
    with sk.backend("reference"), pytest.raises(ValueError, match=r"expert indices must lie in 0\.\.2"):
        sk.moe_experts_fp8(x, index + 3, weights, g, gs, d, ds)
    with pytest.raises(
        TypeError, match=r"dtype must be torch.int8 or torch.float8_e4m3fn, found torch.float8_e5m2"
    ):
        sk.quantize_experts(gate_up, torch.float8_e5m2)
    for dtype, block in ((torch.int8, 128), (FP8, 64)):
        with pytest.raises(ValueError, match=f"block must be None, or 128 for fp8, found {block}"):
            sk.quantize_experts(gate_up, dtype, block=block)
    gate_up[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite, found nan in expert 1, channel 2"):
        sk.quantize_experts(gate_up, FP8, block=128)


@by_both
def test_opcheck(block):
    """All but test_schema, whose copies torch cannot make in fp8."""
    x, index, weights, gate_up, down = experts_inputs(9, 6, 5, 3, 2)
    g, gs, d, ds = quantized(gate_up, down, block=block)
    torch.library.opcheck(
        torch.ops.sigma.moe_experts_fp8.default,
        (x.double(), index, weights.double(), g, d, gs, ds),
        test_utils=["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"],
    )
