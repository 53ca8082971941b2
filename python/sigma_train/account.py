"""Where the time of a run went: the events of its ledger as seconds by cause, and figures of these.

Every moment in which the run held its ranks has one cause, so the causes sum to the allocated time: integers of
nanoseconds, each times the ranks that were held.  A step's time is useful while its result is part of the weights.
"""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from sigma_train.events import CLEAN, Back, Begin, End, Event, How, Peak, Spent
from sigma_train.guard import TO_DEVIATION

CAUSES = {
    "useful": "steps that the weights hold",
    "lost": "steps computed again, after the checkpoint that the run went back to",
    "left_out": "steps that the guard left out",
    "stall": "what a step took beyond the usual",
    "start": "from the start of the processes to the first step",
    "checkpoint": "writing checkpoints",
    "validation": "validation and samples",
    "check": "checks for silent corruption",
    "detection": "from an attempt's last sign of life to the notice of its end",
    "restart": "from the end of an attempt to the next one's start, and going back to a checkpoint",
    "report": "the last sample and the report",
    "unknown": "the rest",
}
BLOCK = 1000  # steps that are judged by their own median
LEAST_STEPS = 10  # fewer have no usual length
STALL = 5.0  # robust deviations above the median
LEAST_DEVIATION = 0.05  # of the median
S = 1e-9  # a nanosecond


@dataclass
class Interruption:
    """An attempt that ended and was not to; recovered once a step is done that no attempt had done before."""

    step: int  # the last one that was done
    since: int  # allocated ns at its end
    why: str
    recovery: int | None = None  # ns


@dataclass
class Attempt:
    """What one start of the ranks has spent, ns of each rank."""

    ranks: int
    machine: str = ""
    launch: str | None = None
    tokens: int = 0
    flops: int = 0
    peak: float | None = None  # FLOP/s of a rank
    spent: Counter[str] = field(default_factory=Counter)
    steps: int = 0  # useful ones
    has_stepped: bool = False
    how: How | None = None
    is_over: bool = False
    is_interrupted: bool = False


@dataclass(frozen=True)
class Totals:
    """Sums over one run or several, from which every figure is made; rank_ns are ns times ranks."""

    spent: Counter[str] = field(default_factory=Counter)  # rank_ns by cause
    allocated: int = 0  # rank_ns
    elapsed: int = 0  # ns in which ranks were held
    idle: int = 0  # ns between an end and a start by the user
    tokens: int = 0  # of useful steps
    flops: int = 0
    capacity: float = 0.0  # FLOPs at the peak in the allocated time
    useful_capacity: float = 0.0  # and in the useful
    attempts: int = 0
    interruptions: int = 0
    recoveries: int = 0
    recovery: int = 0  # ns, of all recoveries
    rollbacks: int = 0
    lost_steps: int = 0

    def __add__(self, other: Self) -> "Totals":
        return Totals(
            **{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__}
        )

    @property
    def utilisation(self) -> float:
        """Useful step time over allocated time."""
        return self.spent["useful"] / self.allocated if self.allocated else 0.0

    @property
    def mfu_allocated(self) -> float | None:
        """Model FLOPs of useful steps over what the peak makes in the allocated time; None where no peak is known."""
        return self.flops / self.capacity if self.capacity else None

    @property
    def mfu_useful(self) -> float | None:
        """The same over the useful time."""
        return self.flops / self.useful_capacity if self.useful_capacity else None

    @property
    def tokens_per_s(self) -> float:
        """Tokens of useful steps, of all ranks, over the time in which ranks were held."""
        return self.tokens / (self.elapsed * S) if self.elapsed else 0.0

    @property
    def mean_recovery_s(self) -> float | None:
        return self.recovery * S / self.recoveries if self.recoveries else None

    def figures(self) -> dict[str, object]:
        """Everything, as JSON has it."""
        return {
            "allocated_rank_s": self.allocated * S,
            "spent_rank_s": {cause: self.spent[cause] * S for cause in CAUSES},
            "elapsed_s": self.elapsed * S,
            "idle_s": self.idle * S,
            "utilisation": self.utilisation,
            "mfu_allocated": self.mfu_allocated,
            "mfu_useful": self.mfu_useful,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "attempts": self.attempts,
            "interruptions": self.interruptions,
            "mean_recovery_s": self.mean_recovery_s,
            "rollbacks": self.rollbacks,
            "lost_steps": self.lost_steps,
        }


