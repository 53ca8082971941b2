"""Turns: every candidate once a round, in random order, so that whatever drifts drifts under all of them."""

import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "sigma"
BOUND = "bound_"  # candidates whose name starts so are limits, not rivals, and compute something else


@dataclass
class Race:
    """Runs the rivals between the rounds of a candidate that somebody else times.

    `until_ours` runs whoever comes before our next turn, `finish` whoever is left.  Those in `limits` take part in
    their first so many rounds only.
    """

    others: Mapping[str, Callable[[], object]]
    rounds: int
    limits: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    clock: Callable[[], float] = time.perf_counter
    times: dict[str, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.times = {name: [] for name in self.others}
        shuffle = random.Random(self.seed).shuffle
        self._queue: list[str] = []
        for turn in range(self.rounds):
            names = [OURS, *(name for name in self.others if turn < self.limits.get(name, self.rounds))]
            shuffle(names)
            self._queue += names

    def until_ours(self) -> None:
        while (name := self._queue.pop(0)) != OURS:
            self._run(name)

    def finish(self) -> None:
        while self._queue:
            self._run(self._queue.pop(0))

    def _run(self, name: str) -> None:
        start = self.clock()
        self.others[name]()
        self.times[name].append(self.clock() - start)


def first_calls(
    calls: Mapping[str, Callable[[], Any]],
    check: Callable[[str, Any], None] | None,
    once: Collection[str] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Call everyone once, before any clock that counts, and check what they answer; bounds are not checked.

    The times of those in `once`, who are too slow to be called again, are what this returns.
    """
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        start = clock()
        result = call()
        if name in once:
            times[name] = [clock() - start]
        if check is not None and not name.startswith(BOUND):
            check(name, result)
    return times


def record(name: str, times: list[float]) -> dict[str, object]:
    """One candidate's line in the results."""
    return {
        "name": name.removeprefix(BOUND),
        "is_bound": name.startswith(BOUND),
        "median_s": statistics.median(times),
        "min_s": min(times),
        "rounds": len(times),
    }
