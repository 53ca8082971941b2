"""What `run --attribute` adds to a measurement: counters of the thread and host, and of accelerators."""

import contextlib
import os
from collections.abc import Iterator

import numpy as np

from sigma_noise.accelerators import Poller
from sigma_noise.attribution import Attribution, attribute_trace
from sigma_noise.fitness import fault_cost_s
from sigma_noise.lost import Lost
from sigma_noise.sampler import Sampler
from sigma_noise.ticker import housekeeping
from sigma_noise.trace import Series, Trace

FLOOR_QUANTILE = 0.05  # of quanta, for what they took undisturbed


class Watch:
    """The calling thread and all accelerators, watched between `begin` and `end`."""

    def __init__(self, seed: int) -> None:
        self._costs = {"minor_faults": fault_cost_s()}
        self._sampler = Sampler(seed=seed)
        self._poller = Poller(seed=seed + 1, cpus=housekeeping(os.sched_getaffinity(0)))

    def __enter__(self) -> "Watch":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._poller)
            stack.enter_context(self._sampler)
            self._watched = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._watched.close()

    def into(self, trace: Trace, rank: int) -> Trace:
        """The same trace with what was seen, and how."""
        about = {
            "sampler": self._sampler.info,
            "accelerators": self._poller.info,
            "fault_cost_s": self._costs,
        }
        ranks = {r: dict(m) | (about if r == rank else {}) for r, m in trace.ranks.items()}
        return Trace(trace.run, ranks, dict(trace.rows) | self._sampler.rows(rank) | self._poller.rows(rank))


@contextlib.contextmanager
def watching(is_wanted: bool, seed: int) -> Iterator[Watch | None]:
    """Begin where the measuring thread is pinned already; None where nothing is wanted."""
    if not is_wanted:
        yield None
        return
    with Watch(seed) as watch:
        yield watch


def causes(trace: Trace, rank: int) -> list[tuple[str, Attribution]]:
    """Of each series of a rank that was watched: detours, and quanta of fixed work above their floor.

    The floor is one quantile of all quanta, so a change of level counts as loss: `analyze` takes it segment by segment.
    """
    about = trace.ranks[rank]
    if "sampler" not in about:
        return []
    found = []
    for name, series in _lossy(trace, rank):
        if len(series):
            found.append(
                (name, attribute_trace(trace, rank, _lost(name, series), seed=trace.run.get("seed", 0)))
            )
    return found


def _lossy(trace: Trace, rank: int) -> Iterator[tuple[str, Series]]:
    measured = trace.ranks[rank]["measured"]
    for name, series in trace.of(rank, "quantum"):
        if measured.get(name, {}).get("mode") == "fwq":
            yield name, series
    yield "detour", trace.get(rank, "event", "detour")


def _lost(name: str, series: Series) -> Lost:
    if name == "detour":
        window = int(series.start_ns[0]), int(series.end_ns[-1])
        return Lost(series.start_ns, series.end_ns, series.value, window)
    return Lost.over_floor(series, float(np.quantile(series.seconds, FLOOR_QUANTILE)))
