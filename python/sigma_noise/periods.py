"""Periods in the stamps of detours, by the H-test.

A cause that strikes every 100 ms for a moment makes a train of pulses, whose power is spread over many harmonics; the
tallest line of a periodogram may be any of them.  With phases 2 pi f t_j of n stamps (de Jager, Raubenheimer &
Swanepoel 1989):

    Z2_m(f) = 2/n sum_{k<=m} |sum_j exp(2 pi i k f t_j)|^2,     H(f) = max_{m<=20} (Z2_m - 4 m + 4)

The power of all harmonics of all f comes from one FFT of the stamps' counts in fine bins.  How large H gets by chance
is asked of surrogates, not of the formula for white noise: stamps come in clusters, more of them now than then.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil, pi, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy import fft

from sigma_noise.intervals import Array

MOST_HZ = 60.0  # what is faster is found by its multiples
HARMONICS = 20
PENALTY = 4.0
BINS_A_CYCLE = 4  # of the highest harmonic's
OVERSAMPLING = (
    4  # of the power spectrum: a line lies at most 1/8 of its width off a point, which costs 5 % of it
)
STEPS = 2  # of f for each width 1/(20 window) of the highest harmonic
MOST_POINTS = 1 << 25
FEWEST_STAMPS = 8
ROUNDS_OF_TRAIN = 30
LEAST_WIDTH = 1e-3  # of a pulse, in periods, while it is looked for
SURROGATES = 39
LEAST_P = 1e-6  # a law fitted to so few tells no more
FITS = 4000
CLUSTER_GAP = 0.2  # of the mean gap: stamps that are closer move together
ROUNDING = 1e-12  # of a lowest frequency that is the least that its window holds
BLOCK_PERIODS = 3  # of the longest sought, in which surrogates keep the number of stamps

# Seconds, what has that period.  Watchdog: pytorch/pytorch#139581; ticks: CONFIG_HZ of 1000, 300, 250 and 100.
SOURCES: tuple[tuple[float, str], ...] = (
    (1e-3, "kernel tick, 1000 Hz"),
    (1 / 300, "kernel tick, 300 Hz"),
    (4e-3, "kernel tick, 250 Hz"),
    (1e-2, "kernel tick, 100 Hz"),
    (0.1, "NCCL watchdog"),
    (1.0, "telemetry, 1 s"),
    (15.0, "telemetry, 15 s"),
    (60.0, "telemetry, 60 s"),
)


@dataclass(frozen=True)
class Period:
    """A train of detours.

    h and p: the H-test's value, and how probable one as large is among surrogates.
    phase_s: of the first pulse that could have been, after the window's begin.  jitter_s: standard deviation of
    stamps about the train.  stamps: those in the train, each by its probability of belonging to it.  coverage: of
    the pulses that the window could hold, the share that came, 0..1.  duty: share of the time spent in them, NaN
    without lengths.
    """

    frequency_hz: float
    h: float
    p: float
    phase_s: float
    jitter_s: float
    stamps: float
    coverage: float
    duty: float
    sources: tuple[str, ...] = ()

    @property
    def period_s(self) -> float:
        return 1 / self.frequency_hz


@dataclass(frozen=True)
class _Scan:
    """H of each frequency, for stamps of one window."""

    window_s: float
    low_hz: float
    high_hz: float

    def __post_init__(self) -> None:
        held = self.window_s * self.low_hz * (1 + ROUNDING)
        if not 0 < self.low_hz < self.high_hz or held < BLOCK_PERIODS:
            raise ValueError(
                f"low_hz and high_hz must rise, from {BLOCK_PERIODS / self.window_s:g} or more (3 periods in the "
                f"window of {self.window_s:g} s), found {self.low_hz:g} and {self.high_hz:g}"
            )
        if self.points > MOST_POINTS:
            raise ValueError(
                f"high_hz x window must be less: {self.high_hz:g} Hz over {self.window_s:g} s takes "
                f"{self.points:,} points of at most {MOST_POINTS:,}; pass fewer seconds or a lower band"
            )

    @property
    def step_hz(self) -> float:
        return 1 / (HARMONICS * self.window_s * STEPS)

    @property
    def points(self) -> int:
        """Of the FFT, or of all harmonics of `frequencies`."""
        return max(self.bins * OVERSAMPLING, ceil(HARMONICS * (self.high_hz - self.low_hz) / self.step_hz))

    @property
    def top_hz(self) -> float:
        """Of harmonics: the 20th of 60 Hz, the 4th of what lies above 300."""
        return max(HARMONICS * min(self.high_hz, 60.0), 4 * self.high_hz)

    @property
    def bins(self) -> int:
        return ceil(self.window_s * self.top_hz * BINS_A_CYCLE)

    @cached_property
    def frequencies(self) -> Array:
        return np.arange(self.low_hz, self.high_hz + self.step_hz / 2, self.step_hz)

    def h(self, t: Array) -> Array:
        """H at `frequencies`, of stamps t in 0..window_s."""
        power, step_hz = self._power(t)
        f = self.frequencies
        best = np.zeros(len(f))
        z2 = np.zeros(len(f))
        for k in range(1, HARMONICS + 1):
            live = int(np.searchsorted(f, self.top_hz / k, "right"))
            z2[:live] += power[np.rint(f[:live] * (k / step_hz)).astype(np.int64)]
            np.maximum(best[:live], z2[:live] - PENALTY * (k - 1), out=best[:live])
        return best

    @cached_property
    def _transform(self) -> tuple[int, float, Array]:
        """Points of the FFT, Hz from one to the next, and 1 / sinc^2 of each: a stamp may be anywhere in its bin."""
        size = fft.next_fast_len(self.bins * OVERSAMPLING, real=True)
        step_hz = self.bins / (size * self.window_s)
        nu = np.arange(ceil(self.top_hz / step_hz) + 2) * step_hz
        return size, step_hz, np.sinc(nu * (self.window_s / self.bins)) ** -2

    def _power(self, t: Array) -> tuple[Array, float]:
        """2/n |sum_j exp(2 pi i nu t_j)|^2 at nu = 0, step, ... and the step."""
        size, step_hz, gain = self._transform
        at = np.minimum(t * (self.bins / self.window_s), self.bins - 1).astype(np.int64)
        counts = np.bincount(at, minlength=self.bins).astype(np.float32)
        z = fft.rfft(counts, size)[: len(gain)]
        return (z.real**2 + z.imag**2) * gain * (2 / len(t)), step_hz


def _h_exact(t: Array, frequencies: Array) -> Array:
    z = np.exp(2j * pi * frequencies[:, None] * t)
    harmonic, z2, best = np.ones_like(z), np.zeros(len(z)), np.zeros(len(z))
    for m in range(1, HARMONICS + 1):
        harmonic *= z
        z2 += 2 / len(t) * np.abs(harmonic.sum(axis=1)) ** 2
        best = np.maximum(best, z2 - PENALTY * m + PENALTY)
    return best


def find(
    t: ArrayLike,
    window_s: float,
    *,
    length_s: ArrayLike | None = None,
    low_hz: float = 1.0,
    high_hz: float = 60.0,
    alpha: float = 0.01,
    most: int = 3,
    own: dict[str, float] | None = None,
    surrogates: int = SURROGATES,
    seed: int = 0,
) -> list[Period]:
    """The trains in stamps t [n], seconds since the window's begin, strongest first, each by its fundamental.

    The strongest is found, its stamps are taken out, the rest is searched again, until what is found has p > alpha.
    Args:    length_s: of the detours [n], for duty cycles; own: names and periods in seconds of what the profiler
             itself does, to be named as a source; surrogates: random series per search.
    Raises:  ValueError on stamps outside the window, or a band that the window cannot hold 3 periods of.
    Cost:    (1 + surrogates) scans a train; a scan of 1 to 60 Hz over 20 s is an FFT of 4e5 and 1e6 additions.
    """
    t = np.asarray(t, np.float64)
    scan = _Scan(window_s, low_hz, high_hz)
    if len(t) and (not np.isfinite(t).all() or t.min() < 0 or t.max() > window_s):
        raise ValueError(f"t must lie in 0..window_s ({window_s:g}), found {t.min():g} to {t.max():g}")
    if length_s is not None and len(np.asarray(length_s)) != len(t):
        raise ValueError(f"length_s must have the {len(t)} stamps of t, found {len(np.asarray(length_s))}")
    length = np.full(len(t), np.nan) if length_s is None else np.asarray(length_s, np.float64)
    order = np.argsort(t, kind="stable")
    t, length = t[order], length[order]
    rng = np.random.default_rng(seed)
    found: list[Period] = []
    for _ in range(most):
        if len(t) < FEWEST_STAMPS:
            break
        frequency, h = _strongest(t, scan)
        p = _p_value(h, t, scan, surrogates, rng)
        if p > alpha:
            break
        phase, jitter, belongs = _train(t, 1 / frequency)
        if all(
            abs(frequency - other.frequency_hz) > 1 / window_s for other in found
        ):  # else a second pulse of it
            stamps = float(belongs.sum())
            coverage, duty = min(1.0, stamps / (window_s * frequency)), float(belongs @ length / window_s)
            sources = likely_sources(1 / frequency, own)
            found.append(Period(frequency, h, p, phase, jitter, stamps, coverage, duty, sources))
        is_left = (
            rng.random(len(t)) > belongs
        )  # by chance, so that the train leaves no gaps that return as often
        t, length = t[is_left], length[is_left]
    return found


def _strongest(t: Array, scan: _Scan) -> tuple[float, float]:
    """The fundamental of the frequency with the highest H, and that H."""
    h = scan.h(t)
    at = int(h.argmax())
    frequency = _refined(t, float(scan.frequencies[at]), scan.step_hz)
    return _fundamental(t, frequency, scan, h), float(h[at])


def _refined(t: Array, frequency: float, step: float) -> float:
    for scale in (1.0, 0.2):
        near = frequency + step * scale * np.linspace(-1, 1, 11)
        frequency = float(near[_h_exact(t, near).argmax()])
    return frequency


def _fundamental(t: Array, frequency: float, scan: _Scan, h: Array) -> float:
    """The lowest f of which `frequency` is a multiple and whose own harmonics are there.

    Pulses at multiples of 100 ms are as coherent at 20 Hz as at 10; at 5 Hz only every second harmonic is.  Of a train
    without jitter all multiples are alike, so the highest H may be that of the 29th: beyond the 10th, f is asked where
    its own H is over half of that.
    """
    k = np.arange(1, HARMONICS + 1)
    power = _harmonics(t, frequency)
    for d in range(HARMONICS // 2, 1, -1):  # up: all there is lies at multiples of d
        if power[k % d == 0].mean() > 8 * power[k % d != 0].mean():
            frequency *= d
            break
    while lower := [f for d, f in _divided(frequency, scan, h) if _is_whole(t, f, d)]:
        frequency = lower[0]
    return frequency


def _divided(frequency: float, scan: _Scan, h: Array) -> list[tuple[int, float]]:
    """(d, frequency / d) that may be the fundamental, the lowest first."""
    d = np.arange(int(frequency / (scan.low_hz - scan.step_hz)), 1, -1)
    at = np.clip(np.rint((frequency / d - scan.low_hz) / scan.step_hz).astype(np.int64), 0, len(h) - 1)
    live = (d <= HARMONICS // 2) | (h[at] > 0.5 * h.max())
    return [(int(each), frequency / int(each)) for each in d[live]]


def _is_whole(t: Array, frequency: float, d: int) -> bool:
    """Whether what no multiple of a divisor of d has is there as well as the multiples of d."""
    k = np.arange(1, HARMONICS + 1)
    others = _harmonics(t, frequency)[np.gcd(k, d) == 1]
    multiples = _harmonics(t, frequency * d)[: max(2, HARMONICS // d)]
    return bool(others.mean() > 0.25 * multiples.mean())


def _harmonics(t: Array, frequency: float) -> Array:
    """2/n |sum exp|^2 - 2 of harmonics 1..20: what they have above chance, not below 0."""
    z = np.exp(2j * pi * frequency * t)
    power = 2 / len(t) * np.abs(np.vander(z, HARMONICS + 1, increasing=True)[:, 1:].sum(axis=0)) ** 2
    return np.maximum(0.0, power - 2)


def _train(t: Array, period_s: float) -> tuple[float, float, Array]:
    """Phase, standard deviation about it, and each stamp's probability of being in the train, [n].

    Offsets from the pulse are normal for stamps of the train, uniform for the rest: expectation maximisation, from
    where the sum of all harmonics peaks.
    """
    k = np.arange(1, HARMONICS + 1)
    c = np.exp(-2j * pi / period_s * np.outer(k, t)).sum(axis=1)
    grid = np.linspace(0, 1, 512, endpoint=False)
    phase = (
        float(grid[(c[:, None] * np.exp(2j * pi * np.outer(k, grid))).real.sum(axis=0).argmax()]) * period_s
    )
    sigma, share = period_s / (2 * HARMONICS), 0.5
    for _ in range(ROUNDS_OF_TRAIN):
        d = (t - phase + period_s / 2) % period_s - period_s / 2
        width = max(sigma, LEAST_WIDTH * period_s)
        normal = share / width * np.exp(-0.5 * (d / width) ** 2)
        belongs = normal / (normal + (1 - share) * sqrt(2 * pi) / period_s)
        share = float(np.clip(belongs.mean(), 1 / len(t), 1 - 1e-9))
        shift = float(belongs @ d / belongs.sum())
        sigma = sqrt(float(belongs @ (d - shift) ** 2 / belongs.sum()))
        phase += shift
    return phase % period_s, sigma, belongs


def _p_value(h: float, t: Array, scan: _Scan, surrogates: int, rng: np.random.Generator) -> float:
    """P(largest H >= h) of surrogates: by rank, or beyond the largest of them by a Gumbel law fitted to all,
    which is known no better than so few tell: 19 of them, taken for the law, pass 1 % in 1.9 % of its own samples.

    A few of them settle what is plainly chance (Besag & Clifford 1991).
    """
    largest: list[float] = []
    for i in range(1, surrogates + 1):
        largest.append(float(scan.h(surrogate(t, scan.window_s, BLOCK_PERIODS / scan.low_hz, rng)).max()))
        beyond = sum(x >= h for x in largest)
        if beyond >= 3:
            return beyond / i
    by_rank = (1 + sum(x >= h for x in largest)) / (1 + surrogates)
    centre, scale = _gumbel(np.array(largest))
    if h <= max(largest) or scale == 0:
        return by_rank
    return min(by_rank, max(LEAST_P, _beyond((h - float(centre)) / float(scale), surrogates)))


def _gumbel(x: Array) -> tuple[Array, Array]:
    """Centre and scale of the law's samples x [..., n], by moments."""
    scale = sqrt(6) / pi * np.std(x, axis=-1, ddof=1)
    return np.mean(x, axis=-1) - np.euler_gamma * scale, scale


