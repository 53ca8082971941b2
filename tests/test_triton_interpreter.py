"""The equipment: what Triton's interpreter does wrong in bf16, and that our mending of it is right."""

import interpreted
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterError


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


def test_rounding_is_torchs():
    """Defends: ties, the carry into the exponent, overflow to infinity, denormals, NaN."""
    odd = [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 1.99999, 3.3895e38, 1e-40, float("inf"), float("nan")]
    x = torch.cat([torch.tensor(odd), torch.randn(10_000) * torch.logspace(-38, 38, 10_000)])
    got, want, is_nan = interpreted.narrow(x.numpy()), bits(x.bfloat16()), x.isnan().numpy()
    assert np.array_equal(got[~is_nan], want[~is_nan])
    assert np.isnan(interpreted.widen(got)[is_nan]).all()
    assert np.array_equal(interpreted.widen(want), x.bfloat16().float().numpy(), equal_nan=True)


@triton.jit
def sums_kernel(a_ptr, b_ptr, sum_ptr, dot_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    tl.store(sum_ptr + place, a + b)
    tl.store(dot_ptr + place, tl.dot(a, b))


@triton.jit
def copy_kernel(x_ptr, out_ptr, first, N, BLOCK: tl.constexpr):
    place = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, tl.load(x_ptr + place, mask=place < N), mask=place < N)


def test_an_address_outside_of_every_tensor_is_found():
    """Defends: rows past the last one, a mask that was left out."""
    x, out = torch.randn(20), torch.zeros(20)
    copy_kernel[(1,)](x, out, 0, 20, BLOCK=32)
    assert torch.equal(x, out)
    with pytest.raises(InterpreterError, match="12 addresses are in no tensor of the launch"):
        copy_kernel[(1,)](x, out, 0, 32, BLOCK=32)
    with interpreted.addresses_outside() as outside:
        copy_kernel[(1,)](x, out, 16, 48, BLOCK=16)
    assert np.array_equal(outside[1], out.data_ptr() + 4 * np.arange(20, 32))


def sums() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = torch.randn(2, 16, 16).bfloat16()
    sum, dot = torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
    sums_kernel[(1,)](a, b, sum, dot, BLOCK=16)
    return a, b, sum, dot


def test_products_are_right_where_they_are_mended():
    a, b, _, dot = sums()
    torch.testing.assert_close(dot, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_the_interpreter_still_adds_bf16_as_integers():
    """A canary: when this fails upstream has mended bf16, and tests/interpreted.py can go."""
    a, b, sum, _ = sums()
    assert not torch.allclose(sum.float(), (a + b).float(), atol=1)
