"""Calls that nobody differentiates take a path of their own: to the same bits, with the same refusals."""

import pytest
import torch
from support import assert_close, tolerance
from test_ops_experts import SHAPES, experts_inputs

import sigma_kernels as sk
from sigma_kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def recorded_and_not(inputs):
    """The layer's answer on the way to a backward, under no_grad, and under no_grad from a Routing."""
    x, index, weights, gate_up, down = inputs
    experts = sk.nn.Experts(x.shape[1], down.shape[2], len(down), dtype=x.dtype)
    with torch.no_grad():
        experts.gate_up_proj.copy_(gate_up)
        experts.down_proj.copy_(down)
    recorded = experts(x, index, weights)
    assert recorded.requires_grad
    with torch.no_grad():
        routing = sk.group_by_expert(index, len(down), weights)
        return recorded.detach(), experts(x, index, weights), experts.forward_routed(x, routing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (700, 64, 130, 3, 2)], ids=str)
def test_same_bits_whether_recorded_or_not(shape, dtype):
    """Defends: the tile that replaces gate_up, rows beyond one chunk of it, the order of rows found natively."""
    inputs = [x.to(dtype) if x.dtype.is_floating_point else x for x in experts_inputs(*shape)]
    want, got, routed = recorded_and_not(inputs)
    assert torch.equal(got, want)
    assert torch.equal(routed, want)
    inputs[1] = inputs[1].int()
    assert torch.equal(recorded_and_not(inputs)[1], want)


def test_large_scratch_comes_from_the_kept_blocks():
    """Defends: by_slot [R, H] of 32 MiB and more, where the buffer changes its source."""
    x, index, weights, gate_up, down = inputs = experts_inputs(2049, 1024, 8, 5, 4)
    want, got, _ = recorded_and_not(inputs)
    assert torch.equal(got, want)
    assert_close(got, reference.moe_experts(x, index, weights, gate_up, down), tolerance(torch.float32, 1024))


def test_strided_inputs():
    """Defends: an index, weights, x or matrices read as if they were contiguous."""
    x, index, weights, gate_up, down = experts_inputs(9, 16, 6, 4, 2)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, index, weights, gate_up, down)]
    assert not any(t.is_contiguous() for t in strided)
    with torch.no_grad():
        assert torch.equal(sk.moe_experts(*strided), sk.moe_experts(x, index, weights, gate_up, down))


@pytest.mark.parametrize("wrong", [-1, 4, 2**31 + 1, -(2**40)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_index_out_of_range_is_named(wrong, backend):
    """Defends: int64 that is read as int32 and lands on an expert."""
    x, index, weights, gate_up, down = experts_inputs(5, 6, 5, 4, 2)
    index[3, 1] = wrong
    with torch.no_grad(), sk.backend(backend), pytest.raises(ValueError, match=r"0\.\.3 .* at token 3"):
        sk.moe_experts(x, index, weights, gate_up, down)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.func.jvp's own
def test_forward_mode_is_refused_under_no_grad_too():
    """Defends: tangents that are zero without a word."""
    x, index, weights, gate_up, down = experts_inputs(5, 6, 5, 4, 2)
    with torch.no_grad(), pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
        torch.func.jvp(lambda x: sk.moe_experts(x, index, weights, gate_up, down), (x,), (x,))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_compiled_and_in_inference_mode(context):
    inputs = experts_inputs(5, 6, 5, 4, 2)
    compiled = torch.compile(sk.moe_experts, fullgraph=True, backend="aot_eager")
    want = sk.moe_experts(*inputs)
    with context():
        assert torch.equal(sk.moe_experts(*inputs), want)
        assert torch.equal(compiled(*inputs), want)


def test_autocast():
    x, index, weights, gate_up, down = experts_inputs(5, 6, 5, 4, 2)
    proj = gate_up.bfloat16(), down.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = sk.moe_experts(x, index, weights, *proj)
    assert got.dtype == torch.float32
    assert torch.equal(got, sk.moe_experts(x.bfloat16(), index, weights.bfloat16(), *proj).float())


def test_same_bits_at_any_thread_count():
    """Defends: narrow tasks, whose width depends on the threads."""
    inputs, before, results = experts_inputs(3, 128, 200, 12, 2), torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        with torch.no_grad():
            results.append(sk.moe_experts(*inputs))
    torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results[1:])
