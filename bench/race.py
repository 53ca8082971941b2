"""Turns: every candidate once a round, in random order, so that whatever drifts drifts under all of them."""

import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

OURS = "sigma"
BOUND = "bound_"  # candidates whose name starts so are limits, not rivals, and compute something else
BESIDE = "beside_"  # neither: timed in the same turns to be compared with
VARIANT = f"{OURS}_"  # ours in another way: checked as a rival, no peer
SLOW_S, FEW_ROUNDS = 3.0, 3  # who needs so long for a call runs in so many rounds: its median is in no doubt
REST_S = 0.1  # threads that wait by spinning have gone to sleep by then


class CannotRun(Exception):
    """A rival says why it has no time in this race."""


@dataclass
class Race:
    """Runs the rivals between the rounds of a candidate that somebody else times.

    `until_ours` runs whoever comes before our next turn, `finish` whoever is left.  Those in `limits` take part in
    their first so many rounds only.  Those in `apart` have threads of their own, which spin for a while after a call:
    there is a rest before and after each of their turns.
    """

    others: Mapping[str, Callable[[], object]]
    rounds: int
    limits: Mapping[str, int] = field(default_factory=dict)
    apart: Collection[str] = ()
    seed: int = 0
    rest: Callable[[float], object] = time.sleep
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
        if name in self.apart:
            self.rest(REST_S)
        start = self.clock()
        self.others[name]()
        self.times[name].append(self.clock() - start)
        if name in self.apart:
            self.rest(REST_S)


def first_calls(
    calls: Mapping[str, Callable[[], Any]],
    check: Callable[[str, Any], None] | None,
    once: Collection[str] = (),
    clock: Callable[[], float] = time.perf_counter,
    on_gpu: bool = False,
) -> tuple[dict[str, list[float]], dict[str, str], list[str]]:
    """Call everyone once, before any clock that counts, and check what they answer; bounds are not checked.

    On a GPU a first call compiles, so a second one says who is slow; and a peer that fails or is wrong there is out
    with what it said, since no version of it may fit this device.

    Returns: the times of those in `once`, who are too slow to be called again, of those who raise CannotRun the
    reasons, and who took longer than SLOW_S.
    """
    slow = []
    times: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for name, call in calls.items():
        start = clock()
        try:
            result = call()
            took = clock() - start
            if on_gpu:
                examine(name, result, check)
                start = clock()
                call()
                took = clock() - start
        except CannotRun as error:
            reasons[name] = str(error)
            continue
        except Exception as error:
            if not on_gpu or name == OURS or name.startswith(BOUND):
                raise
            reasons[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if name in once:
            times[name] = [took]
        elif took > SLOW_S and name != OURS:
            slow.append(name)
        if not on_gpu:
            examine(name, result, check)
    return times, reasons, slow


def examine(name: str, result: object, check: Callable[[str, Any], None] | None) -> None:
    if check is not None and not name.startswith((BOUND, BESIDE)):
        check(name, result)


def record(name: str, times: list[float], calls: int = 1, moved: int | None = None) -> dict[str, object]:
    """One candidate's line in the results; each of `times` is of so many calls, `moved` of who moves other bytes."""
    return {
        **_who(name),
        "median_s": statistics.median(times) / calls,
        "min_s": min(times) / calls,
        "max_s": max(times) / calls,
        "rounds": len(times),
        **({} if moved is None else {"moved": moved}),
    }


def absent(name: str, reason: str) -> dict[str, object]:
    """The line of a candidate that has no time."""
    return {**_who(name), "reason": reason}


def _who(name: str) -> dict[str, object]:
    kinds = {BOUND: "bound", BESIDE: "beside", VARIANT: "variant"}
    kind = next((kinds[prefix] for prefix in kinds if name.startswith(prefix)), "peer")
    return {
        "name": name.removeprefix(BOUND).removeprefix(BESIDE),
        "kind": "ours" if name == OURS else kind,
    }