def _beyond(z: float, n: int) -> float:
    """P(another one lies z scales above the centre), both fitted to n: its mean over samples of n."""
    centre, scale = _fits(n)
    return float(np.mean(-np.expm1(-np.exp(-(centre + scale * z)))))


@cache
def _fits(n: int) -> tuple[Array, Array]:
    """Of samples of n of the law with centre 0 and scale 1."""
    return _gumbel(np.random.default_rng(0).gumbel(size=(FITS, n)))


def surrogate(t: Array, window_s: float, block_s: float, rng: np.random.Generator) -> Array:
    """Stamps without a period, otherwise like t (sorted): as many in each block, and in clusters as tight.

    Stamps closer than a fifth of the mean gap form a cluster, kept as it is; its first stamp goes anywhere within its
    block.  (Gaps in another order would not do: those of a train are all alike, in any order.)
    """
    mean_gap = window_s / len(t)
    is_first = np.concatenate([[True], np.diff(t) > CLUSTER_GAP * mean_gap])
    cluster = np.cumsum(is_first) - 1
    first = t[is_first]
    blocks = max(1, int(window_s / block_s))
    width = window_s / blocks
    moved = (np.minimum(first // width, blocks - 1) + rng.random(len(first))) * width
    return np.sort((moved[cluster] + t - first[cluster]) % window_s)


def likely_sources(
    period_s: float, own: dict[str, float] | None = None, tolerance: float = 0.02
) -> tuple[str, ...]:
    """What is known to have that period, to 2 %: the profiler's `own` first, then SOURCES."""
    named = [*((p, f"sigma noise: {name}") for name, p in (own or {}).items()), *SOURCES]
    return tuple(name for known, name in named if abs(period_s / known - 1) <= tolerance)


def fold(
    t: ArrayLike, period_s: float, *, weight: ArrayLike | None = None, bins: int = 50, phase_s: float = 0.0
) -> tuple[Array, Array]:
    """Stamps (or their weights, such as excess seconds) summed by phase: bin centres in 0..period_s, sums [bins]."""
    if not period_s > 0 or bins < 1:
        raise ValueError(f"period_s must be positive and bins 1 or more, found {period_s} and {bins}")
    phase = (np.asarray(t, np.float64) - phase_s) % period_s
    at = np.minimum((phase / period_s * bins).astype(np.int64), bins - 1)
    sums = np.bincount(at, weight if weight is None else np.asarray(weight, np.float64), minlength=bins)
    return (np.arange(bins) + 0.5) * (period_s / bins), sums.astype(np.float64)
