"""Counters of the measuring thread, its CPU and its host, taken beside the measurement."""

import errno
import gc
import os
import threading
import time
from array import array
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sigma_noise.counters import Source, sources
from sigma_noise.ticker import Ticker, housekeeping
from sigma_noise.trace import Key, Series

GIVE_UP_AFTER = 3  # failures in a row of one source: it is gone for good, and asking costs time
GONE = {
    errno.ENOENT: "does not exist",
    errno.ESRCH: "its thread ended",
    errno.ENODEV: "its group was removed",
}


class Sampler:
    """Reads `counters.sources` of a thread about every `period_s`, and the pauses of Python's garbage collector.

    with Sampler() as sampler:      # in the thread that measures, after it was pinned
        series = fixed_work(...)
    rows = sampler.rows(rank)       # to put beside the quanta; sampler.info goes to the rank's metadata

    Its thread runs on a CPU that the measuring thread may not use, if there is one (info["housekeeping_cpus"] is empty
    if not).  Each reading has a stamp of its own, halfway between before and after it.
    Args:   tid: native id of a thread of this process, the calling one by default; cpu: where it is pinned, taken
            from its affinity by default; root: of /proc and /sys, for tests.
    """

    def __init__(
        self,
        *,
        tid: int | None = None,
        cpu: int | None = None,
        period_s: float = 0.1,
        seed: int = 0,
        cpus: Collection[int] | None = None,
        root: Path = Path("/"),
    ) -> None:
        self.tid = threading.get_native_id() if tid is None else tid
        affinity = os.sched_getaffinity(self.tid) if root == Path("/") else set()
        self.cpu = cpu if cpu is not None else (min(affinity) if len(affinity) == 1 else None)
        measured = affinity if self.cpu is None else {self.cpu}
        self._ticker = Ticker(self.sample, period_s, seed, housekeeping(measured) if cpus is None else cpus)
        self._readers = [_Reader(source) for source in sources(self.tid, self.cpu, root)]
        self._gc = _GcPauses()

    def __enter__(self) -> "Sampler":
        self._began_ns = time.monotonic_ns()
        self._ticker.start()
        gc.callbacks.append(self._gc)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        gc.callbacks.remove(self._gc)
        self._ended_ns = time.monotonic_ns()
        self._ticker.stop()

    @property
    def info(self) -> dict[str, Any]:
        """JSON: what was read and what was not, each with its reason, and what that cost."""
        account = self._ticker.account
        elapsed_s = (self._ended_ns - self._began_ns) * 1e-9
        of_pinned = () if self.cpu is not None else ("cpu_khz", "core_throttled_ns")
        unread = dict.fromkeys(of_pinned, "the measuring thread is not pinned to one CPU")
        for reader in self._readers:
            if not reader.stamps:
                unread |= dict.fromkeys(reader.source.names, reader.reason)
        return {
            **account,
            "cost_ratio": account["cost_s"] / elapsed_s,
            "cpu": self.cpu,
            "unread": unread,
            "interrupted": {
                name: reader.reason
                for reader in self._readers
                if reader.stamps and reader.reason
                for name in reader.source.names
            },
        }

    def rows(self, rank: int) -> dict[Key, Series]:
        found: dict[Key, Series] = {}
        for reader in self._readers:
            for name, series in reader.series():
                found[rank, "counter", name] = series
        if len(self._gc):
            found[rank, "event", "gc"] = self._gc.series()
        return found

    def sample(self) -> None:
        """One reading of everything."""
        for reader in self._readers:
            reader.read()


class _Reader:
    """What a source said, when, and how it failed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.stamps = array("q")
        self._values = [array("d") for _ in source.names]
        self.reason = ""
        self._failures = 0

    def read(self) -> None:
        if self._failures >= GIVE_UP_AFTER:
            return
        before = time.monotonic_ns()
        try:
            values = self.source.read()
            if len(values) != len(self._values):
                raise ValueError(f"{len(values)} numbers instead of {len(self._values)}")
        except OSError as error:
            self._failed(GONE.get(error.errno, error.strerror or str(error)))
            return
        except (ValueError, IndexError, KeyError) as error:
            self._failed(f"odd contents: {error}")
            return
        self._failures = 0
        self.stamps.append((before + time.monotonic_ns()) // 2)
        for column, value in zip(self._values, values, strict=True):
            column.append(value)

    def series(self) -> list[tuple[str, Series]]:
        stamps = np.array(self.stamps, np.int64)
        if not len(stamps):
            return []
        return [
            (name, Series(stamps, stamps, np.array(column, np.float64)))
            for name, column in zip(self.source.names, self._values, strict=True)
        ]

    def _failed(self, why: str) -> None:
        self._failures += 1
        if not self.reason:
            path = getattr(self.source, "path", "")
            read = f"after {len(self.stamps)} readings " if self.stamps else ""
            self.reason = f"{read}{path}{': ' if path else ''}{why}"


class _GcPauses:
    """A callback of gc.callbacks: begin, end and generation of every collection of this process."""

    def __init__(self) -> None:
        self._began_ns = 0
        self._stamps = array("q")
        self._generation = array("d")

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began_ns = time.monotonic_ns()
        elif self._began_ns:  # one that began before us has no begin
            self._stamps.extend((self._began_ns, time.monotonic_ns()))
            self._generation.append(info["generation"])
            self._began_ns = 0

    def __len__(self) -> int:
        return len(self._generation)

    def series(self) -> Series:
        stamps = np.array(self._stamps, np.int64).reshape(-1, 2)
        return Series(stamps[:, 0].copy(), stamps[:, 1].copy(), np.array(self._generation, np.float64))
