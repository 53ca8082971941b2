"""What the ranks of tests/test_noise_run.py do; in a module, as a spawned process imports it."""

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from noise_fake_gpu import FakeGpu
from sigma_noise import a2a, cuda, loops
from sigma_noise.offset import offset
from sigma_noise.plan import Plan
from sigma_noise.trace import Trace
from sigma_noise.windows import exchanges_of
from sigma_noise.work import work
from sigma_train.errors import WrongInput
from sigma_train.ranks import Ranks

from sigma_kernels import _C


def joined(rank: int, size: int, path: str) -> Ranks:
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    return Ranks(rank, size)


def check_offsets(rank: int, size: int, path: str) -> None:
    """Each rank's clock is ahead of the first one's by 7 s a rank; the last one reads the first one's."""
    ranks = joined(rank, size, path)
    ahead = 7_000_000_000 * rank if rank < size - 1 else 0
    identity = "first" if rank in (0, size - 1) else f"host {rank}"
    found = offset(ranks, identity, lambda: loops.now_ns() + ahead, pings=20)
    assert abs(found.offset_ns + ahead) <= found.residual_ns, (rank, found)
    assert found.residual_ns < 1_000_000_000, found
    if rank in (0, size - 1):
        assert (found.offset_ns, found.residual_ns) == (0, 0), "one clock has no offset"
    dist.destroy_process_group()


def check_late_rank(rank: int, size: int, path: str) -> None:
    """Rank 1 begins to work when rank 0 has arrived, every time: whatever the machine does, it arrives last."""
    ranks = joined(rank, size, path)
    sent = 0

    def all_to_all(*args: object) -> None:
        nonlocal sent
        sent += 1
        Path(f"{path}-{sent}").touch()
        wanted(*args)

    def after_the_other(*args: object) -> None:
        nonlocal sent
        sent += 1
        while not Path(f"{path}-{sent}").exists():
            time.sleep(1e-3)
        _C.noise.fixed_work(*args)

    wanted, native = dist.all_to_all_single, _C.noise
    if rank == 0:
        dist.all_to_all_single = all_to_all
    else:
        native = SimpleNamespace(now_ns=native.now_ns, FixedWork=native.FixedWork, fixed_work=after_the_other)
        a2a._C = SimpleNamespace(noise=native)
    told = ranks.gathered(a2a.AllToAll(ranks, work("spin"), 4096, seed=3).rounds(4))
    (_, of_first), (local, of_second) = told
    assert len(of_first) == len(of_second) == 4
    assert (of_first.start_ns < local.start_ns).all(), "the late one began before the other had arrived"
    assert (local.end_ns <= of_second.start_ns).all()
    assert (of_first.end_ns >= of_second.start_ns).all(), "the one that waited ended before all had come"
    dist.destroy_process_group()


def check_late_gpu(rank: int, size: int, path: str) -> None:
    """What is enqueued on rank 1 takes five times as long as on the others: `sigma_noise.collectives` must name it.

    The queues go by this machine's clock, so that what else runs here may make another rank late for some rounds.
    """
    ranks = joined(rank, size, path)
    fake = FakeGpu(lambda i: 500_000 if rank == 1 else 100_000)
    plan = Plan(
        kernels=("a2a",), modes=("fwq",), backend="cuda", quantum_s=1e-3, duration_s=0.2, warm_up_s=0,
        sizes={"gemm": {"R": 2, "N": 3, "K": 4}, "a2a": {"bytes": 4096}},
    )  # fmt: skip
    told = ranks.gathered(cuda.measure(plan, ranks, fake.gpu(uuid=f"fake {rank}")))
    trace = Trace(
        told[0].run,
        {r: about for one in told for r, about in one.ranks.items()},
        {key: series for one in told for key, series in one.rows.items()},
    )
    assert trace.names() == ["a2a", "a2a_local"]
    for r in range(size):
        measured = trace.ranks[r]["measured"]
        assert measured["a2a_local"]["kernel"] == "gemm"
        assert measured["a2a_local"]["steps"] == told[0].ranks[0]["measured"]["a2a_local"]["steps"]
        doubts = [found["residual_ns"] for found in measured["a2a"]["offsets"]]
        assert [found["residual_ns"] for found in trace.ranks[r]["clock"]["offsets"]] == [max(doubts)] * 2
    exchanges, wrong = exchanges_of(trace)
    assert exchanges is not None, wrong
    parts = exchanges.parts
    assert parts.impossible == parts.unmatched == 0
    n = len(parts.step)
    assert n >= 8
    assert parts.times_last[1] >= 0.6 * n, parts.times_last
    local_s, wait_s = np.median(parts.local_s, axis=1), np.median(parts.wait_s, axis=1)
    assert local_s[1] == local_s.max(), local_s
    assert wait_s[1] == wait_s.min(), wait_s
    dist.destroy_process_group()


def check_refused_by_both(rank: int, size: int, path: str, lack: str) -> None:
    """Rank 1 has no GPU, or one for which something was not built."""
    ranks = joined(rank, size, path)
    torch.cuda.is_available = lambda: False
    plan = Plan(kernels=("a2a" if lack == "a2a" else "spin",), modes=("fwq",), backend="cuda")
    own = FakeGpu(lambda i: 0).gpu(uuid=f"fake {rank}")
    if rank == 1:
        own = {"gpu": None, "spin": replace(own, native=None), "a2a": replace(own, exchange=None)}[lack]
    said = {
        "gpu": "--backend cuda: torch .* sees no GPU here",
        "spin": "--kernel spin: the CUDA kernels were not built here",
        "a2a": "--kernel a2a: torch was built without NCCL or RCCL here",
    }
    with pytest.raises(WrongInput, match=f"^rank 1: {said[lack]}"):
        cuda.measure(plan, ranks, own)
    dist.destroy_process_group()
