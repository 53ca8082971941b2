"""`sk.nn.MoE` with another k at every call against the same calls in blocks of one k: nothing is made anew for a k."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from shapes import DTYPES, A, short

import sigma_kernels as sk

CHANGING = [min(k, A.E) for k in (1, 2, 4, 8) * 2]
SHAPE = replace(A, name="varying", k=max(CHANGING))


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_varying_k(race, device, dtype, direction):
    torch.manual_seed(0)
    has_backward = "backward" in direction
    moe = sk.nn.MoE(SHAPE.H, SHAPE.I, SHAPE.E).to(device, dtype)
    x = torch.randn(SHAPE.T, SHAPE.H).to(device, dtype).requires_grad_(has_backward)
    grad_out = torch.randn(SHAPE.T, SHAPE.H).to(device, dtype)

    def calls(ks: Sequence[int]) -> Callable[[], torch.Tensor]:
        """The sum of all that the calls answer, gradients of x among it."""

        def run() -> torch.Tensor:
            total = torch.zeros((), dtype=torch.float64, device=device)
            for k in ks:
                out = moe(x, top_k=k)
                total += out.detach().sum(dtype=torch.float64)
                if has_backward:
                    out.backward(grad_out)
                    total += x.grad.sum(dtype=torch.float64)
                    x.grad = None
                    moe.zero_grad(set_to_none=True)
            return total

        return run if has_backward else torch.no_grad()(run)

    def check(who: str, total: torch.Tensor) -> None:
        torch.testing.assert_close(total, want, rtol=1e-9, atol=1e-9, msg=lambda text: f"{who}: {text}")

    want = calls(sorted(CHANGING))()
    rows = SHAPE.T * sum(CHANGING)
    race(
        f"varying_k/{direction}/{short(dtype)}",
        calls(CHANGING),
        shape=SHAPE,
        check=check,
        flops=(3 if has_backward else 1) * 6 * rows * SHAPE.H * SHAPE.I,
        index=moe.router(x.detach(), SHAPE.k)[0].indices,
        note="a turn is two calls each of k = 1, 2, 4, 8, another at every call; the bound has those of one k together",
        bound_one_k_after_another=calls(sorted(CHANGING)),
    )
