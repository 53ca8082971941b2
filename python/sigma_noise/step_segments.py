"""Steps of a training cut where its ranks meet: what each rank took by itself, and what the data took.

Ranks meet at collectives.  Between two that all of them take part in, segment k, where rank r began to wait at w and
went on at e,

    own[k, r] = w[k, r] - e[k-1, r] + late[k, r],        late[k, r] = max(0, e[k, r] - median_r e[k, r])

less what it waited for some ranks only: a rank that is stopped while it waits goes on later than others do (seen where
ranks share a clock), and so do those that wait for its part of the data.  What follows the last collective of a step is
a segment, too.
"""

import numpy as np
from numpy.typing import NDArray

from sigma_noise import spans
from sigma_noise.steps import Attempt

NEVER = np.iinfo(np.int64).max
USUAL = 0.25  # quantile of what data take in the same call of each step

Floats = NDArray[np.float64]
Stamps = NDArray[np.int64]


class Segments:
    """Of one attempt of n steps: K segments, the step [K] that each lies in, own time [K, R] in seconds.

    Raises: ValueError if ranks did not meet as often in each step.
    """

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt
        met = [_met(attempt, r) for r in attempt.ranks]
        if not all(np.array_equal(step, met[0][0]) for step, _, _ in met):
            raise ValueError("late: ranks must have met as often in each step")
        n, met_in = attempt.n, met[0][0]
        left = np.stack([end for _, _, end in met], 1)  # [collectives, R]
        usually_left = median_rank(left)
        late, beyond = np.zeros(left.shape), np.zeros(len(left))
        arrived = np.full(len(left), NEVER)  # the last of all, where their clock tells
        if len(left) and attempt.share_a_clock(tuple(attempt.ranks)):
            late = np.maximum(0.0, (left - usually_left[:, None]) * 1e-9)
            arrived = np.stack([came for _, came, _ in met], 1).max(1)
            beyond = _beyond_usual(np.maximum(0, usually_left - arrived) * 1e-9, met_in)
        # A step is its collectives and its end.
        step = np.concatenate([met_in, np.arange(n)])
        order = np.argsort(step, kind="stable")
        self.step = step[order]
        self._arrived = np.concatenate([arrived, np.full(n, NEVER)])[order]
        self._beyond = np.concatenate([beyond, np.zeros(n)])[order]
        self._left = np.concatenate([usually_left, np.full(n, NEVER)])[order]
        own, self.spans, self._late = [], [], []
        for i, r in enumerate(attempt.ranks):
            steps, blocked = attempt.steps[r], attempt.blocked[r]
            end = np.concatenate([left[:, i], steps.end_ns[:n]])[order]
            begin = np.concatenate([[0], end[:-1]])
            is_first = np.concatenate([[True], self.step[1:] != self.step[:-1]])
            begin[is_first] = steps.start_ns[:n]
            waited = spans.overlap_s(begin, end, spans.union(blocked.start_ns, blocked.end_ns))
            too_late = np.minimum(np.concatenate([late[:, i], np.zeros(n)])[order], waited)
            own.append((end - begin) * 1e-9 - waited + too_late)
            self._late.append(too_late)
            self.spans.append((begin, end))
        self.own = np.stack(own, 1)

    def by_step(self, seconds: Floats) -> Floats:
        """[K] or [K, R] to [n] or [n, R]."""
        found = np.zeros((self.attempt.n, *seconds.shape[1:]))
        np.add.at(found, self.step, seconds)
        return found

    def overlap(self, at: int, of: tuple[Stamps, Stamps]) -> tuple[Floats, Floats]:
        """Seconds [K] of a union of time in each segment of a rank: in its own part, and while all go on late, as far
        as the data took longer than they usually do in this call.
        """
        begins, ends = self.spans[at]
        came = np.clip(self._arrived, begins, ends)
        before, after = spans.overlap_s(begins, came, of), spans.overlap_s(came, ends, of)
        alone = np.minimum(after, self._late[at])
        return before + alone, np.minimum(after - alone, self._beyond)

    def held(self, at: int, of: tuple[Stamps, Stamps]) -> Floats:
        """Seconds [K, R - 1] for which each other rank went on late while a union of time held the one at `at` in the
        same collective: it waited for that one's data.
        """
        begins, ends = self.spans[at]
        others = [r for r in range(len(self.spans)) if r != at]
        held = []
        for r in others:
            until = np.minimum(ends, self.spans[r][1])
            since = np.clip(self._left, begins, until)
            held.append(np.minimum(self._late[r], spans.overlap_s(since, until, of)))
        return np.stack(held, 1)

    def saved(self, at: int, taken: Floats, held: Floats | float = 0.0) -> Floats:
        """[n]: by how much steps would be shorter without what was taken of a rank's segments [K], and for how long
        that held others [K, R - 1].
        """
        mine, others = self.own[:, at], np.delete(self.own, at, axis=1)
        with_it, without = (
            np.maximum(a, b.max(1)) for a, b in ((mine, others), (mine - taken, others - held))
        )
        return self.by_step(with_it - without)


