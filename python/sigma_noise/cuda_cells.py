"""Chunks of work that ended in cells of a grid of absolute times, counted where their stamps are."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sigma_noise.loops import Calibration, FixedTimeInfo

Ints = NDArray[np.int64]


def counted(ends_ns: Tensor, first: int, last: int, quantum_ns: int) -> tuple[Ints, Ints]:
    """Of stamps [B, n] that rise: how many lie in each of the cells `first` to `last`, the end excluded, and ns from
    the end of each to the first stamp after it, which is of no cell whose end lies beyond the stamps; [B, cells].

    Cell c is c * quantum_ns to (c + 1) * quantum_ns; a chunk that ends on the boundary is of the cell that begins.
    """
    edges = quantum_ns * torch.arange(first, last + 1, device=ends_ns.device)
    edges = edges.repeat(len(ends_ns), 1)
    at = torch.searchsorted(ends_ns.contiguous(), edges)
    after = at[:, 1:].clamp(max=ends_ns.shape[1] - 1)
    late = ends_ns.gather(1, after) - edges[:, 1:]
    return at.diff(dim=1).cpu().numpy(), late.cpu().numpy()


def cells_within(begin_ns: int, end_ns: int, quantum_ns: int) -> tuple[int, int]:
    """First and last, the latter excluded, of the cells that lie within."""
    first = -(-begin_ns // quantum_ns)
    return first, max(first, end_ns // quantum_ns)


def info_of(chunk: Calibration, count: Ints, late_ns: Ints) -> FixedTimeInfo:
    """Of the cells that are kept; 0 of none."""
    late_s = late_ns * 1e-9 if len(late_ns) else np.zeros(1)
    skipped = int(np.count_nonzero(count == 0))
    return FixedTimeInfo(chunk, skipped, float(np.median(late_s)), float(late_s.max()))
