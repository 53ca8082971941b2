"""Alignment by edit distance, which knows the tokens' strings and not where they stand (MinED, the FuseLLM line).

    cost[i, j] = distance(student[i], teacher[j]) + min(cost[i-1, j-1], cost[i-1, j], cost[i, j-1])

is dynamic time warping, of which the cheapest path says who belongs to whom: N * M steps.  Along a row it unrolls to

    cost[i, j] = s_j + min over k <= j of (min(cost[i-1, k-1], cost[i-1, k]) - s_(k-1)),  s_j = sum of distances 0..j

which is a running sum and a running minimum.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def mined_align(student: Sequence[str], teacher: Sequence[str]) -> Tensor:
    """[N, 2] int64: first and last teacher token on the cheapest path; of equally cheap steps back the diagonal one.

    Memory: 4 bytes * N * M.  Raises: ValueError if either has no token.
    """
    if not student or not teacher:
        raise ValueError(
            f"mined_align: both must have a token, found {len(student)} of the student and {len(teacher)} of "
            "the teacher"
        )
    cost = _costs(_distances(student, teacher))
    i, j = len(student) - 1, len(teacher) - 1
    first, last = [0] * len(student), [j] * len(student)
    while i or j:
        came = i, j
        if i and j and cost[i - 1, j - 1] <= min(cost[i - 1, j], cost[i, j - 1]):
            i, j = i - 1, j - 1
        elif i and (not j or cost[i - 1, j] <= cost[i, j - 1]):
            i -= 1
        else:
            j -= 1
        if i != came[0]:
            first[came[0]], last[i] = came[1], j
    return torch.tensor([first, last]).T.contiguous()


@lru_cache(1 << 20)
def edit_distance(a: str, b: str) -> int:
    """Characters inserted, deleted or replaced (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _distances(student: Sequence[str], teacher: Sequence[str]) -> np.ndarray:
    """[N, M] of every two tokens; strings that come again are compared once."""
    (mine, rows), (theirs, columns) = (np.unique(each, return_inverse=True) for each in (student, teacher))
    table = np.array([[edit_distance(a, b) for b in theirs.tolist()] for a in mine.tolist()], np.int32)
    return table[rows[:, None], columns]


def _costs(distances: np.ndarray) -> np.ndarray:
    """In the place of the distances."""
    cost = distances
    cost[0] = distances[0].cumsum(dtype=np.int32)
    for i in range(1, len(cost)):
        above = cost[i - 1].copy()
        above[1:] = np.minimum(above[1:], cost[i - 1, :-1])
        until = distances[i].cumsum(dtype=np.int32)
        cost[i] = until + np.minimum.accumulate(above - (until - distances[i]))
    return cost
