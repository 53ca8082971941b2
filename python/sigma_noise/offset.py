"""What to add to a rank's stamps to have the first rank's, where they do not read the same clock."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from sigma_train.ranks import Ranks

from sigma_kernels import _C

PINGS = 200


@dataclass(frozen=True)
class Offset:
    """At `at_ns` of the own clock: first rank's stamp = own + offset, wrong by `residual_ns` at most."""

    at_ns: int
    offset_ns: int
    residual_ns: int


def offset(
    ranks: Ranks, identity: str, now_ns: Callable[[], int] = _C.noise.now_ns, pings: int = PINGS
) -> Offset:
    """By the ping of least round trip (Cristian 1989); 0 without doubt for ranks that read the first one's clock.

    A message that left at a, was answered at s and was back at b puts s between a and b of the own clock: the
    offset is s - (a + b) / 2, within (b - a) / 2.  Differences below that mean nothing.  A collective.
    """
    identities = ranks.gathered(identity)
    mine = Offset(now_ns(), 0, 0)
    for other in range(1, ranks.size):
        if identities[other] == identities[0]:
            continue
        if ranks.is_first:
            _answer(other, now_ns, pings)
        elif ranks.rank == other:
            mine = _ask(now_ns, pings)
    return mine


def _ask(now_ns: Callable[[], int], pings: int) -> Offset:
    told, best = torch.zeros(1, dtype=torch.int64), None
    for _ in range(pings):
        left = now_ns()
        dist.send(told, 0)
        dist.recv(told, 0)
        back = now_ns()
        found = Offset(back, int(told) - (left + back) // 2, (back - left + 1) // 2)
        if best is None or found.residual_ns < best.residual_ns:
            best = found
    assert best is not None
    return best


def _answer(other: int, now_ns: Callable[[], int], pings: int) -> None:
    box = torch.zeros(1, dtype=torch.int64)
    for _ in range(pings):
        dist.recv(box, other)
        box[0] = now_ns()
        dist.send(box, other)
