"""Experts in f32 that compute in bf16 or f16: their copies' results, and gradients in f32 that nothing rounds."""

import pytest
import torch
import torch.distributed as dist
from support import assert_close, tolerance, value_and_grads
from test_ops_bf16 import OPERANDS_ROUNDED, ROUNDED_ONCE
from test_ops_experts import SHAPES, experts_inputs

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.ops import experts

DTYPES = [torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f16"])


def in_dtype(dtype: torch.dtype):
    return lambda *inputs: sk.moe_experts(*inputs, compute_dtype=dtype)


def through_copies(dtype: torch.dtype):
    """As it was written before: gradients of the copies are rounded, and then widened."""
    return lambda x, index, *rest: sk.moe_experts(x.to(dtype), index, *(t.to(dtype) for t in rest)).float()


def is_a_projection(i: int) -> bool:
    return i >= 3  # of the result and the gradients of x, weights, gate_up_proj and down_proj


@every_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (1500, 48, 40, 3, 1)], ids=str)
def test_is_what_copies_give_and_gradients_are_not_rounded(shape, dtype):
    """Defends: another kernel than for narrow weights, gradients rounded on their way, or summed from other rows."""
    inputs = experts_inputs(*shape)
    if shape[0] == 1500:  # one expert has all: more rows than are summed at once
        inputs[1] = torch.zeros_like(inputs[1])
    grad_out = torch.randn(inputs[0].shape).to(dtype).float()
    got = value_and_grads(in_dtype(dtype), inputs, grad_out)
    copied = value_and_grads(through_copies(dtype), inputs, grad_out)
    wide = [t.to(dtype).double() if t.dtype.is_floating_point else t for t in inputs]
    want = value_and_grads(reference.moe_experts, wide, grad_out.double())
    depth = max(*inputs[0].shape, inputs[4].shape[2])
    for i, (g, c, w) in enumerate(zip(got, copied, want, strict=True)):
        assert g.dtype == torch.float32
        assert torch.equal(g.to(dtype).float() if is_a_projection(i) else g, c)
        if is_a_projection(i) and not (OPERANDS_ROUNDED and dtype == torch.bfloat16):
            assert_close(g, w, tolerance(torch.float32, depth))


@every_dtype
def test_a_routing_and_the_layer_compute_the_same(dtype):
    moe = sk.nn.MoE(37, 21, 6, 2, output_scale=3.0)
    x = torch.randn(20, 37)
    out = moe(x, compute_dtype=dtype)
    routing = moe.last_routing
    weights = routing.weights.to(dtype) * 3.0
    proj = moe.experts.gate_up_proj, moe.experts.down_proj
    want = sk.moe_experts(x, routing.indices, weights, *proj, compute_dtype=dtype)
    assert torch.equal(out, want)
    assert out.dtype == torch.float32
    routed = routing._replace(weights=weights)
    assert torch.equal(moe.experts.forward_routed(x, routed, dtype), want)
    observed, before_swiglu = moe.experts.forward_observed(x, routed, dtype)
    assert torch.equal(observed, want)
    assert len(before_swiglu) == 40
    assert torch.equal(moe.experts(x, routing.indices, weights, dtype), want)
    with torch.no_grad():
        assert torch.equal(moe.experts(x, routing.indices, weights, dtype), want)
        assert torch.equal(moe.experts.forward_routed(x, routed, dtype), want)
    assert not torch.equal(out, moe(x)), "f32 was computed in"


