"""Waits between pairs of ranks: whether a source, a destination or a path is slow."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from sigma_noise.intervals import NORMAL_MAD
from sigma_noise.outliers import EFFICIENCY, PRIOR_FREEDOM, cut, robust_z

LEAST_RANKS = 4  # a median of fewer than three cells is no protection against one
TURNS, SETTLED = 10, 1e-9  # of the polish
LEAST_EFFECT = 0.10  # of the usual wait
MEDIAN_ERROR = 1.2533  # of the standard error of a mean, sqrt(pi/2)
SPREAD = 0.05  # relative deviation of healthy links that is expected beforehand


@dataclass(frozen=True)
class Finding:
    kind: str  # source, destination or path
    source: int | None
    destination: int | None
    ratio: float  # of its wait to the usual


@dataclass(frozen=True)
class Links:
    """wait[s, d] = usual * source[s] * destination[d] * path[s, d]; NaN where nothing is sent."""

    usual_s: float
    source: NDArray[np.float64]  # [P]
    destination: NDArray[np.float64]  # [P]
    path: NDArray[np.float64]  # [P, P]
    findings: tuple[Finding, ...]  # worst first


def links(wait_s: ArrayLike, *, alpha: float = 0.01, spread: float = SPREAD) -> Links:
    """Split the waits of destinations (columns) for data of sources (rows) into what rows, columns and cells explain.

    A hot row is a slow source, a hot column a slow destination, a hot cell a slow path (after the waits that DeepEP
    normalises by the means of rows and columns, pull request 311).  Here rows and columns are divided by their medians,
    by turns (Tukey 1977, median polish of logs): by means, one hot path of 8 ranks makes its row and column look hot.

    Args:    wait_s [P, P], mean or median over steps, seconds; the diagonal, and what is NaN, is passed over.
             alpha: probability of a false alarm among equal links, a third of it each for rows, columns and cells.
    Raises:  ValueError if it is not square with 4 ranks or more, or a wait is not above 0 and finite.
    """
    if not 0.0 < alpha < 1.0 or not spread > 0.0:
        raise ValueError(
            f"links: alpha must lie between 0 and 1 and spread above 0, found {alpha} and {spread}"
        )
    wait = np.array(wait_s, np.float64)
    if wait.ndim != 2 or wait.shape[0] != wait.shape[1] or len(wait) < LEAST_RANKS:
        raise ValueError(
            f"links: wait_s must be [P, P] of {LEAST_RANKS} or more ranks, found shape {wait.shape}"
        )
    np.fill_diagonal(wait, np.nan)
    wrong = ~np.isnan(wait) & ~((wait > 0.0) & np.isfinite(wait))
    alone = np.isnan(wait).all(axis=0) | np.isnan(wait).all(axis=1)
    if wrong.any() or alone.any():
        found = f"{wait[wrong][0]}" if wrong.any() else f"none of rank {np.flatnonzero(alone)[0]}"
        raise ValueError(f"links: waits must be above 0 and finite, and some of each rank, found {found}")
    usual, source, destination, path = _polish(np.log(wait))
    scatter, freedom = _scatter(path, spread)
    expected = float(np.hypot(spread, MEDIAN_ERROR * scatter / np.sqrt(len(wait) - 1)))  # of a row's median
    findings = [
        Finding("source", s, None, float(np.exp(source[s]))) for s in _hot(source, alpha / 3.0, expected)
    ]
    findings += [
        Finding("destination", None, d, float(np.exp(destination[d])))
        for d in _hot(destination, alpha / 3.0, expected)
    ]
    cells = np.count_nonzero(~np.isnan(path))
    bar = max(np.log1p(LEAST_EFFECT), scatter * stats.t.isf(alpha / 3.0 / cells, freedom))
    findings += [
        Finding("path", s, d, float(np.exp(path[s, d]))) for s, d in np.argwhere(path > bar).tolist()
    ]
    findings.sort(key=lambda finding: -finding.ratio)
    return Links(float(np.exp(usual)), np.exp(source), np.exp(destination), np.exp(path), tuple(findings))


def _polish(
    x: NDArray[np.float64],
) -> tuple[float, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """x = usual + source[:, None] + destination + rest, medians of each taken off by turns."""
    rest = x.copy()
    source, destination = np.zeros(len(x)), np.zeros(len(x))
    for _ in range(TURNS):
        row = _median(rest)
        rest -= row[:, None]
        source += row
        column = _median(rest.T)
        rest -= column
        destination += column
        if max(np.abs(row).max(), np.abs(column).max()) < SETTLED:
            break
    centres = float(np.median(source)), float(np.median(destination))
    return sum(centres), source - centres[0], destination - centres[1], rest


def _median(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row, without NaN; `np.nanmedian` takes a millisecond for eight of them."""
    ordered = np.sort(x, axis=1)
    known = np.count_nonzero(~np.isnan(x), axis=1)
    rows = np.arange(len(x))
    return (ordered[rows, (known - 1) // 2] + ordered[rows, known // 2]) / 2.0


def _scatter(rest: NDArray[np.float64], spread: float) -> tuple[float, float]:
    """Deviation of cells of healthy links, and its degrees of freedom.

    The polish sets as many cells near zero as rows and columns have medians, 2P - 1.  Without these the median of the
    others is that of free ones: unbiased within 10 % from 5 ranks on.
    """
    size = np.sort(np.abs(rest[~np.isnan(rest)]))
    free = size[min(2 * len(rest) - 1, len(size) - 1) :]
    own = EFFICIENCY * len(free)
    square = PRIOR_FREEDOM * spread**2 + own * (NORMAL_MAD * np.median(free)) ** 2
    return float(np.sqrt(square / (PRIOR_FREEDOM + own))), PRIOR_FREEDOM + own


def _hot(x: NDArray[np.float64], alpha: float, expected: float) -> list[int]:
    is_hot = (robust_z(x, expected) > cut(len(x), alpha, expected)) & (x > np.log1p(LEAST_EFFECT))
    return np.flatnonzero(is_hot).tolist()
