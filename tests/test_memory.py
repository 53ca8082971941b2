"""Large results lie in blocks that the library keeps when they are freed."""

import gc

import pytest
import torch

import sigma_kernels as sk
from sigma_kernels import _C
from sigma_kernels.distributed.moe import _Parts
from sigma_kernels.ops.library import empty

MiB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_kept():
    gc.collect()
    sk.empty_cache()
    yield
    sk.empty_cache()


def test_a_large_tensor_gets_the_memory_of_the_last_one():
    like = torch.empty(0)
    first = empty(like, 48, MiB // 4)
    address = first.data_ptr()
    assert address % (2 * MiB) == 0
    assert first.shape == (48, MiB // 4)
    assert first.is_contiguous()
    view = first[3]
    del first
    assert _C.free_block_bytes() == 0, "a view keeps its block"
    del view
    assert _C.free_block_bytes() == 48 * MiB
    assert empty(like, 48 * MiB // 4).data_ptr() == address


def test_no_more_is_kept_than_was_ever_in_use():
    like = torch.empty(0)
    for size in (40, 64, 33, 50):
        empty(like, size * MiB // 4)
        assert _C.free_block_bytes() <= 64 * MiB


def test_empty_cache_returns_everything():
    empty(torch.empty(0), 16 * MiB)
    assert _C.free_block_bytes() == 64 * MiB
    sk.empty_cache()
    assert _C.free_block_bytes() == 0


def test_small_and_reference_tensors_are_torchs_own():
    assert empty(torch.empty(0), 1024).untyped_storage().resizable()
    empty(torch.empty(0, dtype=torch.float64), 1024)
    assert _C.free_block_bytes() == 0


def test_large_memory_starts_as_torchs_own_does():
    """Defends the tests: a zero that a fresh page holds looks like a zero that a kernel wrote."""
    like = torch.empty(0)
    assert empty(like, 10 * MiB).isnan().all()
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert not empty(like, 11 * MiB).isnan().any()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(False)
    assert not empty(like, 12 * MiB).isnan().any()


def test_more_than_there_is_raises():
    with pytest.raises(MemoryError):
        empty(torch.empty(0), 1 << 56)


def test_weight_gradients_reuse_memory_and_stay_right():
    E, H, I, T = 16, 1024, 512, 64
    x, w = torch.randn(T, H), torch.rand(T, 1)
    gate_up, down = (
        (torch.randn(E, 2 * I, H) / 32).requires_grad_(),
        (torch.randn(E, H, I) / 16).requires_grad_(),
    )
    index = torch.arange(T)[:, None] % E
    seen, first = set(), None
    for _ in range(3):
        sk.moe_experts(x, index, w, gate_up, down).square().sum().backward()
        assert gate_up.grad is not None
        assert down.grad is not None
        first = gate_up.grad.clone() if first is None else first
        assert torch.equal(gate_up.grad, first)
        seen.add(gate_up.grad.data_ptr())
        gate_up.grad = down.grad = None
    assert len(seen) == 1, "autograd steals the gradient, so its memory comes back"


class Ungraded(torch.autograd.Function):
    """Says nothing of its input."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize(
    "dtype, n, unused",
    [(torch.bfloat16, n, unused) for n, unused in ((1, []), (3, []), (3, [2]), (6, [0, 1, 4]))]
    + [(torch.float32, 3, [2])],
    ids=str,
)
def test_gradients_of_parts_come_together_in_kept_memory(dtype, n, unused):
    """Defends: a part in another's place; what former numbers the memory has where a part has no gradient."""
    weight = torch.zeros(6, 1000, 3000, dtype=dtype, requires_grad=True)  # 36 MB in bf16
    empty(weight, *weight.shape).fill_(torch.nan)
    kept = _C.free_block_bytes()
    assert kept > 0
    parts = _Parts.apply(weight, n)
    assert [part.data_ptr() for part in parts] == [part.data_ptr() for part in weight.chunk(n)]
    want = torch.arange(1, 7, dtype=dtype)[:, None, None].repeat(1, *weight.shape[1:])
    used = [i for i in range(n) if i not in unused]
    outs = [parts[i] for i in used] + [Ungraded.apply(parts[i]) for i in unused]
    grads = [want.chunk(n)[i] for i in used] + [torch.ones((), dtype=dtype) for _ in unused]
    (got,) = torch.autograd.grad(outs, weight, grads)
    for i in unused:
        want.chunk(n)[i].zero_()
    assert torch.equal(got, want)
    assert _C.free_block_bytes() < kept, "the gradient is not in kept memory"


def test_parts_without_a_gradient_give_none():
    weight = torch.randn(4, 3, requires_grad=True)
    out = sum(Ungraded.apply(part) for part in _Parts.apply(weight, 2))
    assert torch.autograd.grad(out, weight, allow_unused=True) == (None,)