def median_rank(by_rank: NDArray[np.generic]) -> NDArray[np.generic]:
    """[n, R] to [n]: of an even number the lower of the middle two, so that of two ranks one is the usual one."""
    ordered = np.sort(by_rank, axis=1)
    return ordered[:, (by_rank.shape[1] - 1) // 2]


def over_median(by_rank: Floats, at: int) -> Floats:
    """[n, R] to [n]: of the rank at `at`, what is beyond the median rank's."""
    over: Floats = np.maximum(0.0, by_rank[:, at] - median_rank(by_rank))
    return over


def over_others(by_rank: Floats, at: int, among: NDArray[np.bool_], less: Floats | float = 0.0) -> Floats:
    """[n, R] to [n], in the steps `among`: beyond the median rank, less `less`, and less what of that is chance.

    Ranks take turns at being last, so that all of them are now and then beyond the median.  What the other ranks are,
    in the mean over steps of their median, is chance, and taken off the rank's where its steps have least.
    """
    over = np.where(among, np.maximum(0.0, over_median(by_rank, at) - less), 0.0)
    others = [over_median(by_rank, r)[among].mean() for r in range(by_rank.shape[1]) if r != at]
    return _lowered(over, float(np.median(others)) * among.mean())


def _lowered(seconds: Floats, mean: float) -> Floats:
    """max(0, seconds - level) with the level at which their mean is less by `mean`."""
    kept = max(0.0, float(seconds.mean()) - mean) * len(seconds)
    ordered = np.sort(seconds)[::-1]
    of_largest = (np.cumsum(ordered) - kept) / np.arange(1, len(seconds) + 1)
    level = of_largest.max()
    found: Floats = np.maximum(0.0, seconds - level)
    return found


def _beyond_usual(transfer: Floats, step: NDArray[np.int64]) -> Floats:
    """[collectives]: what the data took beyond the first quartile of the same call in other steps."""
    first = np.searchsorted(step, step)
    call = np.arange(len(step)) - first
    usual = np.array([np.quantile(transfer[call == c], USUAL) for c in range(int(call.max()) + 1)])
    beyond: Floats = np.maximum(0.0, transfer - usual[call])
    return beyond


def _met(attempt: Attempt, rank: int) -> tuple[Stamps, Stamps, Stamps]:
    """Collectives of all ranks, by time: in which step, and when this rank came and went on, ns."""
    steps, comes, ends = ([np.empty(0, np.int64)] for _ in range(3))
    for name, peers in attempt.peers():
        if set(peers) == set(attempt.ranks):
            series = attempt.rows(rank, "quantum", name)
            step = attempt.step_of(rank, series)
            steps.append(step[step >= 0])
            comes.append(series.start_ns[step >= 0])
            ends.append(series.end_ns[step >= 0])
    order = np.argsort(np.concatenate(ends), kind="stable")
    return np.concatenate(steps)[order], np.concatenate(comes)[order], np.concatenate(ends)[order]
