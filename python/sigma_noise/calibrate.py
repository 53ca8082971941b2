"""The noise floor of a machine: how far equal code seems to differ, from comparisons of A with A."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sigma_noise.compare import MARGINS, compare

LEVEL = 0.95


@dataclass(frozen=True)
class Calibration:
    """Of each metric: |ratio - 1| of K comparisons of equal code, its 95th percentile, and the margin to compare by."""

    comparisons: int
    differences: Mapping[str, tuple[float, ...]]
    floor: Mapping[str, float]
    margins: Mapping[str, float]


def calibrate(
    pairs: Sequence[tuple[Mapping[str, ArrayLike], Mapping[str, ArrayLike]]],
    margins: Mapping[str, float] | None = None,
) -> Calibration:
    """margin = max(m, 95th percentile of |A/A|), for each metric that all pairs have.

    |A/A| is exp|log ratio| - 1 of two arms of the same code; the percentile is the next that was seen, so of fewer
    than 20 comparisons the largest.

    Args:    pairs: K times two arms, each a number a run for every metric; `split` makes them of one set of runs.
             margins: the least ones, over `MARGINS`.
    Raises:  ValueError where there are no pairs, they have no metric in common, or `compare` refuses one.
    """
    if not pairs:
        raise ValueError("calibrate: pairs must hold one comparison of equal code or more, found none")
    least = MARGINS | dict(margins or {})
    names = [name for name in pairs[0][0] if all(name in arm for pair in pairs for arm in pair)]
    ratios = [
        {m.name: m.ratio for m in compare(a, b, metrics=names, margins=least).metrics} for a, b in pairs
    ]
    differences = {
        name: tuple(float(np.expm1(abs(np.log(ratio[name])))) for ratio in ratios) for name in names
    }
    floor = {name: float(np.quantile(d, LEVEL, method="higher")) for name, d in differences.items()}
    return Calibration(
        len(pairs), differences, floor, {name: max(least[name], floor[name]) for name in names}
    )  # fmt: skip


def split(
    runs: Mapping[str, ArrayLike], arm: int, comparisons: int, rng: np.random.Generator
) -> list[tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]]:
    """`comparisons` random pairs of arms, of `arm` runs each, none in both.

    Raises: ValueError if there are fewer than 2 arm runs, or metrics have different numbers of them.
    """
    values = {name: np.asarray(x, np.float64) for name, x in runs.items()}
    counts = {len(x) for x in values.values()}
    if len(counts) != 1 or not 0 < 2 * arm <= min(counts):
        raise ValueError(
            f"split: runs must hold twice {arm} runs of each metric, the same number of all, found {sorted(counts)}"
        )
    drawn = [rng.permutation(min(counts))[: 2 * arm] for _ in range(comparisons)]
    return [
        ({name: x[at[:arm]] for name, x in values.items()}, {name: x[at[arm:]] for name, x in values.items()})
        for at in drawn
    ]
