"""A GPU that is a fake: a queue on this CPU, whose clock runs apart."""

import contextlib
import ctypes
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from sigma_noise import loops
from sigma_noise.gpu import Gpu
from torch.utils._python_dispatch import TorchDispatchMode

AHEAD_NS = 1_700_000_000_123_456_789  # of the device's timer


class Operations(TorchDispatchMode):
    """How many there were: one a step of each kernel."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


class FakeGpu:
    """Replays take the time that `work_ns` gives them for each of their steps, in order of enqueuing; now is when the
    host last looked.

    `round_ns`: what a round of spin takes beyond its steps, by its number and block, from the first launch on.
    """

    def __init__(self, work_ns, round_ns=None):
        self.at_ns, self.work_ns, self.replayed, self.captured_steps = 0, work_ns, 0, []
        self.round_ns, self.rounds, self.launches = round_ns, 0, []
        fake = self

        class Event:
            def record(self):
                fake.at_ns = max(fake.at_ns, loops.now_ns())
                self.ns = fake.at_ns

            def elapsed_time(self, end):
                return float(np.float32((end.ns - self.ns) * 1e-6))

            def synchronize(self):
                while loops.now_ns() < self.ns:
                    pass

            def query(self):
                return loops.now_ns() >= self.ns

        self.event = Event

    def captured(self, step):
        with Operations() as operations:
            step()
        steps = max(1, operations.number)
        self.captured_steps.append(steps)

        def replay():
            self.at_ns = max(self.at_ns, loops.now_ns()) + steps * int(self.work_ns(self.replayed))
            self.replayed += 1

        return replay

    def run_arithmetic(self, blocks, rounds, steps, stamps, sums, stream):
        """Rounds of 1 us a step, on multiprocessors 5, 6, ..., by a timer of 32 ns."""
        out = np.frombuffer((ctypes.c_int64 * (blocks * rounds * 4)).from_address(stamps), np.int64)
        out = out.reshape(blocks, rounds, 4)
        begin, end = loops.now_ns(), 0
        for block in range(blocks):
            took = np.full(rounds, 1000 * steps)
            if self.round_ns is not None:
                took += self.round_ns(self.rounds + np.arange(rounds), block)
            edges = begin + np.concatenate([[0], np.cumsum(took)])
            out[block, :, 0], out[block, :, 1] = edges[:-1], edges[1:]
            out[block, :, 3] = block + 5
            end = max(end, edges[-1])
        self.rounds += rounds
        while loops.now_ns() < end:
            pass
        out[..., :2] = (out[..., :2] + AHEAD_NS) // 32 * 32
        self.launches.append(out.copy())

    @contextlib.contextmanager
    def over_gloo(self):
        """The ranks' own group; the host waits, which does the collective, and a real one's does not."""

        def exchange(received, sent):
            while loops.now_ns() < self.at_ns:
                pass
            dist.all_to_all_single(received, sent)

        yield exchange

    def gpu(self, native=True, uuid="fake"):
        kernels = SimpleNamespace(run_arithmetic=self.run_arithmetic, work_threads=256)
        return Gpu(
            device=torch.device("cpu"), about={"name": "fake", "uuid": uuid}, processors=2, event=self.event,
            captured=self.captured, synchronize=lambda: None, stream=lambda: 0,
            native=kernels if native else None, exchange=self.over_gloo,
        )  # fmt: skip


def spun(seconds, function):
    """What takes the host so long before it does anything."""

    def slow(*args):
        begin_ns = loops.now_ns()
        while loops.now_ns() - begin_ns < seconds * 1e9:
            pass
        function(*args)

    return slow
