"""Ranks of a training beside one another, and many of them, by what each computed by itself in each step.

The time of a step is the same on all ranks, as collectives even it out; what a rank did not wait in it is its own, and
takes the place that local time before a collective has among measurements.
"""

from dataclasses import dataclass

import numpy as np

from sigma_noise.analysis import FEWEST_EFFECTIVE, Options, projected, scored
from sigma_noise.detours import FLOOR
from sigma_noise.project import Projection
from sigma_noise.scores import LEAST_STEPS, Scores
from sigma_noise.steps import WARM_UP, Attempt, attempts_of
from sigma_noise.trace import Trace
from sigma_noise.units import count
from sigma_noise.windows import Windows, host_of

STEP = "step"
RANKED = "local time of a step"


@dataclass(frozen=True)
class StepRanks:
    """Has the names by which `screen` shows ranks and projections of an `Analysis`.

    scores: None of a single rank, or of few steps; `warnings` say which.
    """

    options: Options
    windows: Windows
    scores: Scores | None
    projections: tuple[Projection, ...]
    warnings: tuple[str, ...]

    @property
    def ranked(self) -> str | None:
        """What scores are of."""
        return None if self.scores is None else self.windows.what

    @property
    def window_s(self) -> float:
        return self.windows.mean_s


def step_ranks(trace: Trace, options: Options | None = None, warm_up: int = WARM_UP) -> StepRanks:
    """Scores and S(N) of a record of `sigma train --noise`.

    Raises: ValueError as `step_noise`, or for options that cannot be.
    """
    windows, left_out = step_windows(trace, warm_up)
    options = options or Options()
    scores = scored(windows, options)
    told = [left_out] if left_out else []
    steps = len(next(iter(windows.rows.values())))
    if len(windows.rows) > 1 and scores is None:
        told.append(f"{count(steps, 'step')} of all ranks, scores want {LEAST_STEPS}; train longer")
    if scores is not None and scores.n_eff < FEWEST_EFFECTIVE:
        told.append(
            f"{steps:,} steps are worth {scores.n_eff:,.0f} independent ones, so intervals may be short; train longer"
        )
    return StepRanks(options, windows, scores, projected(windows, options), tuple(told))


def step_windows(trace: Trace, warm_up: int = WARM_UP) -> tuple[Windows, str]:
    """Local time of each step on each rank, a window each; and a sentence on steps that were left out, "" if none.

    Starts of a training may have different ranks: of these sets the one that made most steps is taken.
    Raises: ValueError as `step_noise`.
    """
    by_ranks: dict[tuple[int, ...], list[Attempt]] = {}
    for attempt in attempts_of(trace, warm_up):
        by_ranks.setdefault(tuple(attempt.ranks), []).append(attempt)
    if not by_ranks:
        raise ValueError(
            f"step_windows: all ranks of the trace must have a step after the first {warm_up}, found none"
        )
    steps = {ranks: sum(attempt.n for attempt in attempts) for ranks, attempts in by_ranks.items()}
    ranks = max(steps, key=steps.__getitem__)
    local = np.concatenate([attempt.local for attempt in by_ranks[ranks]])  # [n, R]
    rows = {rank: np.maximum(local[:, i], 1e-9) for i, rank in enumerate(ranks)}
    first = dict.fromkeys(ranks, np.arange(len(local)))
    hosts = {rank: host_of(trace, rank) for rank in ranks}
    work_s = float(np.quantile(local, FLOOR))
    others = sum(steps.values()) - steps[ranks]
    left_out = f"{count(others, 'step')} of other ranks than these {len(ranks)} left out" if others else ""
    return Windows(RANKED, STEP, work_s, rows, hosts, first), left_out
