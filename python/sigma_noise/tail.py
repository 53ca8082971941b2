"""Peaks over a threshold: where the tail begins, what its shape is, and E[max_N] with it in place of the sample's.

The spliced distribution is the sample below the threshold u and, above, zeta times the survival of a generalised Pareto
distribution of shape xi and scale sigma (Davison & Smith, JRSS B 1990).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sigma_noise import pareto
from sigma_noise.expected_max import gap_sum

Floats = NDArray[np.float64]

FEWEST = 100  # exceedances, below which a shape says nothing: its error is (1 + xi) / sqrt(Nu)
MOST = 10_000  # exceedances, beyond which the fit is sharper than anything else here
LARGEST_SHARE = 0.2
HEAVY = 0.5  # shape from which the mean of so few maxima is unstable
BEYOND = 2.0  # times the largest sample at which an unstable mean is capped
DOUBT = 0.01  # p of the Anderson-Darling test below which the fit is refused
NODES, WEIGHTS = np.polynomial.legendre.leggauss(256)


class NoTail(ValueError):
    """The sample does not carry a tail; says why."""


@dataclass(frozen=True)
class Parameters:
    """Of several fits above one threshold: the share of samples above it, shape, scale in seconds; [B] each."""

    share: Floats
    shape: Floats
    scale: Floats


@dataclass(frozen=True)
class Tail:
    """Above `threshold` (seconds) lies `share` of all samples: generalised Pareto of `shape` and `scale` (seconds).

    `shape_low`, `shape_high`: its 90 % interval.  `p_value`: Anderson-Darling.  `cap`: seconds that nothing is taken
    to exceed, twice the largest sample; it is applied where `is_unstable`.
    """

    threshold: float
    share: float
    exceedances: int
    shape: float
    scale: float
    shape_low: float
    shape_high: float
    p_value: float
    cap: float

    @property
    def is_unstable(self) -> bool:
        return self.shape >= HEAVY

    @property
    def parameters(self) -> Parameters:
        return Parameters(*(np.array([a], np.float64) for a in (self.share, self.shape, self.scale)))

    def refitted(self, x: Floats, counts: Floats) -> "Parameters":
        """Above the same threshold, of resamples: ascending values [n] and how often each was drawn, [B, n].

        Fewer than 30 exceedances tell no shape: it stays, and the scale follows their mean.
        """
        first = int(np.searchsorted(x, self.threshold, side="right"))
        excess, times = x[first:] - self.threshold, counts[:, first:]
        n = times.sum(-1)
        is_told = n >= 30
        shape = np.full(len(n), self.shape)
        scale = (1 - min(self.shape, HEAVY)) * (times @ excess) / np.maximum(n, 1)
        if is_told.any():
            shape[is_told], scale[is_told] = pareto.fit_resamples(excess, times[is_told])
        return Parameters(n / counts.sum(-1), shape, np.where(n > 0, scale, self.scale))


def fit_tail(values: Floats, rng: np.random.Generator, tau: float = 1.0) -> Tail:
    """The tail of a sample in order of time [n], whose correlation time is `tau` samples.

    The lowest of a ladder of thresholds, each with sqrt(2) times the exceedances of the next, from which on shape and
    mean excess stay where the fit says and whose fit the Anderson-Darling test does not refuse.
    Raises: NoTail if fewer than 100 samples can exceed a threshold or no threshold passes.
    """
    x = np.sort(values)
    n = len(x)
    largest = min(MOST, int(n * LARGEST_SHARE))
    if largest < FEWEST:
        raise NoTail(f"{n} windows leave {largest} above the threshold; a tail needs {FEWEST} of them")
    steps = int(2 * np.log2(largest / FEWEST))
    rungs = [_rung(x, round(largest / 2 ** (i / 2))) for i in range(steps + 1)]
    rungs = [rung for rung in rungs if len(rung.excess) >= FEWEST and rung.excess[0] < rung.excess[-1]]
    if not rungs:
        raise NoTail("the largest windows are all of one length; no tail can be fitted to them")
    worst = 0.0
    for i, rung in enumerate(rungs):
        if not all(_is_steady(rung, higher, tau) for higher in rungs[i + 1 :]):
            continue
        excess = values[values > rung.threshold] - rung.threshold
        found = pareto.check(excess, rng, tau=tau)
        if found.p_value >= DOUBT:
            return Tail(
                threshold=rung.threshold,
                share=len(excess) / n,
                exceedances=len(excess),
                shape=rung.shape,
                scale=rung.scale,
                shape_low=found.shape_low,
                shape_high=found.shape_high,
                p_value=found.p_value,
                cap=BEYOND * float(x[-1]),
            )
        worst = max(worst, found.p_value)
    raise NoTail(
        f"no generalised Pareto tail fits above any threshold (Anderson-Darling p at most {worst:.3f}, wanted {DOUBT})"
    )


@dataclass(frozen=True)
class _Rung:
    threshold: float
    excess: Floats
    shape: float
    scale: float


def _rung(x: Floats, exceedances: int) -> _Rung:
    threshold = x[-exceedances - 1]
    excess = x[np.searchsorted(x, threshold, side="right") :] - threshold
    shape, scale = (
        pareto.fit(excess) if excess.size > 1 and excess[0] < excess[-1] else (np.float64(), np.float64())
    )
    return _Rung(float(threshold), excess, float(shape), float(scale))


def _is_steady(low: _Rung, high: _Rung, tau: float) -> bool:
    """Shape and mean excess above the higher threshold are within 2.5 errors of what the lower one's fit says.

    The higher sample is a part of the lower, so the difference of two shapes has the difference of their variances
    (Hausman, Econometrica 1978).
    """
    n_low, n_high = len(low.excess) / tau, len(high.excess) / tau
    error = (1 + max(low.shape, -0.5)) * np.sqrt(max(1 / n_high - 1 / n_low, 0.0))
    if abs(high.shape - low.shape) > 2.5 * error and error > 0:
        return False
    if low.shape >= HEAVY:  # the mean excess has no variance to compare by
        return True
    mean = (low.scale + low.shape * (high.threshold - low.threshold)) / (1 - low.shape)
    return bool(abs(high.excess.mean() - mean) <= 2.5 * high.excess.std() / np.sqrt(n_high))


def spliced_max(x: Floats, below: Floats, ranks: Floats, tail: Tail, fitted: Parameters) -> Floats:
    """E[max_N] with the tail in place of the sample above its threshold; `x`, `below`, `ranks` [K] as in `gap_sum`.

    E[min(max, u)] of the sample + the integral of 1 - (1 - zeta P(Y > y))^N over y, capped from xi = 1/2 on.
    """
    body = gap_sum(np.minimum(x, tail.threshold), below, ranks)
    return body + excess_max(ranks, fitted, room=tail.cap - tail.threshold)


def excess_max(ranks: Floats, fitted: Parameters, room: float) -> Floats:
    """E[max(max_N - u, 0)] for each fit and each of `ranks` [K], at most `room` seconds from xi = 1/2 on: [B, K].

    Gauss-Legendre over t = -log P(Y > y), where y = sigma (exp(xi t) - 1) / xi: a smooth step near log(N zeta), and
    beyond it a tail exp(-(1 - xi) t) that 40 / (1 - xi) ends.
    """
    share, shape, scale = (a[:, None, None] for a in (fitted.share, fitted.shape, fitted.scale))
    N = np.asarray(ranks, np.float64)[:, None]
    capped = -pareto.log_survival(np.float64(room), shape, scale)
    open_end = np.log(np.maximum(N * share, 1)) + 40 / (1 - np.minimum(shape, HEAVY))
    end = np.where(shape >= HEAVY, capped, open_end)
    t = end * (NODES + 1) / 2
    reached = -np.expm1(N * np.log1p(-share * np.exp(-t)))
    return (reached * scale * np.exp(shape * t)) @ WEIGHTS * end[..., 0] / 2
