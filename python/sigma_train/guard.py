"""Whether a step's loss and gradient are fit to be learned from, judged by those before it, and what was done.

All ranks judge the same two numbers, so that they come to the same end without asking one another.
"""

import math
import statistics
from collections import deque
from typing import Any

from sigma_train.config import GuardConfig
from sigma_train.errors import Failure

LEAST_HISTORY = 20  # steps before spikes are told from a run's beginning
LEAST_DEVIATION = 0.05  # of a logarithm: a run that hardly moves has no spikes of a few per cent
TO_DEVIATION = 1.4826  # of a normal distribution, from its median absolute deviation


class Diverged(Failure):
    """The loss or its gradient is no number, or a spike, and the run is not to go on; one sentence."""


class Guard:
    """What a run has seen and done; `state` goes into its checkpoints."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.rate_scale = 1.0
        self.passed_over: set[int] = set()  # steps whose sequences are left out
        self.met = 0  # troubles that changed the run
        self._seen = {name: deque[float](maxlen=config.window) for name in ("loss", "gradient norm")}

    def trouble(self, loss: float, norm: float) -> tuple[str, str] | None:
        """The policy that is asked for and what is wrong, or None; such a step is not part of the history."""
        now = {"loss": loss, "gradient norm": norm}
        told = f"loss {loss:.6g}, gradient norm {norm:.6g}"
        if not all(map(math.isfinite, now.values())):
            return self.config.on_nonfinite, told
        for name, value in now.items():
            deviations = spike(value, self._seen[name])
            if deviations > self.config.spike:
                return (
                    self.config.on_spike,
                    f"{told}: the {name} is {deviations:.0f} deviations above its median",
                )
        self.accept(loss, norm)
        return None

    def accept(self, loss: float, norm: float) -> None:
        """A step was learned from."""
        for seen, value in zip(self._seen.values(), (loss, norm), strict=True):
            seen.append(value)

    def meet(self, policy: str, step: int, told: str) -> None:
        """Count a trouble, and leave the step's sequences out from now on.

        Raises: Diverged where the policy is to stop, or where it would be the guard.most-th and one.
        """
        advice = (
            "a resumed run would meet it again: resume with another guard.on_nonfinite or guard.on_spike, "
            "or start anew with a lower optim.lr"
        )
        if policy == "stop":
            raise Diverged(f"step {step + 1}: {told}; no checkpoint holds this step, and {advice}")
        if self.met == self.config.most:
            raise Diverged(
                f"step {step + 1}: {told}; {self.met} steps were left out before, guard.most allows no more"
            )
        self.met += 1
        self.passed_over.add(step)
        if policy == "lower_rate":
            self.rate_scale *= self.config.lower_by

    def state(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "rate_scale": self.rate_scale,
            "passed_over": sorted(self.passed_over),
            "met": self.met,
            "seen": [list(seen) for seen in self._seen.values()],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.rate_scale, self.met = state["rate_scale"], state["met"]
        self.passed_over = set(state["passed_over"])
        self.rewind(state)

    def rewind(self, state: dict[str, Any] | None) -> None:
        """Have seen what this state has, or nothing, as weights go back to it; what was met stays."""
        values = state["seen"] if state else [[] for _ in self._seen]
        for seen, former in zip(self._seen.values(), values, strict=True):
            seen.clear()
            seen.extend(former)


def spike(value: float, seen: deque[float]) -> float:
    """Robust deviations of log(value) above the median of those seen; 0 while too few were.

    The median and the median absolute deviation, as spikes themselves must not widen what is usual (Hampel 1974,
    doi 10.2307/2285666).
    """
    if len(seen) < LEAST_HISTORY:
        return 0.0
    logs = [math.log(max(x, 1e-30)) for x in seen]
    middle = statistics.median(logs)
    deviation = TO_DEVIATION * statistics.median(abs(x - middle) for x in logs)
    return (math.log(max(value, 1e-30)) - middle) / max(deviation, LEAST_DEVIATION)
