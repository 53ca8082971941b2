"""From what a few ranks were measured to do to how long N ranks wait for their last: S(N), with its doubt beside it.

S(N) = sum_b E[max_N W_b] / sum_b E[W_b] over the barriers b of a step, W_b the time between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sigma_noise.pool import CoscheduledPool, Pool, Windows
from sigma_noise.replay import Hosts, covered_s, replayed_windows, spread_offsets
from sigma_noise.resample import interval
from sigma_noise.step import Barrier, Step, make_step
from sigma_noise.tail import Tail

Floats = NDArray[np.float64]

RANKS = (8, 64, 512, 2048, 16384)
RESAMPLES = 400


@dataclass(frozen=True)
class Projection:
    """What a step costs on N ranks.  Arrays are by `ranks`, nan where `refusals` gives a reason.

    slowdown, low, high: S(N), a step of N ranks over that of one, and its 90 % interval
    over_floor: S0(N), over a step without noise
    step_s: sum of E[max_N] over a step's barriers; mean_s, floor_s: of one rank, and without noise
    flags: keys of `step.FLAGS`
    backtest_error: predicted / measured - 1 of the longest of all measured ranks, from half of them; the worse half,
        None where there is but one rank
    kappa: 1 where hosts are independent, 0 where they are late together
    windows: measured of all hosts together; effective: independent ones that they are worth
    """

    model: str
    ranks: tuple[int, ...]
    slowdown: Floats
    low: Floats
    high: Floats
    over_floor: Floats
    step_s: Floats
    mean_s: float
    floor_s: float
    flags: tuple[tuple[str, ...], ...]
    refusals: tuple[str | None, ...]
    backtest_error: float | None
    kappa: float | None
    measured_ranks: int
    measured_hosts: int
    windows: int
    effective: float
    tails: tuple[Tail, ...]


@dataclass(frozen=True)
class Work:
    """Useful work between barriers of one kind, that a step passes `per_step` times."""

    name: str
    work_s: float
    per_step: int = 1


def project(
    windows: Windows | Sequence[Barrier],
    ranks: Sequence[int] = RANKS,
    *,
    hosts: Sequence[object] | None = None,
    model: str = "ecdf",
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Projection:
    """S(N) from the time that each rank takes from barrier to barrier.

    Args:    windows: seconds [ranks, n], a row for each rank, or the barriers of a step; hosts: of each rank, else each
             is a host of its own, which is pessimistic; model: "ecdf", what was seen, or "gpd", with a generalised
             Pareto tail beyond it; seed, resamples: of the interval.
    Raises:  ValueError for input that is wrong; data that do not carry a figure are told in `refusals`.
    Cost:    a sort of the windows, and two products of matrices for the interval, whatever their number.
    """
    step = make_step(_barriers(windows), hosts)
    return project_step(step, ranks, checked_model(model), seed, resamples)


def project_replay(
    hosts: Hosts,
    work: float | Sequence[Work],
    ranks: Sequence[int] = RANKS,
    *,
    is_cosched: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Projection:
    """S(N) from traces of detours of the ranks of each host: windows of useful work begun at the same offsets.

    `work` is the useful seconds between barriers.  Independent hosts begin anywhere, co-scheduled ones all at once.
    N draws of `replay.replay` have this mean; here it is computed, not drawn.
    """
    works = [Work("step", float(work))] if isinstance(work, (int, float)) else list(work)
    rng = np.random.default_rng(seed)
    kind = CoscheduledPool if is_cosched else Pool
    pools = tuple(
        kind(
            tuple(replayed_windows(hosts, w.work_s, spread_offsets(hosts, w.work_s, rng))),
            most_per_host=covered_s(hosts) / w.work_s,
        )
        for w in works
    )
    step = Step(pools, tuple(w.per_step for w in works), tuple(w.work_s for w in works))
    return project_step(step, ranks, "replay", seed, resamples)


def project_step(step: Step, ranks: Sequence[int], model: str, seed: int, resamples: int) -> Projection:
    """The projection of a step that `make_step` made."""
    N = checked_ranks(ranks)
    rng = np.random.default_rng(seed)
    step = fitted(step, model, rng)
    refusals = tuple(step.refusal(n) for n in N)
    kappa = step.kappa()
    carried = [i for i, reason in enumerate(refusals) if reason is None]
    kept = [N[i] for i in carried]
    step_s, slowdown, low, high = np.full((4, len(N)), np.nan)
    mean_s = float(step.mean()[0])
    if kept:
        step_s[carried] = step.expected(kept)[0]
        slowdown = step_s / mean_s
        low[carried], high[carried] = interval(
            lambda draws: step.expected(kept, draws) / step.mean(draws)[:, None],
            slowdown[carried],
            step.pools,
            resamples,
            rng,
        )
    return Projection(
        model=model,
        ranks=N,
        slowdown=slowdown,
        low=low,
        high=high,
        over_floor=step_s / step.floor_s,
        step_s=step_s,
        mean_s=mean_s,
        floor_s=step.floor_s,
        flags=tuple(step.flags(n, None if is_cosched(step) else kappa) for n in N),
        refusals=refusals,
        backtest_error=backtest(step, model, rng),
        kappa=kappa,
        measured_ranks=step.ranks,
        measured_hosts=len(step.pools[0].hosts),
        windows=min(pool.windows for pool in step.pools),
        effective=step.effective,
        tails=tuple(tail for tail in step.tails if tail is not None),
    )


def backtest(step: Step, model: str, rng: np.random.Generator) -> float | None:
    """predicted / measured - 1 of the longest of all ranks, from half the hosts: the worse of both halves."""
    errors = []
    for half in step.halves():
        half = fitted(half, model, rng)
        if half.refusal(step.ranks) is None:
            errors.append(float(half.expected([step.ranks])[0, 0] / step.measured_s() - 1))
    return max(errors, key=abs, default=None)


def checked_model(model: str) -> str:
    if model not in ("ecdf", "gpd"):
        raise ValueError(f"project: model must be 'ecdf' or 'gpd', found '{model}'")
    return model


def fitted(step: Step, model: str, rng: np.random.Generator) -> Step:
    return step.with_tails(rng) if model == "gpd" else step


def is_cosched(step: Step) -> bool:
    return isinstance(step.pools[0], CoscheduledPool)


def checked_ranks(ranks: Sequence[int]) -> tuple[int, ...]:
    N = tuple(int(n) for n in ranks)
    if not N or min(N) < 1 or any(n != given for n, given in zip(N, ranks, strict=True)):
        raise ValueError(f"project: ranks must be whole numbers of at least 1, found {list(ranks)}")
    return N


def _barriers(windows: Windows | Sequence[Barrier]) -> Sequence[Barrier]:
    given = list(windows)
    return given if given and isinstance(given[0], Barrier) else [Barrier("step", given)]
