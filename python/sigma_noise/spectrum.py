"""A spectrum for the eye, with an alarm level: Welch's, of samples on a grid.

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
from numpy.typing import ArrayLike
from scipy import signal, stats

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


def on_a_grid(start_s: ArrayLike) -> tuple[float, slice]:
    """How far begins [n] are apart, and the longest stretch of which none is missing.  Raises: ValueError below two."""
    gaps = np.diff(series(start_s, "start_s"))
    if not len(gaps):
        raise ValueError("start_s must have two samples or more, found 1")
    step_s = float(np.median(gaps))
    cuts = np.concatenate([[0], np.flatnonzero(gaps > 1.5 * step_s) + 1, [len(gaps) + 1]])
    longest = int(np.argmax(np.diff(cuts)))
    return step_s, slice(int(cuts[longest]), int(cuts[longest + 1]))


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
