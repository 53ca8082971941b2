"""Spectra for the eye, with an alarm level: Welch on a grid, Lomb-Scargle on stamps that are not one.

Which period there is, `periods` says better: the tallest line of a pulse train may be any harmonic.  A line is called
one where its power stands above the alarm level, which is set so that series without a period have a line in less than
1 % of cases, whatever their length:

    alarm(f) = background(f) Q / E,    Q the 1 - alpha/bins quantile of the power of noise of unit background

The background is the larger of two: the spectrum of an AR(1) process with the series' own phi and variance, and the
median of the 2 x 30 bins about.  Neither alone would do: the one for noise that is not AR(1), the other at its foot.
"""

from dataclasses import dataclass
from math import pi

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, signal, stats

from sigma_noise.intervals import Array, series

ALPHA = 0.003
SEGMENTS = 8  # of a Welch estimate, if the series is long enough
FEWEST = 64  # samples
HALF_WIDTH = 30  # bins, of the running median
HANN_OVERLAP = (
    1 / 36
)  # squared correlation of the powers of two Hann windows that overlap by half (Welch 1967)


@dataclass(frozen=True)
class Spectrum:
    """Power at each frequency in Hz, its background and the level above which a line is called one, all [bins]."""

    frequency_hz: Array
    power: Array
    background: Array
    alarm: Array

    @property
    def lines_hz(self) -> Array:
        """Frequencies of local maxima above the alarm level, the tallest against it first."""
        ratio = np.concatenate([[0.0], self.power / self.alarm, [0.0]])
        middle = ratio[1:-1]
        at = np.flatnonzero((middle > 1) & (middle >= ratio[:-2]) & (middle > ratio[2:]))
        return self.frequency_hz[at[np.argsort(-middle[at])]]


def welch(x: ArrayLike, step_s: float, *, segments: int = SEGMENTS) -> Spectrum:
    """Of samples x [n] that are step_s apart, such as counts of fixed-time quanta: x^2 per Hz.

    Hann windows of 2n/(segments + 1), half of each shared with the next (Welch 1967).
    Raises: ValueError on fewer than 64 samples, or constant ones.
    """
    x = _checked(x)
    if not step_s > 0 or segments < 1:
        raise ValueError(f"step_s must be positive and segments 1 or more, found {step_s} and {segments}")
    length = max(FEWEST, 2 * len(x) // (segments + 1))
    frequency, power = signal.welch(x, 1 / step_s, "hann", min(length, len(x)), detrend="constant")
    count = 1 + (len(x) - min(length, len(x))) // (length - length // 2)
    freedom = 2 * count / (1 + 2 * HANN_OVERLAP * (count - 1) / count)
    inner = slice(
        1, -1
    )  # the mean is taken off, which takes of the first bins too; the last has half the freedom
    return _alarmed(frequency[inner], power[inner], ar1_shape(x, frequency[inner] * step_s), freedom)


def lomb_scargle(t: ArrayLike, x: ArrayLike) -> Spectrum:
    """Of samples x [n] at stamps t [n], seconds: standard normalisation, 0..1 (Lomb 1976, Scargle 1982).

    At multiples of 1 / (t[-1] - t[0]) up to half the mean rate.  The sums over stamps come from two FFTs of samples
    shared out to the two nearest points of a fine grid (in the way of Press & Rybicki 1989).
    Raises: ValueError as `welch`, or on stamps that do not rise.
    """
    x, t = _checked(x), series(t, "t")
    if len(t) != len(x) or not (np.diff(t) > 0).all():
        raise ValueError(f"t must rise and have the {len(x)} samples of x, found {len(t)}")
    n, span = len(t), float(t[-1] - t[0])
    frequency = np.arange(1, (n - 1) // 2 + 1) / span
    y = x - x.mean()
    phase = (t - t[0]) / span
    sums, twice = _fourier(phase, y, len(frequency)), _fourier(phase, np.ones(n), 2 * len(frequency))[1::2]
    turn = 0.5 * np.angle(twice)  # 2 pi f tau of the time shift that makes sine and cosine orthogonal
    rotated = sums * np.exp(-1j * turn)
    cosines = n / 2 + np.abs(twice) / 2
    sines = np.maximum(n / 2 - np.abs(twice) / 2, 1e-9 * n)
    power = (rotated.real**2 / cosines + rotated.imag**2 / sines) / (y @ y)
    return _alarmed(frequency, power, ar1_shape(x, frequency * (span / (n - 1))), 2.0)


def _fourier(phase: Array, weight: Array, most: int) -> NDArray[np.complex128]:
    """sum_j w_j exp(2 pi i k phase_j) for k = 1..most, phase in 0..1."""
    size = fft.next_fast_len(16 * most, real=True)
    at = phase * size
    left = np.floor(at).astype(np.int64)
    right_share = at - left
    grid = np.bincount(left % size, weight * (1 - right_share), size)
    grid += np.bincount((left + 1) % size, weight * right_share, size)
    k = np.arange(1, most + 1)
    return np.conj(fft.rfft(grid)[1 : most + 1]) / np.sinc(k / size) ** 2


def ar1_shape(x: Array, cycles: Array) -> Array:
    """|1 - phi exp(-2 pi i c)|^-2 at c cycles a sample, with phi of x: an AR(1) spectrum, up to a factor."""
    y = x - x.mean()
    phi = float(np.clip(y[1:] @ y[:-1] / (y @ y), 0.0, 0.999))
    phi = min(0.999, phi + (1 + 3 * phi) / len(x)) if phi > 0 else 0.0
    return 1 / (1 - 2 * phi * np.cos(2 * pi * cycles) + phi * phi)


def _alarmed(frequency: Array, power: Array, shape: Array, freedom: float) -> Spectrum:
    """Power of noise is background x chi^2(freedom) / freedom, whose median stands to the mean as `middle`."""
    middle = stats.chi2.median(freedom) / freedom
    flat = power / shape
    level = np.median(flat) / middle
    half = min(HALF_WIDTH, (len(flat) - 1) // 2)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(flat, half, mode="reflect"), 2 * half + 1)
    background = shape * np.maximum(level, np.median(around, axis=1) / middle)
    quantile = stats.chi2.isf(ALPHA / len(flat), freedom) / freedom
    return Spectrum(frequency, power, background, background * quantile)


def _checked(x: ArrayLike) -> Array:
    x = series(x)
    if len(x) < FEWEST or np.ptp(x) == 0:
        raise ValueError(f"x must have {FEWEST} samples or more that are not all alike, found {len(x)}")
    return x
