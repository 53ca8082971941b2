"""Lost time: what quanta took beyond their floor, and how it lies in time."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sigma_noise.trace import Series


@dataclass(frozen=True)
class Lost:
    """Quanta in order that do not overlap, stamps int64 [n] in ns, with the seconds each lost, f64 [n].

    `window_ns` is the time observed, which may be longer than from the first quantum to the last.
    Raises: ValueError if lengths differ, quanta overlap, an excess is negative or longer than its quantum.
    """

    start_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    excess_s: NDArray[np.float64]
    window_ns: tuple[int, int]

    def __post_init__(self) -> None:
        n = len(self.start_ns)
        if not n == len(self.end_ns) == len(self.excess_s):
            raise ValueError(
                f"Lost: start_ns, end_ns and excess_s must be of one length, found {n}, {len(self.end_ns)} and "
                f"{len(self.excess_s)}"
            )
        if np.any(self.end_ns < self.start_ns) or np.any(self.start_ns[1:] < self.end_ns[:-1]):
            raise ValueError("Lost: quanta must be in order and must not overlap")
        if not np.all(self.excess_s >= 0):
            raise ValueError(f"Lost: excess_s must be 0 or more, found {np.min(self.excess_s)}")
        if np.any(self.excess_s > (self.end_ns - self.start_ns) * 1e-9 + 1e-9):
            raise ValueError("Lost: excess_s must not be longer than its quantum")
        begin, end = self.window_ns
        if not begin < end or (n and (self.start_ns[0] < begin or self.end_ns[-1] > end)):
            raise ValueError(f"Lost: window_ns must hold all quanta, found {self.window_ns}")

    @classmethod
    def over_floor(cls, series: Series, floor_s: NDArray[np.float64] | float) -> "Lost":
        """Quanta of fixed work against their floor: max(0, T - floor)."""
        if not len(series):
            raise ValueError("Lost: there is no quantum")
        excess = np.maximum(series.seconds - floor_s, 0.0)
        window = int(series.start_ns[0]), int(series.end_ns[-1])
        return cls(series.start_ns, series.end_ns, excess, window)

    @property
    def seconds(self) -> float:
        return float(self.excess_s.sum())

    def with_excess(self, excess_s: NDArray[np.float64]) -> "Lost":
        return replace(self, excess_s=excess_s)

    def minus(self, other: "Lost") -> "Lost":
        return self.with_excess(np.maximum(self.excess_s - other.excess_s, 0.0))

    def per_bin(self, edges_ns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds lost between each two edges; the excess of a quantum lies evenly over it."""
        if not len(self.start_ns):
            return np.zeros(len(edges_ns) - 1)
        origin = self.start_ns[0]
        so_far = np.append(0.0, np.cumsum(self.excess_s))
        knots = np.stack([self.start_ns, self.end_ns], axis=1).ravel() - origin
        values = np.stack([so_far[:-1], so_far[1:]], axis=1).ravel()
        return np.diff(np.interp(edges_ns - origin, knots, values))
