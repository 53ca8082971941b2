"""How long time remembers: the correlation time of a series, and blocks long enough to keep what it remembers."""

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len, rfft

Floats = NDArray[np.float64]


def correlation_time(series: Floats) -> float:
    """1 + 2 sum rho_k in samples, over pairs of lags while their sum is positive (Geyer 1992); 1 if nothing varies.

    A mean of n samples is worth n over this many independent ones.
    """
    x = np.asarray(series, np.float64)
    x = x - x.mean()
    n, size = x.size, next_fast_len(2 * x.size, real=True)
    scale = np.abs(x).max(initial=0.0)
    if n < 4 or scale <= 1e-12 * np.abs(series).max():  # what is left of a constant is rounding
        return 1.0
    power = np.abs(rfft(x / scale, size)) ** 2
    cov = irfft(power, size)[:n]
    pairs = (cov[: n // 2 * 2 : 2] + cov[1::2]) / cov[0]  # rho_0 + rho_1, rho_2 + rho_3, ...
    negative = np.flatnonzero(pairs <= 0)
    return float(max(1.0, 2 * pairs[: negative[0] if negative.size else None].sum() - 1))


def block_length(n: int, tau: float) -> int:
    """Length of blocks, in samples, that serves n samples of correlation time tau best.

    (6 rho^2 / (1 - rho^2)^2 * n)^(1/3), the optimum for resampled blocks (Politis & White 2004) of an
    autoregression of order one whose correlation time is tau; at most n/4, so that four blocks differ.
    """
    rho = (tau - 1) / (tau + 1)
    best = (6 * rho**2 / (1 - rho**2) ** 2 * n) ** (1 / 3)
    return int(np.clip(np.ceil(best), 1, max(1, n // 4)))
