"""Windows by host: what a rank, a part of a host, and many hosts wait for.

Ranks of one host share its noise, so hosts are drawn, not ranks: the ranks of a host stay together at each instant, and
N ranks on hosts of G are N/G draws of a host's longest.  Below G they are N ranks of one host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from sigma_noise.expected_max import gap_sum
from sigma_noise.intervals import autocorrelation_time
from sigma_noise.tail import Tail, spliced_max

Floats = NDArray[np.float64]
FINENESS = 256

Windows = ArrayLike | Sequence[ArrayLike]  # seconds [ranks, windows], or a row for each rank


@dataclass(frozen=True, eq=False)
class Draws:
    """B resamples of the units that a pool's windows were cut into: stretches of time, or hosts.

    times [B, units]: how often each unit was drawn; unit_of [n]: the unit of each window, host after host.
    """

    times: Floats
    unit_of: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.times)

    def totals(self, values: Floats) -> Floats:
        """Sum of values [n] over what was drawn, [B]."""
        return self.times @ np.bincount(self.unit_of, values, minlength=self.times.shape[1])


@dataclass(frozen=True)
class Pool:
    """Windows in seconds of each host, [G, n_h]: row = rank, column = instant, the same G on every host.

    `most_per_host`: how many fit into the time that was measured, where they overlap.
    """

    hosts: tuple[Floats, ...]
    most_per_host: float = np.inf

    @property
    def host_size(self) -> int:
        return len(self.hosts[0])

    @property
    def ranks(self) -> int:
        return len(self.hosts) * self.host_size

    @cached_property
    def longest(self) -> tuple[Floats, ...]:
        """The longest of each host's ranks at each instant, [n_h] each."""
        return tuple(host.max(axis=0) for host in self.hosts)

    @cached_property
    def tau(self) -> float:
        """Correlation time of a host's longest, in windows: the mean over hosts."""
        return float(np.mean([autocorrelation_time(x) for x in self.longest]))

    @cached_property
    def instants(self) -> int:
        """Windows of all hosts together."""
        return sum(x.size for x in self.longest)

    @property
    def windows(self) -> int:
        """Windows of all hosts together, side by side in time."""
        return int(min(self.instants, len(self.hosts) * self.most_per_host))

    @property
    def effective(self) -> float:
        """Independent windows of a host that these are worth."""
        return min(self.instants / self.tau, len(self.hosts) * self.most_per_host)

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(np.concatenate(self.longest), kind="stable")

    @cached_property
    def _ordered(self) -> Floats:
        return np.concatenate(self.longest)[self._order]

    @cached_property
    def _parts(self) -> dict[int, Floats]:
        return {}

    def part(self, ranks: int) -> Floats:
        """The expected longest of that many of a host's ranks, for each host and instant in turn.

        Over all subsets, P(max <= x_i) = C(i, N) / C(G, N) of the host's ordered windows x_1 .. x_G.
        """
        if ranks not in self._parts:
            i = np.arange(1, self.host_size)
            log_inside = _log_choose(i, ranks) - _log_choose(np.float64(self.host_size), ranks)
            beyond = -np.expm1(log_inside)  # 1 - C(i, N) / C(G, N); C(i, N) = 0 for i < N
            rows = [np.sort(host, axis=0) for host in self.hosts]
            self._parts[ranks] = np.concatenate([x[0] + beyond @ np.diff(x, axis=0) for x in rows])
        return self._parts[ranks]

    @cached_property
    def whole(self) -> Draws:
        """Everything once."""
        return Draws(np.ones((1, 1)), np.zeros(self.instants, np.int64))

    def mean(self, draws: Draws | None = None) -> Floats:
        """E[W] of a rank in seconds, [B]."""
        return _mean(self.part(1), draws or self.whole)

    def expected(self, ranks: Sequence[int], draws: Draws | None = None, tail: Tail | None = None) -> Floats:
        """E[max_N] in seconds for each number of ranks, on independent hosts, [B, ranks].

        The tail is of a host's longest; up to G ranks are told by the sample itself, without it.
        """
        draws = draws or self.whole
        N = np.asarray(ranks, np.float64)
        out = np.empty((len(draws), N.size))
        for at in np.flatnonzero(self.host_size >= N):
            out[:, at] = _mean(self.part(int(N[at])), draws)
        is_many = self.host_size < N
        if is_many.any():
            out[:, is_many] = self._many(N[is_many] / self.host_size, draws, tail)
        return out

    def _many(self, hosts: Floats, draws: Draws, tail: Tail | None) -> Floats:
        is_whole = draws is self.whole
        x, counts = (self._ordered, np.ones((1, self.instants))) if is_whole else self._resampled(draws)
        below = np.cumsum(counts, axis=-1)
        if tail is None:
            return gap_sum(x, below, hosts)
        fitted = tail.parameters if is_whole else tail.refitted(x, counts)
        return spliced_max(x, below, hosts, tail, fitted)

    def _resampled(self, draws: Draws) -> tuple[Floats, Floats]:
        """Ascending means of cells, and how many windows of each were drawn, [B, cells]: one product of matrices."""
        cell_of, x = self._cells
        units = draws.times.shape[1]
        in_unit = np.bincount(draws.unit_of * x.size + cell_of, minlength=units * x.size)
        return x, draws.times @ in_unit.reshape(units, x.size).astype(np.float64)

    @cached_property
    def _cells(self) -> tuple[NDArray[np.int64], Floats]:
        """The cell of each window, and each cell's mean, ascending: what hundreds of resamples can afford.

        A cell holds 1/FINENESS of what lies above it, so F^N bends by some 1/FINENESS^2 across it, whatever N is; the
        FINENESS largest have a cell each.
        """
        n, above = self.instants, [0]  # samples above each cell's end
        while above[-1] < n:
            above.append(above[-1] + max(1, above[-1] // FINENESS))
        first = np.unique(np.maximum(n - np.array(above[1:]), 0))
        size = np.diff(np.append(first, n))
        shifted = self._ordered - self._ordered[0]
        cell_of = np.empty(n, np.int64)
        cell_of[self._order] = np.repeat(np.arange(size.size), size)
        return cell_of, self._ordered[0] + np.add.reduceat(shifted, first) / size


@dataclass(frozen=True)
class CoscheduledPool(Pool):
    """The same windows where all hosts begin at one common instant: columns of different hosts belong together.

    More hosts than were measured find no new instant, so E[max_N] ends at the longest of all measured hosts.  It is at
    most that of independent hosts: a mean of F^N over instants is at least the Nth power of the mean (Jensen).
    """

    def _many(self, hosts: Floats, draws: Draws, tail: Tail | None) -> Floats:
        if tail is not None:
            raise ValueError("CoscheduledPool: no tail goes beyond the hosts that were measured together")
        H, n = len(self.hosts), self.longest[0].size
        of_instant = draws.unit_of[:n]
        if np.all(draws.unit_of.reshape(H, n) == of_instant):  # stretches of time, with all hosts
            drawn = Draws(draws.times, of_instant)
            return np.stack([_mean(self._together(np.ones(H), N), drawn) for N in hosts], axis=1)
        always = Draws(np.ones((1, 1)), np.zeros(n, np.int64))
        return np.array(
            [[_mean(self._together(times, N), always)[0] for N in hosts] for times in draws.times]
        )

    def _together(self, times: Floats, hosts: float) -> Floats:
        """E[max] at each instant [n] over so many draws of hosts, each as likely as it was drawn often, [H]."""
        x, by_length = self._by_length
        below = np.cumsum(times[by_length], axis=0)[:-1] / times.sum()
        return x[0] + ((1 - below**hosts) * np.diff(x, axis=0)).sum(axis=0)

    @cached_property
    def _by_length(self) -> tuple[Floats, NDArray[np.int64]]:
        x = np.stack(self.longest)
        order = np.argsort(x, axis=0, kind="stable")
        return np.take_along_axis(x, order, axis=0), order


def make_pool(windows: Windows, hosts: Sequence[object] | None = None) -> Pool:
    """Windows [ranks, n], or a row a rank, by the host of each rank; without hosts each rank has its own.

    Rows of one host are aligned from their first window and end with the shortest.
    Raises: ValueError if a window is not finite and positive, or hosts differ in their number of ranks.
    """
    rows = [np.asarray(row, np.float64) for row in windows]
    names = list(range(len(rows))) if hosts is None else list(hosts)
    if len(names) != len(rows) or not rows:
        raise ValueError(
            f"make_pool: hosts must name one host for each rank, found {len(names)} for {len(rows)}"
        )
    for r, row in enumerate(rows):
        if row.ndim != 1 or not row.size or not np.all(np.isfinite(row) & (row > 0)):
            raise ValueError(f"make_pool: windows of rank {r} must be finite and positive seconds in one row")
    groups = [[row for row, name in zip(rows, names, strict=True) if name == h] for h in dict.fromkeys(names)]
    sizes = sorted({len(group) for group in groups})
    if len(sizes) > 1:
        raise ValueError(
            f"make_pool: every host must have the same number of ranks, found {sizes[0]} to {sizes[-1]}"
        )
    return Pool(tuple(np.stack([row[: min(map(len, g))] for row in g]) for g in groups))


def _mean(x: Floats, draws: Draws) -> Floats:
    """Mean of values x [n] over what was drawn, [B]; of equal values it is that value to the last bit."""
    return x[0] + draws.totals(x - x[0]) / draws.totals(np.ones(x.size))


def _log_choose(n: Floats, k: int) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.where(n < k, -np.inf, gammaln(n + 1) - gammaln(np.maximum(n - k, 0) + 1) - gammaln(k + 1))
