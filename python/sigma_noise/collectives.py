"""A collective split into what each rank did before it, how long it waited, and how long the data took.

At an all-reduce or all-to-all nobody is done before the last has arrived:

    end[r, t-1] --- local ---> arrival[r, t] --- wait ---> last arrival[t] --- transfer ---> end[r, t]

The rank that keeps all others waiting spends the *shortest* time in the collective, having nobody to wait for.  A
ranking by collective time therefore names the victims.  Score ranks on `local_s`, links on `transfer_s`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

NOBODY = -1
MOST_IMPOSSIBLE = 0.5  # of the steps


@dataclass(frozen=True)
class Collectives:
    """P ranks, m steps that all made: seconds f64 [P, m]."""

    local_s: NDArray[np.float64]  # from the end of the step before, by the rank's own clock
    wait_s: NDArray[np.float64]
    transfer_s: NDArray[np.float64]
    last: NDArray[np.int64]  # [m]; NOBODY where the last two are closer than the clocks
    step: NDArray[np.int64]  # [m], the index of each in the stamps given
    impossible: int  # steps left out: an end before the last arrival, so not one collective or not one clock
    unmatched: int  # steps left out: not made by all ranks

    @property
    def collective_s(self) -> NDArray[np.float64]:
        """From arrival to end, what a profiler shows: least for the rank that the others waited for."""
        return self.wait_s + self.transfer_s

    @property
    def times_last(self) -> NDArray[np.int64]:
        """How often each rank arrived last, [P]."""
        return np.bincount(self.last[self.last != NOBODY], minlength=len(self.wait_s))

    @property
    def undecided(self) -> int:
        """Steps in which the clocks cannot say who was last."""
        return int((self.last == NOBODY).sum())

    @property
    def caused_wait_s(self) -> NDArray[np.float64]:
        """Seconds that all ranks together waited for each as the last one, [P]."""
        decided = self.last != NOBODY
        return np.bincount(self.last[decided], self.wait_s.sum(0)[decided], minlength=len(self.wait_s))


def split(
    arrival_ns: Sequence[ArrayLike],
    end_ns: Sequence[ArrayLike],
    *,
    begin_ns: ArrayLike | None = None,
    offset_ns: ArrayLike = 0,
    residual_ns: ArrayLike = 0,
    most: int | None = None,
) -> Collectives:
    """Align the collectives of P ranks by their index and split each.

    Args:    arrival_ns, end_ns: int64 [P, n], or P series, of which some may lack the last steps.
             begin_ns: [P], where the first local part began; without it the first step has none and is left out.
             offset_ns: [P], what each clock shows beyond the common one, so that common = own - offset (that of
             `sigma_noise.offset` is the opposite), or [P, n] where it drifts.
             residual_ns: [P], how far the clock may be off after that.  Two arrivals closer than both residuals have
             no order.
             most: keep the last so many steps only.
    Raises:  ValueError where shapes do not agree, ranks are fewer than 2, no step is left, stamps of a rank do not
             rise, or half of the steps are impossible.
    """
    arrivals, ends = _stamps("arrival_ns", arrival_ns), _stamps("end_ns", end_ns)
    ranks = len(arrivals)
    if ranks < 2 or [len(a) for a in arrivals] != [len(e) for e in ends]:
        raise ValueError(
            f"split: arrival_ns and end_ns must be of the same 2 or more ranks and steps, found "
            f"{[len(a) for a in arrivals][:8]} and {[len(e) for e in ends][:8]} steps"
        )
    shared, longest = min(map(len, arrivals)), max(map(len, arrivals))
    arrival, end = (np.stack([x[:shared] for x in stamps]) for stamps in (arrivals, ends))
    first = 1 if begin_ns is None else 0
    if shared <= first:
        raise ValueError(f"split: {first + 1} steps that all ranks made are needed, found {shared}")
    begin = arrival[:, :1] if begin_ns is None else _column("begin_ns", begin_ns, ranks)
    before = np.concatenate([begin, end[:, :-1]], axis=1)
    _check_order(before, arrival, end)
    local = (arrival - before) * 1e-9
    offset = _offset(offset_ns, ranks, shared)
    residual = _column("residual_ns", residual_ns, ranks)[:, 0]
    kept = np.arange(first if most is None else max(first, shared - most), shared)
    arrival, end, local = ((x if x is local else x - offset)[:, kept] for x in (arrival, end, local))
    return _split(local, arrival, end, residual, kept, longest - shared)


def _split(
    local: NDArray[np.float64],
    arrival: NDArray[np.int64],
    end: NDArray[np.int64],
    residual: NDArray[np.int64],
    step: NDArray[np.int64],
    unmatched: int,
) -> Collectives:
    """Of stamps on one clock; impossible steps are left out."""
    who = arrival.argmax(axis=0)
    last = arrival.max(axis=0)
    is_possible = np.all(end - last >= -(residual[:, None] + residual[who]), axis=0)
    impossible = int((~is_possible).sum())
    if impossible > MOST_IMPOSSIBLE * len(step):
        raise ValueError(
            f"split: no rank may end a collective before the last has arrived, found one that does in {impossible} of "
            f"{len(step)} steps; stamps of different collectives, or clocks that are further off than residual_ns"
        )
    arrival, end, local, who, last = (x[..., is_possible] for x in (arrival, end, local, who, last))
    margin = last - arrival - residual[:, None] - residual[who]
    margin[who, np.arange(len(who))] = np.iinfo(np.int64).max  # itself is no rival
    is_decided = np.all(margin > 0, axis=0)
    return Collectives(
        local_s=local,
        wait_s=(last - arrival) * 1e-9,
        transfer_s=np.maximum(end - last, 0) * 1e-9,
        last=np.where(is_decided, who, NOBODY),
        step=step[is_possible],
        impossible=impossible,
        unmatched=unmatched,
    )


def _stamps(name: str, stamps: Sequence[ArrayLike]) -> list[NDArray[np.int64]]:
    series = [np.asarray(x) for x in stamps]
    for x in series:
        if x.ndim != 1 or (len(x) and x.dtype.kind not in "iu"):
            raise ValueError(
                f"split: {name} must be a series of integer ns for each rank, found {x.dtype} {x.shape}"
            )
    return [x.astype(np.int64) for x in series]


def _column(name: str, value: ArrayLike, ranks: int) -> NDArray[np.int64]:
    """[P, 1]."""
    x = np.asarray(value)
    if x.shape not in ((), (ranks,)):
        raise ValueError(f"split: {name} must be a number for each of {ranks} ranks, found shape {x.shape}")
    whole = np.rint(x) if x.dtype.kind == "f" else x
    return np.broadcast_to(whole.astype(np.int64), (ranks,))[:, None]


def _offset(value: ArrayLike, ranks: int, steps: int) -> NDArray[np.int64]:
    """[P, 1], or [P, steps]."""
    x = np.asarray(value)
    if x.ndim == 2 and x.shape[0] == ranks and x.shape[1] >= steps:
        return np.rint(x[:, :steps]).astype(np.int64)
    return _column("offset_ns", x, ranks)


def _check_order(before: NDArray[np.int64], arrival: NDArray[np.int64], end: NDArray[np.int64]) -> None:
    """A rank's own clock does not run back, whatever the others show."""
    wrong = np.argwhere((before > arrival) | (arrival > end))
    if len(wrong):
        rank, t = wrong[0]
        raise ValueError(
            f"split: stamps of a rank must rise, found end {before[rank, t]}, arrival {arrival[rank, t]}, end "
            f"{end[rank, t]} at step {t} of rank {rank}"
        )
