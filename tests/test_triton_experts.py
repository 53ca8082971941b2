"""The expert layer in Triton equals the reference in f64, forward and backward, in every dtype."""

import pytest
import torch
from support import assert_close, tolerance, value_and_grads
from test_ops_absent import SHAPES as SHAPES_ABSENT
from test_ops_absent import check_absent
from test_ops_experts import experts_inputs

import sigma_kernels as sk
from sigma_kernels import reference
from sigma_kernels.triton import experts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # T, H, I, E, k
    (0, 16, 16, 4, 1),
    (0, 16, 16, 4, 2),
    (1, 1, 1, 1, 1),
    (1, 17, 33, 5, 2),
    (7, 33, 17, 5, 1),
    (40, 24, 16, 32, 1),
    (150, 67, 66, 3, 3),
    (100, 130, 70, 3, 1),
    (200, 96, 129, 3, 2),
]
WIDE = [(shape, torch.float32) for shape in SHAPES]
NARROW = [(shape, torch.bfloat16) for shape in SHAPES if shape[0] in (1, 7, 150)] + [
    (SHAPES[4], torch.float16)
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def check_experts(inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) if x.dtype.is_floating_point else x for x in inputs]
    grad_out = torch.randn(inputs[0].shape).to(dtype)
    got = value_and_grads(sk.moe_experts, inputs, grad_out)
    wide = [x.double() if x.dtype.is_floating_point else x for x in inputs]
    want = value_and_grads(reference.moe_experts, wide, grad_out.double())
    depth = max(*inputs[0].shape, inputs[4].shape[2]) if dtype == torch.float32 else 4
    for g, w in zip(got, want, strict=True):
        assert_close(g, w, tolerance(dtype, depth))


@pytest.mark.parametrize("shape, dtype", WIDE + NARROW, ids=str)
def test_moe_experts_equals_reference(backend, shape, dtype):
    """Defends: ragged tails, empty experts, no tokens, gate and up swapped, output left unwritten."""
    check_experts(experts_inputs(*shape), dtype)


def test_moe_experts_at_a_larger_size(backend):
    """Defends: several tiles in each direction, more tiles than programs, an expert of each launch."""
    inputs = experts_inputs(200, 140, 260, 3, 1)
    inputs[1][:150] = 2
    check_experts(inputs, torch.float32)


@pytest.mark.parametrize("k, dtype", [(1, torch.float32), (1, torch.float16), (2, torch.bfloat16)], ids=str)
def test_all_tokens_on_one_expert(backend, k, dtype):
    """Defends: the launch for crowded experts; 15 experts without a row get a zero gradient."""
    inputs = experts_inputs(300 // k, 64, 48, 16, k)
    inputs[1] = torch.full((300 // k, k), 3)
    check_experts(inputs, dtype)


def test_non_contiguous_inputs(backend):
    """Defends: row strides of x, strides of the weights either way, an expanded gradient."""
    x, index, weights, gate_up, down = experts_inputs(40, 32, 24, 6, 2)
    inputs = [
        torch.randn(40, 70)[:, 3:67:2],
        index.t().contiguous().t(),
        weights.t().contiguous().t(),
        torch.randn(6, 32, 48).transpose(1, 2),
        torch.randn(6, 32, 50)[:, :, :24],
    ]
    check_experts(inputs, torch.float32)
    leaf = x.clone().requires_grad_()
    sk.moe_experts(leaf, index, weights, gate_up, down).sum().backward()
    wide = x.double().requires_grad_()
    reference.moe_experts(wide, index, weights.double(), gate_up.double(), down.double()).sum().backward()
    assert_close(leaf.grad, wide.grad, tolerance(torch.float32, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_gpu_keeps_for_the_backward(backend, monkeypatch, dtype):
    """Defends: gate and up in the dtype of x, which tensors of a CPU never meet."""
    monkeypatch.setattr(experts, "saved_dtype", lambda x: x.dtype)
    check_experts(experts_inputs(50, 40, 33, 5, 2), dtype)


@every_dtype
@pytest.mark.parametrize("k", [1, 3])
def test_without_a_backward(backend, k, dtype):
    """Defends: the call that keeps nothing, and int8 weights with their factors."""
    x, index, weights, gate_up, down = experts_inputs(60, 48, 40, 7, k)
    x, weights = x.to(dtype), weights.to(dtype)
    bound = tolerance(dtype, 48 if dtype == torch.float32 else 4)
    with torch.no_grad():
        got = sk.moe_experts(x, index, weights, gate_up.to(dtype), down.to(dtype))
        wide = x.double(), index, weights.double()
        want = reference.moe_experts(*wide, gate_up.to(dtype).double(), down.to(dtype).double())
        assert_close(got, want, bound)
        narrow = [*sk.quantize_experts(gate_up), *sk.quantize_experts(down)]
        got = sk.moe_experts_int8(x, index, weights, *narrow)
        whole = [narrow[i].double() * narrow[i + 1].double()[..., None] for i in (0, 2)]
        assert_close(got, reference.moe_experts(*wide, *whole), bound)


@pytest.mark.parametrize("k", [1, 2])
def test_gradients_in_f32_of_narrow_products(backend, k):
    """Defends: gradients rounded before they are stored, or added to f32 by numbers of another width."""
    T, H, I, E = 50, 40, 33, 6
    inputs = experts_inputs(T, H, I, E, k)
    inputs[1] = torch.randint(0, E - 1, (T, k))
    parameters = [p.clone().requires_grad_() for p in inputs[3:]]
    with sk.accumulate_grad():
        for _ in range(2):
            out = sk.moe_experts(*inputs[:3], *parameters, compute_dtype=torch.bfloat16)
            out.sum().backward()
    wide = [t.bfloat16().double() if t.dtype.is_floating_point else t for t in inputs]
    want = value_and_grads(reference.moe_experts, wide, torch.ones(T, H))
    assert_close(out, want[0], tolerance(torch.bfloat16, 4))
    for p, w in zip(parameters, want[3:], strict=True):
        assert_close(p.grad, 2 * w, tolerance(torch.bfloat16, 4))
        assert not torch.equal(p.grad, p.grad.bfloat16().float()), "it was rounded"


def test_same_bits_every_time(backend):
    inputs = experts_inputs(150, 64, 48, 5, 2)
    first, second = (value_and_grads(sk.moe_experts, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_the_sum_over_choices_is_rounded(backend):
    """Defends: two large rows of a token that cancel and overflow f16 each, or are rounded one by one."""
    x, weights = torch.ones(1, 16, dtype=torch.float16), torch.ones(1, 2, dtype=torch.float16)
    gate_up = torch.ones(2, 32, 16, dtype=torch.float16)
    down = torch.full((2, 16, 16), 200.0, dtype=torch.float16)
    down[1] *= -1
    got = sk.moe_experts(x, torch.tensor([[0, 1]]), weights, gate_up, down)
    assert torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize(
    "shape, dtype", [(SHAPES_ABSENT[0], torch.float16), (SHAPES_ABSENT[1], torch.float32)], ids=str
)
def test_absent_choices_add_nothing(backend, shape, dtype):
    """Defends: memory of slots without a row read as if a product had written it."""
    check_absent(shape, dtype)