@every_dtype
def test_gradients_are_added_in_f32_to_those_that_are_there(dtype):
    """Defends: accumulate_grad that finds no place for them, or writes numbers of another width there."""
    ours, theirs = (sk.nn.MoE(37, 21, 6, output_scale=6.0) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    hooked = []
    for step in range(3):
        x = torch.randn(20, 37)
        with sk.accumulate_grad():
            loss = ours(x, compute_dtype=dtype).square().sum()
        loss.backward()
        theirs(x, compute_dtype=dtype).square().sum().backward()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert a.grad.dtype == torch.float32
            assert_close(a.grad, b.grad.double(), tolerance(torch.float32, 64))
        if step == 0:
            ours.experts.down_proj.register_hook(lambda g: None if g is None else hooked.append(g))
    assert not hooked, "autograd brought a gradient"


def test_one_projection_alone_is_trained():
    """Defends: the kernel's choice by a gradient that is not asked for."""
    x, index, weights, gate_up, down = experts_inputs(20, 37, 21, 6, 1)
    both = value_and_grads(in_dtype(torch.bfloat16), [x, index, weights, gate_up, down], x)
    for i, frozen in (3, "down"), (4, "gate_up"):
        proj = (
            gate_up.clone().requires_grad_(frozen != "gate_up"),
            down.clone().requires_grad_(frozen != "down"),
        )
        sk.moe_experts(x, index, weights, *proj, compute_dtype=torch.bfloat16).backward(x)
        assert torch.equal(proj[i - 3].grad, both[i])
        assert proj[4 - i].grad is None


def test_operands_of_any_dtype_and_autocast():
    x, index, weights, gate_up, down = experts_inputs(20, 37, 21, 6, 2)
    want = sk.moe_experts(x, index, weights, gate_up, down, compute_dtype=torch.bfloat16)
    got = sk.moe_experts(x.bfloat16(), index, weights.bfloat16(), gate_up, down, compute_dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.float(), want)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(in_dtype(torch.bfloat16)(x, index, weights, gate_up, down), want)
    same = [t.bfloat16() if t.dtype.is_floating_point else t for t in (x, index, weights, gate_up, down)]
    assert torch.equal(in_dtype(torch.bfloat16)(*same), sk.moe_experts(*same))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_another_dtype_is_refused(dtype):
    with pytest.raises(TypeError, match=f"compute_dtype must be torch.bfloat16 or .*, found {dtype}"):
        in_dtype(dtype)(*experts_inputs(4, 8, 8, 3, 1))


def test_narrow_weights_are_not_widened_nor_rounded_to_others():
    inputs = [t.bfloat16() if t.dtype.is_floating_point else t for t in experts_inputs(4, 8, 8, 3, 1)]
    with pytest.raises(TypeError, match=r"found torch\.float16 beside torch\.bfloat16"):
        in_dtype(torch.float16)(*inputs)
    inputs[-1] = inputs[-1].float()
    with pytest.raises(TypeError, match="down_proj must have the dtype of gate_up_proj"):
        in_dtype(torch.bfloat16)(*inputs)


def test_nothing_is_rounded_before_all_is_checked(monkeypatch):
    """Defends: 302 MB written of experts whose call is then refused."""
    monkeypatch.setattr(experts, "_copies", lambda *_: pytest.fail("it was rounded"))
    x, index, weights, gate_up, down = experts_inputs(4, 8, 6, 3, 1)
    call, moe = in_dtype(torch.bfloat16), sk.nn.MoE(8, 6, 3)
    routing = sk.route(torch.randn(4, 3))
    for error, wrong in (
        (TypeError, lambda: call(x.double(), index, weights, gate_up, down)),
        (TypeError, lambda: call(x, index, weights.int(), gate_up, down)),
        (ValueError, lambda: call(x[:, 1:], index, weights, gate_up, down)),
        (ValueError, lambda: call(x, index, weights, gate_up[:, 1:], down)),
        (ValueError, lambda: call(x.to("meta"), index, weights, gate_up, down)),
        (ValueError, lambda: moe.experts.forward_routed(x[1:], routing, torch.bfloat16)),
        (TypeError, lambda: moe(x, compute_dtype="bf16")),
    ):
        with pytest.raises(error, match=r"^(moe_experts|MoE): .* found "):
            wrong()


def test_a_second_derivative_is_refused():
    x, index, weights, gate_up, down = experts_inputs(6, 8, 8, 3, 1)
    gate_up.requires_grad_()
    out = sk.moe_experts(x, index, weights, gate_up, down, compute_dtype=torch.bfloat16)
    (grad,) = torch.autograd.grad(out.sum(), gate_up, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_experts"):
        grad.square().sum().backward()


def test_compiled():
    inputs = experts_inputs(20, 16, 12, 4, 1)
    compiled = torch.compile(in_dtype(torch.bfloat16), fullgraph=True, backend="aot_eager")
    want = value_and_grads(in_dtype(torch.bfloat16), inputs, inputs[0])
    for g, w in zip(value_and_grads(compiled, inputs, inputs[0]), want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("chunks", [1, 3])
def test_experts_of_a_rank(tmp_path, chunks):
    """Defends: tokens that travel in f32, or experts of a chunk that compute in it."""
    whole = sk.nn.MoE(37, 21, 6, 2)
    x = torch.randn(20, 37)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ranks = sk.distributed.ExpertParallelMoE.from_whole(whole, chunks=chunks)
        out, want = (moe(x, compute_dtype=torch.bfloat16) for moe in (ranks, whole))
        assert_close(out, want.double(), 2 * ROUNDED_ONCE)  # chunks are rounded, and their sum
        assert not torch.equal(out, ranks(x)), "f32 was computed in"
        for each in out, want:
            each.square().sum().backward()
        for name in "gate_up_proj", "down_proj":
            grad, expected = (getattr(moe.experts, name).grad for moe in (ranks, whole))
            assert_close(grad, expected.double(), 4 * ROUNDED_ONCE)
            assert not torch.equal(grad, grad.bfloat16().float()), "it was rounded"
    finally:
        dist.destroy_process_group()
