"""What a cause of noise costs on N ranks: the seconds a step that would be regained if it were gone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sigma_noise.pool import Windows
from sigma_noise.project import RANKS, RESAMPLES, checked_model, checked_ranks, fitted
from sigma_noise.resample import interval
from sigma_noise.step import Barrier, make_step

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """Seconds a step regained at each of `ranks`, with a 90 % interval, and as share of the step on so many ranks.

    nan where `refusals` gives a reason; `flags` as of a projection, of the windows as they are.
    """

    model: str
    ranks: tuple[int, ...]
    seconds: Floats
    low: Floats
    high: Floats
    share: Floats
    flags: tuple[tuple[str, ...], ...]
    refusals: tuple[str | None, ...]


def regained(
    windows: Windows,
    removed_s: Windows,
    ranks: Sequence[int] = RANKS,
    *,
    per_step: int = 1,
    hosts: Sequence[object] | None = None,
    model: str = "ecdf",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Budget:
    """sum_b E[max_N W_b] - E[max_N (W_b - X_b)], X the seconds that a cause took of each window.

    The same resamples serve both terms, so that what they share does not blur the difference.

    Args:    windows, removed_s: seconds [ranks, n] or a row for each rank, X in 0..W; the rest as of `project`.
    Raises:  ValueError if the shapes differ, X is below 0, or nothing of a window is left.
    """
    W, X = ([np.asarray(row, np.float64) for row in rows] for rows in (windows, removed_s))
    if [w.shape for w in W] != [x.shape for x in X]:
        raise ValueError("regained: removed_s must have one value for each window of each rank")
    for r, (w, x) in enumerate(zip(W, X, strict=True)):
        if not np.all((x >= 0) & (x < w)):
            raise ValueError(f"regained: removed_s of rank {r} must be at least 0 s and less than its window")
    N, model = checked_ranks(ranks), checked_model(model)
    rng = np.random.default_rng(seed)
    before, after = (
        fitted(make_step([Barrier("step", rows, per_step)], hosts), model, rng)
        for rows in (W, [w - x for w, x in zip(W, X, strict=True)])
    )
    refusals = tuple(before.refusal(n) or after.refusal(n) for n in N)
    carried = [i for i, reason in enumerate(refusals) if reason is None]
    kept = [N[i] for i in carried]
    seconds, low, high, share = np.full((4, len(N)), np.nan)
    if kept:
        whole = before.expected(kept)[0]
        seconds[carried] = whole - after.expected(kept)[0]
        share[carried] = seconds[carried] / whole
        low[carried], high[carried] = interval(
            lambda draws: before.expected(kept, draws[:1]) - after.expected(kept, draws[1:]),
            seconds[carried],
            before.pools + after.pools,
            resamples,
            rng,
        )
    kappa = before.kappa()
    return Budget(model, N, seconds, low, high, share, tuple(before.flags(n, kappa) for n in N), refusals)
