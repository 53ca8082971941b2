"""Spin kernels of known cycles between replays of a graph, and whether the replays' own stamps show them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sigma_noise import cuda_replays, detours
from sigma_noise.changes import segments
from sigma_noise.gpu import Gpu
from sigma_noise.spans import Match, match
from sigma_noise.trace import Series

CYCLES = 4_000_000  # 2 ms at 2 GHz
EVERY = 64  # replays


class SideStream:
    """Spins on a stream of its own, for which what is enqueued after it waits."""

    def __init__(self, cycles: int = CYCLES) -> None:
        self.cycles, self.stream = cycles, torch.cuda.Stream()

    def __call__(self, begin: Any, end: Any) -> None:
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)  # else it would begin as it is enqueued, which is far ahead
        with torch.cuda.stream(self.stream):
            begin.record()
            torch.cuda._sleep(self.cycles)
            end.record()
        main.wait_stream(self.stream)


class Disturbed:
    """`replay`, every so often with a spin before it; `spins` are its number and the events around the spin."""

    def __init__(self, gpu: Gpu, replay: Callable[[], None], spin: Callable[[Any, Any], None]) -> None:
        self.gpu, self.replay, self.spin = gpu, replay, spin
        self.spins: list[tuple[int, Any, Any]] = []
        self.calls = 0

    def __call__(self) -> None:
        if self.calls % EVERY == EVERY - 1:
            self.spins.append((self.calls, self.gpu.event(), self.gpu.event()))
            self.spin(*self.spins[-1][1:])
        self.replay()
        self.calls += 1


def measured(
    gpu: Gpu, replay: Callable[[], None], spin: Callable[[Any, Any], None], duration_s: float
) -> tuple[Series, Series]:
    """Quanta, and the spins within them by the device's own events."""
    disturbed = Disturbed(gpu, replay, spin)
    edges = cuda_replays.replays(gpu, disturbed, 0, duration_s).edges_ns
    quanta = Series(edges[:-1], edges[1:], np.ones(len(edges) - 1))
    seen = [
        (n - cuda_replays.BATCH, begin.elapsed_time(end))
        for n, begin, end in disturbed.spins
        if n >= cuda_replays.BATCH
    ]
    start = quanta.start_ns[[n for n, _ in seen]]
    length_ns = np.array([round(ms * 1e6) for _, ms in seen], np.int64)
    return quanta, Series(start, start + length_ns, length_ns * 1e-9)


def found(quanta: Series, spins: Series) -> tuple[Match, detours.Noise]:
    """Those of the spins that the analysis takes for detours, by overlap."""
    start = (quanta.start_ns - quanta.start_ns[0]) * 1e-9
    noise = detours.fixed_work(start, quanta.seconds, segments(quanta.seconds))
    begins = quanta.start_ns[noise.detours.index]
    lasts = np.round(noise.detours.length_s * 1e9).astype(np.int64)
    return match(spins, Series(begins, begins + lasts, noise.detours.length_s)), noise
