"""How a turn is timed: by the host's clock, or by events on a GPU's stream."""

import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

WARM_UPS = 3
TURN_S = 2e-3  # of the device: events tell half a microsecond apart
MOST_CALLS = 64  # of a turn
MOST_HOLD_S = 0.1
LEAST_FLUSH = 512 * 2**20  # bytes; the last cache of an MI300X has 256 MiB
CYCLES = 10**7
SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")

Call = Callable[[], object]


class Host:
    """A turn is so many calls between two looks at the host's clock."""

    device = torch.device("cpu")
    now = wall = staticmethod(time.perf_counter)

    def turn(self, call: Call, calls: int) -> Call:
        if calls == 1:
            return call

        def several() -> None:
            for _ in range(calls):
                call()

        return several

    def about(self) -> dict[str, Any] | None:
        return None

    def release(self) -> None:
        pass


class Gpu:
    """A turn is calls queued one behind another, each between two events, with L2 flushed before the first of them.

    `now` moves by what events measured and stands still else: read before and after a turn, as pytest-benchmark does,
    it gives the device's time.  A sleeping kernel holds the stream until the host has queued the turn, so that gaps
    between launches are counted only of a call that makes the host wait for the device.
    """

    device = torch.device("cuda")

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.cuda, self.seconds = cuda, 0.0
        self.properties = cuda.get_device_properties(self.device)
        l2 = getattr(self.properties, "L2_cache_size", 0)
        self.buffer = torch.empty(max(2 * l2, LEAST_FLUSH), dtype=torch.uint8, device=self.device)
        self._slept(10 * CYCLES)  # loads the kernel, and the clocks rise
        self.cycles_per_s = CYCLES / self._slept(CYCLES)

    def now(self) -> float:
        return self.seconds

    def wall(self) -> float:
        """The host's clock when all that was queued is done."""
        self.cuda.synchronize()
        return time.perf_counter()

    def turn(self, call: Call, calls: int) -> Call:
        """Warms up, and finds how many calls make a turn; its time is scaled to `calls` of them."""
        for _ in range(WARM_UPS):
            call()
        took, queued = self._timed(call, calls, 0)
        repeats = max(1, min(math.ceil(TURN_S / max(took, 1e-9)), MOST_CALLS // calls))
        hold = min(2 * repeats * queued, MOST_HOLD_S)  # twice: the host is not always as fast

        def run() -> None:
            self.seconds += self._timed(call, repeats * calls, hold)[0] / repeats

        return run

    def _timed(self, call: Call, calls: int, hold: float) -> tuple[float, float]:
        """Seconds of the calls on the device, and seconds that the host needed to queue them."""
        events = [self._events() for _ in range(calls)]
        begun = self.wall()
        self.cuda._sleep(int(hold * self.cycles_per_s))
        for start, end in events:
            self.buffer.zero_()
            start.record()
            call()
            end.record()
        queued = time.perf_counter() - begun
        self.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1e3, queued

    def _events(self) -> tuple[Any, Any]:
        return self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)

    def _slept(self, cycles: int) -> float:
        start, end = self._events()
        start.record()
        self.cuda._sleep(cycles)
        end.record()
        self.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    def about(self) -> dict[str, Any]:
        """The device as the page names it; clocks as they are now, right after a race."""
        p, hip = self.properties, torch.version.hip
        amd = Path("/sys/module/amdgpu/version")
        smi = {} if hip else nvidia_smi(getattr(p, "uuid", ""))
        return {
            "name": p.name,
            "architecture": getattr(p, "gcnArchName", "") if hip else f"sm_{p.major}{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "peak_bytes": self.cuda.max_memory_allocated(),
            "flush_bytes": self.buffer.nbytes,
            "runtime": f"HIP {hip}" if hip else f"CUDA {torch.version.cuda}",
            "driver": smi.pop("driver_version", None)
            or (amd.read_text().strip() if amd.exists() else "unknown"),
            "clocks": smi,
        }

    def release(self) -> None:
        self.cuda.empty_cache()


def nvidia_smi(uuid: object) -> dict[str, str]:
    """Driver, clocks and power limit; nothing where nvidia-smi is not there or does not know the device."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI, (part.strip() for part in out.split(",")), strict=False))
