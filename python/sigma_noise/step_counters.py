"""What tells why a step of a training was late: counters of its main thread, and a heartbeat of its process.

Counters are read where steps begin and end, three small files that stay open and a clock.  The heartbeat is a
native thread that wakes every 10 ms and writes down when it was late (csrc/noise/heartbeat.h): 0.3 % of a core.
"""

import threading

from sigma_kernels import _C
from sigma_noise.counters import Held, Source, sources
from sigma_noise.recorder import Recorder, now_ns

NAMES = ("on_cpu_ns", "run_delay_ns", "throttled_ns")
LATE = "late wake"  # an event; value: ns of it for which the heartbeat was runnable without a CPU
APART_NS = 1_000_000  # a step that begins so soon after a reading needs none of its own
PERIOD_NS, LATE_NS = 10_000_000, 10_000_000


class StepCounters:
    """Of the calling thread, into `recorder`.  A source that fails, or that this system has not, is left out."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._read_ns, self._late = recorder, 0, recorder.code("event", LATE)
        self._files = Held()
        self._sources: list[tuple[Source, int]] = [
            (source, recorder.code("counter", source.names[0]))
            for source in sources(threading.get_native_id(), None, reads=self._files)
            if source.names[0] in NAMES
        ]
        self._heartbeat: _C.noise.Heartbeat | None = None

    def begin(self) -> None:
        """Before the first step."""
        self._heartbeat = _C.noise.Heartbeat(PERIOD_NS, LATE_NS)

    def end(self) -> None:
        """After the last one; what the heartbeat has seen is recorded."""
        self._take()
        self._heartbeat = None
        self._files.close()

    def begin_step(self) -> None:
        if now_ns() - self._read_ns > APART_NS:
            self.read()

    def read(self) -> None:
        kept = []
        for source, code in self._sources:
            try:
                value = int(source.read()[0])
            except (OSError, ValueError, IndexError, KeyError, StopIteration):
                continue
            at = now_ns()
            self._recorder.add(code, at, at, value)
            kept.append((source, code))
        self._sources, self._read_ns = kept, now_ns()
        self._take()

    def _take(self) -> None:
        """A stop begins anywhere in a sleep of the heartbeat, in the mean half a period before it was due."""
        if self._heartbeat is not None:
            for due_ns, woke_ns, waited_ns in self._heartbeat.take():
                self._recorder.add(self._late, due_ns - PERIOD_NS // 2, woke_ns, waited_ns)
