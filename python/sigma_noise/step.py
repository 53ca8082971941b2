"""A step as the barriers it waits at, and whether the windows between them carry a projection."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from sigma_noise.correlation import correlation_factor
from sigma_noise.pool import CoscheduledPool, Draws, Pool, Windows, make_pool
from sigma_noise.tail import NoTail, Tail, fit_tail

Floats = NDArray[np.float64]

FLOOR = 0.05  # quantile of windows that counts as free of noise
FEWEST = 100  # independent windows, below which nothing is projected
ENOUGH = 500  # independent windows, below which intervals come out short
PER_RANK = 10  # independent windows that a rank of the projection should have
FARTHEST = 64  # times the ranks measured
FEW_HOSTS = 4
CORRELATED = 0.8  # kappa below which hosts are late together

FLAGS = {
    "extrapolated": f"fewer than {PER_RANK} independent windows for each rank, or more than {FARTHEST} times the ranks "
    "measured: measure longer, or more hosts",
    "few hosts": f"fewer than {FEW_HOSTS} hosts say little of how hosts differ: measure more of them",
    "short interval": f"fewer than {ENOUGH} independent windows: the interval may be short; measure longer",
    "mean unstable": "the tail is so heavy (xi of 1/2 or more) that twice the longest window seen caps it: a bound, "
    "not an estimate",
    "correlated": f"hosts are late together (kappa below {CORRELATED}): independent hosts are pessimistic",
}


@dataclass(frozen=True)
class Barrier:
    """Windows before one kind of barrier, that a step passes `per_step` times.

    A window is what a rank itself takes from leaving one barrier to arriving at the next: the wait for others is no
    part of it, or all ranks look alike.  `windows`: seconds [ranks, n], or a row for each rank.  `floor_s`: a window
    without noise; the 5th percentile of all where it is not given.
    """

    name: str
    windows: Windows
    per_step: int = 1
    floor_s: float | None = None


def moe_barriers(layers: int) -> int:
    """Of a step with expert parallelism: dispatch and combine in each layer, and one sum of gradients."""
    return 2 * layers + 1


@dataclass(frozen=True)
class Step:
    """Pools of a step's barriers, how often each is passed, and floors; tails where the model has them."""

    pools: tuple[Pool, ...]
    per_step: tuple[int, ...]
    floors_s: tuple[float, ...]
    tails: tuple[Tail | None, ...] = field(default=())
    no_tail: str | None = None

    @property
    def host_size(self) -> int:
        return self.pools[0].host_size

    @property
    def ranks(self) -> int:
        return self.pools[0].ranks

    @property
    def effective(self) -> float:
        """Independent windows of a host: of the barrier that has fewest."""
        return min(pool.effective for pool in self.pools)

    @property
    def floor_s(self) -> float:
        return sum(k * floor for k, floor in zip(self.per_step, self.floors_s, strict=True))

    def mean(self, draws: Sequence[Draws] | None = None) -> Floats:
        """sum_b E[W_b] in seconds, [B]."""
        given = draws or [pool.whole for pool in self.pools]
        return sum(
            (k * pool.mean(d) for k, pool, d in zip(self.per_step, self.pools, given, strict=True)),
            start=np.zeros(1),
        )

    def expected(self, ranks: Sequence[int], draws: Sequence[Draws] | None = None) -> Floats:
        """sum_b E[max_N W_b] in seconds, [B, ranks]."""
        given = draws or [pool.whole for pool in self.pools]
        tails = self.tails or (None,) * len(self.pools)
        return sum(
            (
                k * pool.expected(ranks, d, tail)
                for k, pool, d, tail in zip(self.per_step, self.pools, given, tails, strict=True)
            ),
            start=np.zeros((1, len(ranks))),
        )

    def with_tails(self, rng: np.random.Generator) -> "Step":
        """The same with a tail fitted to each barrier's windows, or with the reason why there is none."""
        try:
            tails = tuple(fit_tail(np.concatenate(p.longest), rng, p.tau) for p in self.pools)
        except NoTail as error:
            return replace(self, no_tail=str(error))
        return replace(self, tails=tails)

    def halves(self) -> "list[Step]":
        """Every other host and the rest, or of a single host every other rank and the rest; none of one rank."""
        if self.ranks < 2:
            return []
        if len(self.pools[0].hosts) > 1:
            cut = [[replace(p, hosts=p.hosts[side::2]) for p in self.pools] for side in (0, 1)]
        else:
            cut = [[replace(p, hosts=(p.hosts[0][side::2],)) for p in self.pools] for side in (0, 1)]
        return [replace(self, pools=tuple(pools), tails=(), no_tail=None) for pools in cut]

    def measured_s(self) -> float:
        """sum_b of the mean longest of all ranks together, seconds: no model, the windows side by side."""
        return sum(
            k * float(_aligned(p).max(0).mean()) for k, p in zip(self.per_step, self.pools, strict=True)
        )

    def kappa(self) -> float | None:
        """Correlation factor between hosts, or between the ranks of a single one: the least of all barriers."""
        rows = [_aligned(p) if len(p.hosts) > 1 else p.hosts[0] for p in self.pools]
        factors = [correlation_factor(x) for x in rows if len(x) > 1]
        known = [k for k in factors if np.isfinite(k)]
        return min(known) if known else None

    def refusal(self, ranks: int) -> str | None:
        """Why the data do not carry a figure for so many ranks; None if they do."""
        if self.effective < FEWEST:
            return (
                f"{min(p.windows for p in self.pools)} windows of a host are worth {self.effective:.0f} independent "
                f"ones, wanted {FEWEST}: measure longer"
            )
        if ranks <= self.host_size or isinstance(self.pools[0], CoscheduledPool):
            return None
        if self.no_tail is not None:
            return self.no_tail
        if not self.tails and ranks / self.host_size > self.effective:
            return (
                f"the longest of {ranks} ranks lies beyond all that {self.effective:.0f} independent windows of "
                f"{self.host_size} ranks hold: measure longer, or let model gpd extrapolate"
            )
        return None

    def flags(self, ranks: int, kappa: float | None) -> tuple[str, ...]:
        """Those of FLAGS that hold for so many ranks."""
        is_beyond_a_host = ranks > self.host_size
        holds = {
            "extrapolated": PER_RANK * ranks > self.effective * self.host_size
            or ranks > FARTHEST * self.ranks,
            "few hosts": is_beyond_a_host and len(self.pools[0].hosts) < FEW_HOSTS,
            "short interval": self.effective < ENOUGH,
            "mean unstable": is_beyond_a_host and any(t is not None and t.is_unstable for t in self.tails),
            "correlated": is_beyond_a_host and kappa is not None and kappa < CORRELATED,
        }
        return tuple(name for name, does_hold in holds.items() if does_hold)


def make_step(barriers: Sequence[Barrier], hosts: Sequence[object] | None) -> Step:
    """Raises: ValueError if there is no barrier, one is passed less than once, or their ranks are not the same."""
    if not barriers:
        raise ValueError("project: barriers must hold at least one barrier, found none")
    for b in barriers:
        if b.per_step < 1:
            raise ValueError(
                f"project: per_step of barrier '{b.name}' must be at least 1, found {b.per_step}"
            )
    pools = tuple(make_pool(b.windows, hosts) for b in barriers)
    shapes = {(len(p.hosts), p.host_size) for p in pools}
    if len(shapes) > 1:
        raise ValueError(
            f"project: every barrier must have windows of the same ranks, found {sorted(shapes)}"
        )
    floors = tuple(
        float(np.quantile(np.concatenate([host.ravel() for host in p.hosts]), FLOOR))
        if b.floor_s is None
        else b.floor_s
        for b, p in zip(barriers, pools, strict=True)
    )
    return Step(pools, tuple(b.per_step for b in barriers), floors)


def _aligned(pool: Pool) -> Floats:
    """Each host's longest, side by side from the first instant, [H, n]."""
    n = min(x.size for x in pool.longest)
    return np.stack([x[:n] for x in pool.longest])