class Account:
    """Takes the events of one run in their order; `totals` may be asked at any time."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.attempts: list[Attempt] = []
        self.interruptions: list[Interruption] = []
        self.reached = 0  # the furthest step that was ever done
        self.last_at = 0
        self._clock = 0  # all before it is accounted for
        self._allocated = self._elapsed = self._idle = self._rollbacks = self._lost_steps = 0
        self._last_step = 0  # elapsed ns at its end
        # Steps that the weights hold, in their order: number, ns without a stall, attempt.
        self._step, self._ns, self._of = array("q"), array("q"), array("q")
        self._judged = 0  # of them, which are no longer looked at for stalls
        self._partial = 0  # ns of the step that goes on
        for event in events:
            self.add(event)

    def add(self, event: Event) -> None:
        match event:
            case Begin():
                self._begin(event)
            case End():
                self._end(event)
            case _ if not self.attempts:
                pass  # the ledger lost its beginning; nothing says how many ranks were held
            case Peak():
                self._pass(event.at, "start")
                self.attempts[-1].peak = event.flops_per_s / self.attempts[-1].ranks
            case Spent():
                self._spend(event)
            case Back():
                self._pass(event.at, "restart")
                self._move_partial("left_out")
                self._go_back(event.step)
                self._rollbacks += 1
        self.last_at = event.at

    def totals(self) -> Totals:
        """Up to the last event; steps that may yet turn out to have stalled are judged by what is known."""
        spent: Counter[str] = Counter()
        tokens = flops = 0
        capacity = useful_capacity = 0.0
        for attempt, peak in zip(self._so_far(), self._peaks(), strict=True):
            ns = {cause: ns * attempt.ranks for cause, ns in attempt.spent.items()}
            spent.update(ns)
            tokens += attempt.steps * attempt.tokens
            flops += attempt.steps * attempt.tokens * attempt.flops
            capacity += sum(ns.values()) * S * peak
            useful_capacity += ns.get("useful", 0) * S * peak
        recovered = [i.recovery for i in self.interruptions if i.recovery is not None]
        return Totals(
            spent, self._allocated, self._elapsed, self._idle, tokens, flops, capacity, useful_capacity,
            len(self.attempts), len(self.interruptions), len(recovered), sum(recovered), self._rollbacks,
            self._lost_steps,
        )  # fmt: skip

    def figures(self) -> dict[str, object]:
        """Those of `totals`, and what only one run has."""
        last = self.attempts[-1] if self.attempts else None
        told = [
            {"step": i.step, "why": i.why, "recovery_s": None if i.recovery is None else i.recovery * S}
            for i in self.interruptions
        ]
        return self.totals().figures() | {
            "reached_step": self.reached,
            "last_event_at": self.last_at * S,
            "last_attempt": last.how if last else None,
            "interrupted": told,
        }

    def _so_far(self) -> list[Attempt]:
        """The attempts, with what is open in the last one given a cause for now."""
        if not self.attempts:
            return []
        *former, last = self.attempts
        stalled = sum(self._stalls().values())
        spent = Counter(last.spent)
        spent.update(stall=stalled, useful=-stalled, unknown=self._partial)
        return [*former, replace(last, spent=spent)]

    def _peaks(self) -> list[float]:
        """Of each attempt, FLOP/s of a rank; where none was measured that of the one before, else of the one after."""
        known = [a.peak for a in self.attempts if a.peak]
        peaks, last = [], known[0] if known else 0.0
        for attempt in self.attempts:
            last = attempt.peak or last
            peaks.append(last)
        return peaks

    def _begin(self, event: Begin) -> None:
        if self.attempts:
            if self.attempts[-1].is_over:
                self._move_partial("unknown")
                gap = "restart"
            else:  # killed, and nobody wrote it down
                self._close("lost", is_clean=False, why="its end was not written")
                gap = "unknown"
            if event.restarted:
                self._pass(event.began, gap)
            self._idle += max(0, event.began - self._clock)
            self._settle()
            self._go_back(event.resumed)
        self._clock = max(self._clock, event.began)
        self.attempts.append(Attempt(event.ranks, event.machine, event.launch, event.tokens, event.flops))
        if event.peak:
            self.attempts[-1].peak = event.peak / event.ranks
        self._pass(event.at, "start")

    def _end(self, event: End) -> None:
        last = self.attempts[-1] if self.attempts else None
        if event.began is not None and (last is None or last.launch != event.launch):
            self._begin(_unwritten(event, self._step[-1] if self._step else 0))
            last = self.attempts[-1]
        if last is None:
            return
        how = event.how or last.how
        tail = "unknown" if how in CLEAN else "detection"
        self._pass(event.at, tail if last.has_stepped or last.is_over else "start")
        last.how, last.is_over = how, True
        self._close("unknown" if how in CLEAN else "lost", how in CLEAN, event.why)

    def _close(self, partial: str, is_clean: bool, why: str) -> None:
        """The last attempt is over; an interruption once, by the first reason given."""
        self._move_partial(partial)
        self._settle()
        last = self.attempts[-1]
        if not is_clean and not last.is_interrupted:
            last.is_interrupted = True
            self.interruptions.append(Interruption(self.reached, self._last_step, why))

    def _spend(self, event: Spent) -> None:
        last = self.attempts[-1]
        if event.was not in ("step", "left_out"):
            self._pass(event.at, event.was)
            return
        self._partial += self._pass(event.at, None)
        if event.step is None:
            return
        last.has_stepped = True
        self._last_step = self._elapsed
        if event.was == "left_out":
            self._move_partial("left_out")
        else:
            self._go_back(event.step - 1)  # for one that was computed before, though nothing told of a return
            self._keep(event.step)
        if event.step > self.reached:
            self.reached = event.step
            for interruption in self.interruptions:
                if interruption.recovery is None:
                    interruption.recovery = self._elapsed - interruption.since

    def _keep(self, step: int) -> None:
        last = self.attempts[-1]
        self._step.append(step)
        self._ns.append(self._partial)
        self._of.append(len(self.attempts) - 1)
        last.spent["useful"] += self._partial
        last.steps += 1
        self._partial = 0
        if len(self._step) - self._judged == BLOCK:
            self._settle()

    def _go_back(self, step: int) -> None:
        """The steps after this one are lost."""
        if not self._step or self._step[-1] <= step:
            return
        self._settle()
        while self._step and self._step[-1] > step:
            self._step.pop()
            ns, attempt = self._ns.pop(), self.attempts[self._of.pop()]
            attempt.spent["useful"] -= ns
            attempt.spent["lost"] += ns
            attempt.steps -= 1
            self._lost_steps += 1
        self._judged = min(self._judged, len(self._step))

    def _settle(self) -> None:
        """Judge the open block of steps, and open the next."""
        for place, excess in self._stalls().items():
            attempt = self.attempts[self._of[place]]
            self._ns[place] -= excess
            attempt.spent["useful"] -= excess
            attempt.spent["stall"] += excess
        self._judged = len(self._step)

    def _stalls(self) -> dict[int, int]:
        """Place and excess over the median, ns, of the steps of the open block that took far longer than usual."""
        block = np.array(self._ns[self._judged :], dtype=np.int64)
        if len(block) < LEAST_STEPS:
            return {}
        usual = int(np.median(block))
        deviation = TO_DEVIATION * float(np.median(np.abs(block - usual)))
        most = usual + STALL * max(deviation, LEAST_DEVIATION * usual)
        return {self._judged + i: int(block[i]) - usual for i in np.flatnonzero(block > most).tolist()}

    def _move_partial(self, cause: str) -> None:
        self.attempts[-1].spent[cause] += self._partial
        self._partial = 0

    def _pass(self, until: int, cause: str | None) -> int:
        """Allocate the time until then to the last attempt, and to a cause if there is one; a clock never goes back."""
        ns = max(0, until - self._clock)
        self._clock += ns
        self._elapsed += ns
        self._allocated += ns * self.attempts[-1].ranks
        if cause is not None:
            self.attempts[-1].spent[cause] += ns
        return ns


def _unwritten(end: End, resumed: int) -> Begin:
    """Of an attempt that ended before it could write one."""
    at = end.began or end.at
    return Begin(
        at=at, began=at, ranks=end.ranks or 1, resumed=resumed, restarted=end.restarted, launch=end.launch
    )
