"""What each rank costs at a barrier: of steps that all ranks made, who was last, by how much, and what if not."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

DOMINATING_STEPS = 0.01  # "a few": this share of the steps ...
DOMINATING_SHARE = 0.5  # ... or one rank, with this share of the loss, dominates
LEAST_LOSS = 0.01  # of the run time, below which there is nothing to explain


@dataclass(frozen=True)
class Losses:
    """Durations [P, n] of steps that end when the last rank has arrived."""

    durations: NDArray[np.float64]

    @cached_property
    def _top(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        ranks = len(self.durations)
        middle = (ranks - 1) // 2
        ordered = np.partition(self.durations.T, sorted({middle, ranks - 2, ranks - 1}), axis=1)
        return ordered[:, middle].copy(), ordered[:, -2].copy(), ordered[:, -1].copy()

    @property
    def usual(self) -> NDArray[np.float64]:
        """The middle rank of each step, [n]; of an even number the faster one, which a detour of one of two spares."""
        return self._top[0]

    @property
    def longest(self) -> NDArray[np.float64]:
        return self._top[2]

    @property
    def gap(self) -> NDArray[np.float64]:
        """max - second max, [n]: what a step would have gained without its last rank."""
        return self._top[2] - self._top[1]

    @cached_property
    def last(self) -> NDArray[np.int64]:
        """Who was last in each step, [n]; of several the lowest."""
        return self.durations.argmax(axis=0)

    @cached_property
    def median_rank(self) -> int:
        """The rank whose mean is the median of means; of two the faster."""
        return int(np.argsort(self.durations.mean(axis=1), kind="stable")[(len(self.durations) - 1) // 2])

    def blame(self) -> NDArray[np.float64]:
        """B_r = sum_t [r last] (max - second max) / sum_t max, [P]: share of the run time."""
        loss = np.bincount(self.last, self.gap, minlength=len(self.durations))
        return loss / self.longest.sum()

    def what_if(self) -> NDArray[np.float64]:
        """dS_r = S - S(with r replaced by a second median rank, see `saved`), [P]."""
        everyone, last_one = self.saved()
        total = np.bincount(self.last, last_one, minlength=len(self.durations)) + everyone.sum()
        return total / self.durations[self.median_rank].sum()

    def slowdown(self) -> float:
        """S = E[max over ranks] / E[median rank]."""
        return float(self.longest.mean() / self.durations[self.median_rank].mean())

    def saved(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Seconds by which a step is expected to shorten if a rank is replaced by a second median rank.

        The replacement takes c_t e_s in step t: c_t is the usual duration of the step, which keeps what befalls all
        ranks together, and e_s = x_s / c_s the median rank's in a step s of its own.  The mean over all s is exact:

            saved_rt = max_t - E_s max(o_rt, c_t e_s),   o_rt = max over the others

        A replacement that is no better than the rank saves nothing on average, where the blame is always positive.

        Returns: for every rank, whoever was last [n] (zero or less); on top of that for the last one [n].
        """
        usual = self.usual
        drawn = np.sort(self.durations[self.median_rank] / usual)
        beyond = np.append(np.cumsum(drawn[::-1])[::-1], 0.0)

        def expected_excess(bar: NDArray[np.float64]) -> NDArray[np.float64]:
            """E max(0, e - bar)."""
            at = np.searchsorted(drawn, bar, side="right")
            return (beyond[at] - bar * (len(drawn) - at)) / len(drawn)

        first = self.longest / usual
        second = first - self.gap / usual
        all_ranks = -usual * expected_excess(first)
        last_rank = usual * (first - second + expected_excess(first) - expected_excess(second))
        return all_ranks, last_rank

    def pattern(self) -> str:
        """How the loss max - usual spreads: even (under 1 % of the run time), recurs (one rank has half of the blame
        and the most of it in three quarters of the run), few steps dominate (1 % of them have half), or rotates."""
        loss = self.longest - self.usual
        if loss.sum() < LEAST_LOSS * self.longest.sum():
            return "even"
        blame = self.blame()
        worst = int(blame.argmax())
        quarters = [
            np.bincount(last, gap, minlength=len(blame)).argmax()
            for last, gap in zip(np.array_split(self.last, 4), np.array_split(self.gap, 4), strict=True)
        ]
        if blame[worst] >= DOMINATING_SHARE * blame.sum() and quarters.count(worst) >= 3:
            return "recurs"
        few = max(1, int(DOMINATING_STEPS * len(loss)))
        if np.partition(loss, len(loss) - few)[-few:].sum() >= DOMINATING_SHARE * loss.sum():
            return "few steps dominate"
        return "rotates"
