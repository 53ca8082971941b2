"""What the tests share: values, gradients and the error that a dtype explains."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import forked
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import sigma_kernels as sk
from sigma_kernels import nn, reference
from sigma_kernels.doctor import report


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


def balance_rank(
    rank: int, path: str, logits: torch.Tensor, counts: list[int], value: float, want: list[list[float]]
) -> None:
    """One of four ranks, whose f is the whole's and its own is not; the mean of values and gradients is the whole's.

    Here, as a spawned process imports it.
    """
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=4)
    mine = logits.chunk(4)[rank].clone().requires_grad_()
    of_mine = sk.route(mine).counts
    of_all = nn.global_counts(of_mine)
    f, whole_f = (x / x.sum() for x in (of_all, torch.tensor(counts)))
    torch.testing.assert_close(f, whole_f, rtol=0, atol=1e-6)
    assert (of_mine / of_mine.sum() - whole_f).abs().max() > 0.1
    loss = nn.load_balancing_loss(mine, of_all)
    loss.backward()
    mean = loss.detach() / 4
    dist.all_reduce(mean)
    torch.testing.assert_close(mean.item(), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.grad / 4, torch.tensor(want).chunk(4)[rank])  # data parallelism averages
    dist.destroy_process_group()


def top1_balance_rank(rank: int, path: str, logits: torch.Tensor, value: float, want: list[float]) -> None:
    """One of three ranks, with 6, 0 and 2 of the tokens: the whole batch's value, and gradients whose mean is its."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=3)
    begin, end = ((0, 6), (6, 6), (6, 8))[rank]
    mine = logits[begin:end].clone().requires_grad_()
    loss = nn.top1_balancing_loss(mine, 0.5, is_global=True)
    loss.backward()
    torch.testing.assert_close(loss.item(), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(mine.grad / 3, torch.tensor(want, dtype=logits.dtype)[begin:end])
    dist.destroy_process_group()


def check_tf32(rank: int, setter: str) -> None:
    """In a process of its own, which a setting stays in."""
    from sigma_kernels.triton.tiles import precision

    cpu = torch.device("cpu")
    assert precision(torch.float32, cpu) == "ieee"
    exec(setter)
    assert precision(torch.float32, cpu) == "tf32"
    assert precision(torch.bfloat16, cpu) == "ieee"


def check_isa(rank: int, isa: str) -> None:
    """In a process of its own, which has one instruction set."""
    os.environ["SIGMA_ISA"] = isa
    torch.manual_seed(0)
    for T, H, I, E, k in [(1, 1, 1, 1, 1), (50, 67, 35, 5, 2), (200, 128, 96, 7, 1)]:
        index = torch.stack([torch.randperm(E)[:k] for _ in range(T)])
        a = [
            torch.randn(T, H),
            torch.rand(T, k),
            torch.randn(E, 2 * I, H) / H**0.5,
            torch.randn(E, H, I) / I**0.5,
        ]
        a = [t.requires_grad_() for t in a]
        b = [t.detach().double().requires_grad_() for t in a]
        sk.moe_experts(a[0], index, *a[1:]).square().sum().backward()
        reference.moe_experts(b[0], index, *b[1:]).square().sum().backward()
        for p, q in zip(a, b, strict=True):
            assert (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max(), (T, H, I, E, k)
        logits = torch.randn(T, 37)
        assert torch.equal(sk.route(logits, 3).indices, reference.route(logits.double(), 3).indices)
    assert sk._C.isa() == isa


def check_unknown_isa(rank: int) -> None:
    os.environ["SIGMA_ISA"] = "mmx"
    with pytest.raises(RuntimeError, match="SIGMA_ISA=mmx can't run here; this processor supports"):
        sk._C.isa()


def check_baseline(rank: int, machine: str, line: str) -> None:
    """In a process of its own, as a processor of this kind."""
    os.environ["SIGMA_ISA"] = "base"
    platform.machine = lambda: machine
    assert line in report().splitlines()


def count_libgomp() -> int:
    """OpenMP runtimes that this process has loaded."""
    torch.ones(9).sum()
    return len({word for word in Path("/proc/self/maps").read_text().split() if "libgomp" in word})


def check_libgomp(rank: int) -> None:
    assert count_libgomp() == 1


# A pytest in a process of its own: it would rewrite the assertions of every plugin installed, hypothesis's for seconds.
NO_OTHER_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
OF_BENCH = ["-p", "pytest_benchmark.plugin", "-p", "pytest_timeout"]
SIGMA = [sys.executable, "-P", "-c", "import sigma_cli; sigma_cli.main()"]


def sigma(
    *args: str, env: dict[str, str], cwd: Path | None = None, fault: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the program `sigma` to its end; what befalls it is as forked.on_ranks has it."""
    result = forked.run(args, env, cwd, fault)
    if result is not None:
        return result
    assert fault is None, "the first to start the server did so under other variables"
    return subprocess.run([*SIGMA, *args], env=env, cwd=cwd, capture_output=True, text=True, check=False)


def assert_one_sentence(result: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    """stderr is `error: message` and nothing else."""
    assert (result.returncode, result.stderr) == (code, f"error: {message}\n")
