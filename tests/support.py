"""What the tests share: values, gradients and the error that a dtype explains."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import forked
import torch
import torch.distributed as dist
from torch import Tensor

import sigma_kernels as sk
from sigma_kernels import nn


def tolerance(dtype: torch.dtype, depth: int) -> float:
    """Relative bound of a sum of `depth` products of unit size: rounding grows as its square root, with a margin."""
    return 8 * torch.finfo(dtype).eps * max(1.0, depth**0.5)


def assert_close(got: Tensor, want: Tensor, bound: float) -> None:
    """|got - want| <= bound * (typical size of want), everywhere, and no NaN."""
    assert got.shape == want.shape
    if not got.numel():
        return
    size = want.double().square().mean().sqrt().clamp(min=1e-30) + want.double().abs()
    error = (got.double() - want.double()).abs() / size
    assert error.isfinite().all(), "the result has non-finite elements"
    assert error.max() <= bound, f"relative error {error.max():.2e} over {bound:.2e}"


def value_and_grads(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor | None = None
) -> list[Tensor]:
    """function(*inputs) and its gradients by all floating-point inputs."""
    leaves = [x.detach().requires_grad_() if x.dtype.is_floating_point else x for x in inputs]
    out = function(*leaves)
    if grad_out is None:
        grad_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    wanted = [x for x in leaves if x.dtype.is_floating_point]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad_out.to(out.dtype))]


def balance_rank(rank: int, path: str, logits: torch.Tensor, want: list[float]) -> None:
    """One of two ranks: its averaged gradient equals its part of `want`.  Here, as a spawned process imports it."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mine = logits[4 * rank : 4 * rank + 4].clone().requires_grad_()
    counts = nn.global_counts(sk.route(mine).counts)
    nn.load_balancing_loss(mine, counts).backward()
    got = mine.grad / 2  # data parallelism averages
    torch.testing.assert_close(got, torch.tensor(want)[4 * rank : 4 * rank + 4])
    dist.destroy_process_group()


SIGMA = [sys.executable, "-P", "-c", "import sigma_cli; sigma_cli.main()"]


def sigma(
    *args: str, env: dict[str, str], cwd: Path | None = None, **kwargs
) -> subprocess.CompletedProcess[str]:
    """Run the program `sigma` to its end."""
    result = None if kwargs else forked.run(args, env, cwd)
    if result is not None:
        return result
    return subprocess.run(
        [*SIGMA, *args], env=env, cwd=cwd, capture_output=True, text=True, check=False, **kwargs
    )


def assert_one_sentence(result: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    """stderr is `error: message` and nothing else."""
    assert (result.returncode, result.stderr) == (code, f"error: {message}\n")
