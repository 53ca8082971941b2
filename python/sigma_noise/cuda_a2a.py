"""The all-to-all on GPUs, over NCCL or RCCL: a quantum of gemm, then the collective, again and again.

gemm, as every GPU can and as it is what stands before the exchange of a layer of experts; spin would want the CUDA
kernels built in.  Everything is enqueued ahead, with an event where work begins, where it is done and where the
collective is: the collective waits for the stream's work, and the stream for the collective.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sigma_train.errors import WrongInput
from sigma_train.ranks import Ranks

from sigma_noise.a2a import Values, repeated
from sigma_noise.cuda_clock import EventClock, on_the_host
from sigma_noise.cuda_replays import Replayed
from sigma_noise.gpu import Exchange, Gpu, Result
from sigma_noise.measure import A2A_BYTES, together
from sigma_noise.offset import Offset
from sigma_noise.plan import Plan
from sigma_noise.trace import Series

LOCAL = "gemm"
BATCH = 32  # rounds enqueued at once; two batches are


def all_to_all(gpu: Gpu, plan: Plan, ranks: Ranks) -> Result:
    """Local quanta under a2a_local, collectives under a2a from arrival to end, on the host's clock.  After `check`."""
    assert gpu.exchange is not None
    made = Replayed(gpu, LOCAL, plan)
    steps = ranks.first(made.steps(plan.quantum_s))  # the same work on all: who is slow takes longer
    num_bytes = plan.sizes.get("a2a", {}).get("bytes", A2A_BYTES)
    values = Values(ranks, num_bytes, plan.seed, gpu.device)
    replay = made.graph(steps)
    with gpu.exchange() as exchange:
        rounds = Rounds(gpu, ranks, replay, exchange, values)
        local, collective = repeated(ranks, rounds, plan.duration_s, plan.warm_up_s)
    warnings = []
    if rounds.dry:
        warnings.append(
            f"a2a: the GPU was through before the host had more, in {rounds.dry} of {len(local)} rounds; what such a "
            "round took is the host's too"
        )
    of_local = {"mode": "fwq", "kernel": LOCAL, "steps": steps, **made.about}
    of_collective = {"mode": "collective", "bytes": num_bytes, "backend": "nccl", "dry_rounds": rounds.dry}
    of_collective["offsets"] = [asdict(found) for found in rounds.offsets]
    return Result(
        {"a2a_local": local, "a2a": collective}, {"a2a_local": of_local, "a2a": of_collective}, warnings
    )


def check(gpu: Gpu, ranks: Ranks) -> None:
    """Raises: WrongInput where two ranks have one GPU; a collective."""
    uuids = ranks.gathered(gpu.about["uuid"])
    for rank, uuid in enumerate(uuids):
        if (first := uuids.index(uuid)) != rank:
            raise WrongInput(
                f"--kernel a2a wants a GPU for each rank, found ranks {first} and {rank} on {uuid}"
            )


class Rounds:
    """One rank of it.  `dry`, of the rounds that are kept, and `offsets` are of the last call."""

    def __init__(
        self, gpu: Gpu, ranks: Ranks, replay: Callable[[], None], exchange: Exchange, values: Values
    ) -> None:
        self.gpu, self.ranks, self.replay, self.exchange, self.values = gpu, ranks, replay, exchange, values
        self.pool = [[[gpu.event() for _ in range(3)] for _ in range(BATCH)] for _ in range(3)]
        self.dry, self.offsets = 0, [Offset(0, 0, 0)] * 2

    def __call__(self, n: int) -> tuple[Series, Series]:
        """A batch of rounds before them, which the host may be late for, is left out.

        Raises: Failure if what came is not what was sent.
        """
        self.values.forget()
        together(self.ranks)
        clock = EventClock(self.gpu)
        before = clock.offset()
        stamps = self._stamps(clock, BATCH + n)[BATCH:]
        self.offsets = [before, clock.offset()]
        self.values.check()
        begin, arrival, end = on_the_host(stamps, *self.offsets).T
        ones = np.ones(n)
        return Series(begin, arrival, ones), Series(arrival, end, ones)

    def _stamps(self, clock: EventClock, n: int) -> NDArray[np.int64]:
        """Of begin, arrival and end of each round, [n, 3], by that clock."""
        stamps = np.empty((n, 3), np.int64)
        queue: list[tuple[int, list[list[Any]]]] = []
        self.dry, last = 0, None
        for turn, first in enumerate(range(0, n, BATCH)):
            batch = self.pool[turn % 3][: n - first]  # of the last but one an event is still to be read
            for begin, arrival, end in batch:
                begin.record()
                self.replay()
                is_dry = (
                    last is not None and last.query()
                )  # before this round, or below before its collective
                arrival.record()
                self.exchange(self.values.received, self.values.sent)
                is_dry |= arrival.query()
                end.record()
                self.dry += is_dry and turn > 0
                last = end
            queue.append((first, batch))
            if len(queue) > 1:
                read(clock, *queue.pop(0), stamps)
        for waiting in queue:
            read(clock, *waiting, stamps)
        return stamps


def read(clock: EventClock, first: int, batch: list[list[Any]], stamps: NDArray[np.int64]) -> None:
    """From row `first` on, once the last of them is reached."""
    batch[-1][-1].synchronize()
    stamps[first : first + len(batch)] = [[clock.read(event) for event in events] for events in batch]
