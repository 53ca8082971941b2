"""Stamps of a device by the host's clock: the two are set beside each other before a measurement and after it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sigma_noise import loops
from sigma_noise.gpu import Gpu
from sigma_noise.offset import Offset

PROBES = 50  # times that the two are set beside each other


def on_the_host(stamps_ns: NDArray[np.int64], before: Offset, after: Offset) -> NDArray[np.int64]:
    """The device's stamps by the host's clock: the two drift apart, evenly between two offsets."""
    drift = (after.offset_ns - before.offset_ns) / (after.at_ns - before.at_ns)
    moved = np.round(drift * (stamps_ns - before.at_ns)).astype(np.int64)
    return stamps_ns + before.offset_ns + moved


class EventClock:
    """When events were reached, ns since this began.

    Events tell only what lies between two of them, in f32: long stretches are sums of short ones.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.ns, self.last = gpu, 0, gpu.event()
        self.last.record()

    def read(self, event: Any) -> int:
        """Of an event that was reached, after all that were read before; it may not be recorded until the next is."""
        self.ns += round(self.last.elapsed_time(event) * 1e6)
        self.last = event
        return self.ns

    def offset(self) -> Offset:
        """What to add to have the host's clock: an event lies between the readings before and after it."""
        low, high = -(1 << 62), 1 << 62
        for _ in range(PROBES):
            event = self.gpu.event()
            self.gpu.synchronize()
            before = loops.now_ns()
            event.record()
            event.synchronize()
            after = loops.now_ns()
            at = self.read(event)
            low, high = max(low, before - at), min(high, after - at)
        return Offset(
            at, (low + high) // 2, (abs(high - low) + 1) // 2
        )  # bounds cross by as much as clocks drift
