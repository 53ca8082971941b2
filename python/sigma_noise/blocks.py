"""Blocks of steps drawn with replacement: intervals of statistics of correlated series.

Steps that follow each other are alike, so n of them are worth n_eff = n / tau.  Whole blocks, longer than the
memory of the series, are nearly independent (Carlstein 1986); all ranks share the draw, so what befalls them together
stays together.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

LEAST_BLOCKS, MOST_BLOCKS = 16, 100  # more make no better an interval
MEMORIES = 3  # a block's length in integrated autocorrelation times
LEVELS = 65  # points of a distribution around the quantile that is drawn


@dataclass(frozen=True)
class Blocks:
    """`count` blocks of `length` steps, the rest of n < length steps in the last; `weight` [B, count], times drawn."""

    n: int
    length: int
    count: int
    weight: NDArray[np.float64]

    @cached_property
    def of_step(self) -> NDArray[np.int64]:
        return np.minimum(np.arange(self.n) // self.length, self.count - 1)

    def sums(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """x [..., n] summed by block: [..., count]."""
        return np.add.reduceat(x, np.arange(self.count) * self.length, axis=-1)


def draw(n: int, tau: float, replicates: int, rng: np.random.Generator) -> Blocks:
    """B draws of blocks of 3 tau steps; longer where that makes over 100 of them, shorter where under 16."""
    length = int(np.clip(np.ceil(MEMORIES * tau), -(-n // MOST_BLOCKS), max(1, n // LEAST_BLOCKS)))
    count = max(1, n // length)
    weight = rng.multinomial(count, np.full(count, 1.0 / count), size=replicates)
    return Blocks(n, length, count, weight.astype(np.float64))


def quantiles(x: NDArray[np.float64], p: float, blocks: Blocks) -> NDArray[np.float64]:
    """The p-quantile of each draw of x [n]: [B].

    The distribution of every draw is known at `LEVELS` values of x around the quantile, five standard errors to either
    side, as a product of weights and counts by block; between two of them it is taken as straight.
    """
    ordered = np.sort(x)
    reach = 5.0 * np.sqrt(p * (1.0 - p) * blocks.length / blocks.n) + 2.0 / blocks.n
    around = np.clip(p + reach * np.linspace(-1.0, 1.0, LEVELS), 0.0, 1.0)
    value = np.unique(ordered[np.rint(around * (blocks.n - 1)).astype(np.int64)])
    bin_of = np.searchsorted(value, x)  # the first value that is not below x
    size = len(value) + 1
    counts = np.bincount(blocks.of_step * size + bin_of, minlength=blocks.count * size)
    below = np.cumsum(counts.reshape(blocks.count, size), axis=1)[:, :-1].astype(np.float64)
    steps = blocks.weight @ np.bincount(blocks.of_step, minlength=blocks.count)
    share = (blocks.weight @ below) / steps[:, None]  # [B, values], rising
    above = np.minimum((share < p).sum(1), len(value) - 1)
    under = np.maximum(above - 1, 0)
    rows = np.arange(len(share))
    rise = share[rows, above] - share[rows, under]
    part = np.where(rise > 0.0, (p - share[rows, under]) / np.where(rise > 0.0, rise, 1.0), 1.0)
    return value[under] + np.clip(part, 0.0, 1.0) * (value[above] - value[under])
