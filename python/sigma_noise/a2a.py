"""Local work, then an all-to-all, again and again: what a layer of experts does, with the time of each apart.

A collective makes its ranks equally slow, so its duration names nobody: the late one waits least.  Three stamps
tell them apart.  With arrival a_r and end e_r of rank r, its wait is max_r a_r - a_r and the transfer
e_r - max_r a_r; what the rank itself is to blame for is its local time.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from sigma_train.errors import Failure, WrongInput
from sigma_train.ranks import Ranks
from torch import Tensor

from sigma_kernels import _C
from sigma_noise.loops import EVER_NS, MOST_QUANTA
from sigma_noise.trace import Series
from sigma_noise.work import Work, reserved

FIRST_ROUNDS = 8  # by which the others are counted
MOST_ROUNDS = MOST_QUANTA // 2
Rounds = Callable[[int], tuple[Series, Series]]  # so many: local quanta, and collectives from arrival to end


def repeated(ranks: Ranks, rounds: Rounds, duration_s: float, warm_up_s: float) -> tuple[Series, Series]:
    """As many rounds on each rank as take so long.  What comes before is not stored.  Raises: WrongInput."""
    rounds(FIRST_ROUNDS)  # in which connections are made
    round_s = _timed(ranks, rounds, FIRST_ROUNDS)
    round_s = _timed(ranks, rounds, max(FIRST_ROUNDS, math.ceil(warm_up_s / round_s)))
    n = math.ceil(duration_s / round_s)
    if n > MOST_ROUNDS:
        raise WrongInput(
            f"--duration must be at most {MOST_ROUNDS * round_s:.3g} with rounds of {round_s:.2g} s, whose stamps "
            f"then take {MOST_ROUNDS * 32 >> 20} MiB, found {duration_s:g}"
        )
    return rounds(n)


def _timed(ranks: Ranks, rounds: Rounds, n: int) -> float:
    """Seconds of one of so many rounds, the same number on every rank."""
    local, collective = rounds(n)
    return ranks.first(max(1, int(collective.end_ns[-1] - local.start_ns[0])) * 1e-9 / n)


class Values:
    """`num_bytes` go from each rank to each, in f32 on `device`."""

    def __init__(self, ranks: Ranks, num_bytes: int, seed: int, device: torch.device) -> None:
        self.ranks, self.seed, self.count = ranks, seed, max(1, num_bytes // 4)
        self.sent = self._of(ranks.rank).to(device)
        self.received = torch.empty_like(self.sent)

    def _of(self, rank: int) -> Tensor:
        rng = np.random.default_rng([self.seed, rank])
        return torch.from_numpy(rng.standard_normal(self.ranks.size * self.count, np.float32))

    def forget(self) -> None:
        """What came before, or a collective that does nothing would pass the check."""
        self.received.fill_(math.nan)

    def check(self) -> None:
        """Raises: Failure if what came is not what was sent."""
        mine = slice(self.ranks.rank * self.count, (self.ranks.rank + 1) * self.count)
        for rank, part in enumerate(self.received.cpu().split(self.count)):
            if not torch.equal(part, self._of(rank)[mine]):
                raise Failure(f"a2a: what rank {rank} sent to rank {self.ranks.rank} came as something else")


class AllToAll:
    """One rank of it, over gloo."""

    def __init__(self, ranks: Ranks, made: Work, num_bytes: int, seed: int) -> None:
        self.work, self.values = made, Values(ranks, num_bytes, seed, torch.device("cpu"))

    def rounds(self, n: int) -> tuple[Series, Series]:
        """Raises: Failure if what came is not what was sent."""
        stamps, never = reserved(4 * n).reshape(n, 4), reserved(1, np.uint8)
        address, row = stamps.ctypes.data, stamps.strides[0]
        run: Callable[..., None] = partial(_C.noise.fixed_work, self.work.native)
        now_ns, stop = _C.noise.now_ns, never.ctypes.data
        sent, received = self.values.sent, self.values.received
        self.values.forget()
        dist.barrier()
        for i in range(n):
            run(_C.noise.FixedWork(1, address + i * row), EVER_NS, stop)
            stamps[i, 2] = now_ns()
            dist.all_to_all_single(received, sent)
            stamps[i, 3] = now_ns()
        self.values.check()
        ones = np.ones(n)
        return Series(stamps[:, 0], stamps[:, 1], ones), Series(stamps[:, 2], stamps[:, 3], ones)
