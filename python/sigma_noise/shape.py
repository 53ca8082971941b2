"""How much the distributions of two sets of runs differ in shape: effect sizes, not a gate."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sigma_noise.shift import relabellings

MOST_LISTED = 20_000  # relabellings; of more that many are drawn
GRID = 2_048  # points at which distributions are known


@dataclass(frozen=True)
class Shape:
    wasserstein_log: float  # integral of |F_a - F_b| over log time: 0.05 is what a shift of all by 5 % makes
    similarity: float  # 0..1; 1 where both are the same
    p: float  # of a Wasserstein distance as large where runs change sides


def shape(base: Sequence[ArrayLike], new: Sequence[ArrayLike], *, seed: int = 0) -> Shape:
    """Compare the times of runs: every run counts the same, however many samples it has.

        wasserstein_log = int |F_a - F_b| d log x
        similarity      = int_0 (1 - max(F_a, F_b)) dx / int_0 (1 - min(F_a, F_b)) dx

    The similarity is the part that the areas above both distribution functions share; it is 1 - area / normaliser, the
    area int |F_a - F_b| dx and the normaliser what both cover together, in the manner of Anubis (arXiv 2402.06194).
    p comes from runs that change sides, all ways or 20,000 of them: samples of a run are no replicates, and a pooled
    Kolmogorov-Smirnov test raises false alarms in most comparisons of correlated series.  With fewer than 4 runs an arm
    p cannot fall to 5 %.

    Args:    base, new: the samples of each run in seconds, above 0.
    Raises:  ValueError if an arm has no run, a run no sample, or a sample is not above 0 and finite.
    """
    runs = [np.sort(np.asarray(x, np.float64).ravel()) for x in (*base, *new)]
    n_a, n_b = len(base), len(new)
    if not n_a or not n_b or not all(len(x) and x[0] > 0.0 and np.isfinite(x[-1]) for x in runs):
        raise ValueError(
            f"shape: base and new must be runs of samples above 0 and finite, found {n_a} and {n_b} runs with "
            f"{sorted({len(x) for x in runs})[:5]} samples"
        )
    grid = _grid(runs)
    known = np.stack([np.searchsorted(x, grid, side="right") / len(x) for x in runs])  # [runs, G]
    f_a, f_b = known[:n_a].mean(0)[:-1], known[n_a:].mean(0)[:-1]
    width = np.diff(grid)
    shared = grid[0] + ((1.0 - np.maximum(f_a, f_b)) * width).sum()
    covered = grid[0] + ((1.0 - np.minimum(f_a, f_b)) * width).sum()
    distance = _distances(known[:, :-1], _labels(n_a, n_b, seed), np.diff(np.log(grid)))
    p = np.mean(distance >= distance[0] * (1.0 - 1e-9))  # the identity is the first, and counts
    return Shape(float(distance[0]), float(shared / covered), float(p))


def _grid(runs: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """All values where they are few, else quantiles of every run, its ends included."""
    values = np.unique(np.concatenate(runs))
    if len(values) <= GRID:
        return values
    share = np.linspace(0.0, 1.0, max(17, GRID // len(runs)))
    return np.unique(np.concatenate([x[np.rint(share * (len(x) - 1)).astype(np.int64)] for x in runs]))


def _labels(n_a: int, n_b: int, seed: int) -> NDArray[np.bool_]:
    """Which runs are called "a", the identity first."""
    if comb(n_a + n_b, n_a) <= MOST_LISTED:
        return relabellings(n_a, n_b)
    order = np.random.default_rng(seed).random((MOST_LISTED, n_a + n_b)).argsort(axis=1)
    labels = order < n_a
    labels[0] = np.arange(n_a + n_b) < n_a
    return labels


def _distances(
    known: NDArray[np.float64], is_a: NDArray[np.bool_], width: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Wasserstein distance for each labelling, in pieces that fit a cache."""
    n_a = int(is_a[0].sum())
    sign = np.where(is_a, 1.0 / n_a, -1.0 / (is_a.shape[1] - n_a))
    return np.concatenate(
        [np.abs(part @ known) @ width for part in np.array_split(sign, 1 + len(sign) // 256)]
    )
