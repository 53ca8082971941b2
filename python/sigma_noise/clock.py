"""What another host's clock shows beyond ours, from pings, and how far that may be off."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEAST_PINGS = 8
FASTEST = 0.1  # of the pings; the others waited somewhere, on an unknown side


@dataclass(frozen=True)
class Clock:
    """offset(t) = offset_ns + drift (t - origin_ns), in ns of the remote clock beyond ours at our time t."""

    origin_ns: int
    offset_ns: float
    drift: float  # ns a ns
    residual_ns: float  # bound of the error: stamps closer than that are not to be compared

    def offset(self, at_ns: ArrayLike) -> NDArray[np.int64]:
        away = (np.asarray(at_ns, np.int64) - self.origin_ns).astype(np.float64)
        return np.rint(self.offset_ns + self.drift * away).astype(np.int64)


def fit(sent_ns: ArrayLike, remote_ns: ArrayLike, received_ns: ArrayLike) -> Clock:
    """Offset and drift from n pings: when we sent it, what the remote clock showed, when the answer came.

    Each says offset = remote - (sent + received)/2, wrong by half its round trip at most (Cristian 1989).  A line
    through the tenth that was fastest, by least squares.  The residual is half the slowest round trip of these, where
    one way may have taken all the time, and the largest distance of one from the line; it holds between the first
    ping and the last.

    Raises: ValueError where stamps differ in number, are fewer than 8, or an answer came before it was asked for.
    """
    sent, remote, received = (np.asarray(x, np.int64) for x in (sent_ns, remote_ns, received_ns))
    if not sent.shape == remote.shape == received.shape or sent.ndim != 1 or len(sent) < LEAST_PINGS:
        raise ValueError(
            f"clock.fit: {LEAST_PINGS} pings or more of three stamps each are needed, found shapes {sent.shape}, "
            f"{remote.shape} and {received.shape}"
        )
    trip = received - sent
    if trip.min() < 0:
        raise ValueError(
            f"clock.fit: an answer must come after its ping, found a round trip of {trip.min()} ns"
        )
    kept = np.argsort(trip, kind="stable")[: max(LEAST_PINGS // 2, int(FASTEST * len(trip)))]
    origin = int(sent[0])
    middle = (sent[kept] - origin) + trip[kept] / 2.0
    offset = (remote[kept] - origin) - middle
    away = middle - middle.mean()
    spread = (away**2).sum()
    drift = float((away * offset).sum() / spread) if spread > 0.0 else 0.0
    level = float(offset.mean() - drift * middle.mean())
    error = np.abs(offset - level - drift * middle).max() + trip[kept].max() / 2.0
    return Clock(origin, level, drift, float(error))
