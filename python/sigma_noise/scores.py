"""Scores of ranks: who is slow, who has long detours, whom the others waited for, and what if they had not.

A score of medians alone cannot see a rank with rare long detours: with 1 % of its steps ten times as long, its median
is everybody's.  So there are four numbers a rank, each with an interval, and two flags.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sigma_noise.blocks import MEMORIES, Blocks, draw, quantiles
from sigma_noise.flags import TAIL, Flags, flag
from sigma_noise.intervals import autocorrelation_time
from sigma_noise.losses import Losses

LEAST_STEPS = 16
SPREAD = 0.005  # healthy ranks are expected to differ by half a per cent
PER_QUANTILE = 20  # a quantile above 1 - 20 / n_eff has a bound, no interval
REFERENCES = {"median": np.median, "min": np.min}


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class RankScore:
    """L and Q are 1 for the usual rank and less for a slow one; B is a share of the run time, dS a part of S."""

    rank: int
    location: float
    location_interval: Interval
    tail: float
    tail_interval: Interval  # from 0 where steps are too few to say how long the tail may be
    blame: float
    blame_interval: Interval
    what_if: float
    what_if_interval: Interval
    what_if_together: Interval  # those of all ranks hold at once, so that of the worst of them does
    z: float
    tail_z: float
    tail_p: float
    slow_quarters: int
    tail_quarters: int
    is_slow: bool
    has_tail: bool
    kind: str  # usual, slow throughout, slow for a time, rare long detours, slow throughout with rare long detours


@dataclass(frozen=True)
class Scores:
    ranks: tuple[RankScore, ...]  # by what-if, the most costly first
    slowdown: float  # S = E[max over ranks] / E[median rank], of the steps that all ranks made
    pattern: str  # even, recurs, rotates, few steps dominate
    steps: int  # that all ranks made
    unmatched: int  # further ones of the rank that made most
    n_eff: float  # the least of the ranks
    block: int  # steps that are drawn together for the intervals
    cut: float  # z above which a rank is flagged
    alpha: float

    @property
    def flagged(self) -> list[int]:
        return [r.rank for r in self.ranks if r.is_slow or r.has_tail]


def score(
    durations: Sequence[ArrayLike] | NDArray[np.float64],
    *,
    alpha: float = 0.01,
    reference: str = "median",
    spread: float = SPREAD,
    confidence: float = 0.95,
    replicates: int = 200,
    seed: int = 0,
) -> Scores:
    """Location, tail, blame and what-if of each rank, with intervals, and its flags.

        L_r = M / med_r          Q_r = M99.9 / q99.9_r          (M over ranks)
        B_r = sum_t [r last] (max - second max) / sum_t max
        dS_r = S - S(with r's steps replaced by those of the median rank)

    B and dS are of `Losses`, the flags of `flag`: each is raised falsely, on any of P equal ranks, with probability
    `alpha` at most.  Intervals are quantiles over blocks of steps drawn with replacement, the same for all ranks; of dS
    there are those of `together` as well, as ranks are listed by it.

    Args:    durations [P, n], or P series of unequal lengths, in seconds of *local* time, before a collective evens it;
             only steps that all ranks made are taken, so that all are judged by the same time.
             reference: M is the "median" over ranks, or for L the "min", as NVRx has it; flags take the median.
             spread: relative deviation of healthy ranks that is expected beforehand; it matters below 16 ranks.
    Raises:  ValueError if there are fewer than 2 ranks or 16 steps, a duration is not above 0 and finite, or an
             argument is out of its range.
    """
    _check_options(alpha, reference, spread, confidence, replicates)
    matched, unmatched = _matched(durations)
    tau = np.array([autocorrelation_time(x) for x in matched])
    steps = matched.shape[1]
    blocks = draw(steps, float(tau.max()), replicates, np.random.default_rng(seed))
    flags = flag(matched, alpha, spread, ceil(MEMORIES * float(np.median(tau))))
    losses = Losses(matched)
    columns = _scores(flags, losses, blocks, reference, (1.0 - confidence) / 2.0)
    columns["tail_interval"][steps / tau * (1.0 - TAIL) < PER_QUANTILE, 0] = 0.0
    for name in ("z", "tail_z", "tail_p", "slow_quarters", "tail_quarters", "is_slow", "has_tail"):
        columns[name] = getattr(flags, name)
    plain = {name: column.tolist() for name, column in columns.items()}
    rows = [
        RankScore(rank=r, kind=_kind(flags, r), **{name: _cell(column[r]) for name, column in plain.items()})
        for r in np.argsort(-columns["what_if"], kind="stable").tolist()
    ]
    return Scores(
        tuple(rows), losses.slowdown(), losses.pattern(), steps, unmatched, float((steps / tau).min()),
        blocks.length, flags.cut, alpha,
    )  # fmt: skip


def _scores(
    flags: Flags,
    losses: Losses,
    blocks: Blocks,
    reference: str,
    side: float,
) -> dict[str, NDArray[Any]]:
    """The four scores [P] and their intervals [P, 2]; `side` is the probability left out on either side."""
    of_run = REFERENCES[reference]
    level, tail = (
        np.stack([quantiles(x, p, blocks) for x in losses.durations], axis=1) for p in (0.5, TAIL)
    )  # [B, P]
    everyone, last_one = losses.saved()
    gaps, saved = _by_block(losses.gap, losses, blocks), _by_block(last_one, losses, blocks)
    whole = blocks.weight @ blocks.sums(losses.longest)
    usual = blocks.weight @ blocks.sums(losses.durations[losses.median_rank])
    draws = {
        "location": of_run(level, axis=1, keepdims=True) / level,
        "tail": np.median(tail, axis=1, keepdims=True) / tail,
        "blame": blocks.weight @ gaps.T / whole[:, None],
        "what_if": (blocks.weight @ saved.T + (blocks.weight @ blocks.sums(everyone))[:, None])
        / usual[:, None],
    }
    what_if = losses.what_if()
    return {
        "location": of_run(flags.level) / flags.level,
        "tail": np.median(flags.tail) / flags.tail,
        "blame": losses.blame(),
        "what_if": what_if,
        "what_if_together": together(what_if, draws["what_if"], side, blocks.count),
    } | {f"{name}_interval": np.quantile(draw, [side, 1.0 - side], axis=0).T for name, draw in draws.items()}


def together(
    estimate: NDArray[np.float64], draws: NDArray[np.float64], side: float, blocks: int
) -> NDArray[np.float64]:
    """Intervals [P, 2] that all hold at once but for `side` on either side: estimate [P] -+ c s, s of draws [B, P].

        c = max( the 1 - 2 side quantile of max_r |draw_r - estimate_r| / s_r,  t_{blocks - 1}(1 - side / P) )

    The first has what the ranks share and how skewed they are (Romano & Wolf 2005); of few blocks it knows too little
    (3.5 of 512 ranks and 16 blocks), and Bonferroni's t is the larger.
    """
    s = draws.std(axis=0)
    t = np.abs(draws - estimate) / np.where(s > 0.0, s, np.inf)
    c = max(np.quantile(t.max(axis=1), 1.0 - 2.0 * side), stats.t.isf(side / len(estimate), blocks - 1))
    return np.stack([estimate - c * s, estimate + c * s], axis=1)


def _by_block(x: NDArray[np.float64], losses: Losses, blocks: Blocks) -> NDArray[np.float64]:
    """x [n] of each step given to its last rank, summed by block: [P, blocks]."""
    size = len(losses.durations) * blocks.count
    return np.bincount(losses.last * blocks.count + blocks.of_step, x, minlength=size).reshape(
        -1, blocks.count
    )


def _kind(flags: Flags, r: int) -> str:
    match bool(flags.is_slow[r]), bool(flags.has_tail[r]):
        case True, True:
            return "slow throughout with rare long detours"
        case True, False:
            return "slow throughout"
        case False, True:
            return "rare long detours"
        case _:
            return "slow for a time" if flags.is_off[r] else "usual"


def _cell(value: Any) -> Any:
    return Interval(*value) if isinstance(value, list) else value


def _matched(durations: Sequence[ArrayLike] | NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """[P, n] of the steps that all ranks made, and how many more some made."""
    series = [np.asarray(x, np.float64) for x in durations]
    if len(series) < 2 or any(x.ndim != 1 for x in series):
        raise ValueError(
            f"score: durations must be a series for each of 2 or more ranks, found {len(series)} of shapes "
            f"{sorted({x.shape for x in series})[:3]}"
        )
    lengths = [len(x) for x in series]
    least = min(lengths)
    if least < LEAST_STEPS:
        raise ValueError(
            f"score: every rank must have {LEAST_STEPS} steps or more, found {least} of rank {lengths.index(least)}"
        )
    matched = np.stack([x[:least] for x in series])
    wrong = np.argwhere(~((matched > 0.0) & np.isfinite(matched)))
    if len(wrong):
        rank, step = wrong[0]
        raise ValueError(
            f"score: durations must be above 0 and finite, found {matched[rank, step]} at step {step} of rank {rank}"
        )
    return matched, max(lengths) - least


def _check_options(alpha: float, reference: str, spread: float, confidence: float, replicates: int) -> None:
    if reference not in REFERENCES:
        raise ValueError(f"score: reference must be one of {', '.join(REFERENCES)}, found {reference!r}")
    for name, value in (("alpha", alpha), ("confidence", confidence)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"score: {name} must lie between 0 and 1, found {value}")
    if spread < 0.0 or replicates < 1:
        raise ValueError(
            f"score: spread must be 0 or more and replicates 1 or more, found {spread} and {replicates}"
        )
