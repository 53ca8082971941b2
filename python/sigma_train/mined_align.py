"""Alignment by edit distance, which knows the tokens' strings and not where they stand (MinED, the FuseLLM line).

    cost[i, j] = distance(student[i], teacher[j]) + min(cost[i-1, j-1], cost[i-1, j], cost[i, j-1])

is dynamic time warping, of which the cheapest path says who belongs to whom.  N * M steps, each with an edit distance
of its own: a thing to compare with, not one to train by.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def mined_align(student: Sequence[str], teacher: Sequence[str]) -> Tensor:
    """[N, 2] int64: first and last teacher token on the cheapest path; of equally cheap steps back the diagonal one.

    Raises: ValueError if either has no token.
    """
    if not student or not teacher:
        raise ValueError(
            f"mined_align: both must have a token, found {len(student)} of the student and {len(teacher)} of "
            "the teacher"
        )
    distance = cache(edit_distance)
    cost = [[0] * len(teacher) for _ in student]
    for i, mine in enumerate(student):
        for j, theirs in enumerate(teacher):
            before = [cost[p][q] for p, q in _before(i, j)]
            cost[i][j] = distance(mine, theirs) + min(before, default=0)
    ranges = torch.full((len(student), 2), -1)
    i, j = len(student) - 1, len(teacher) - 1
    ranges[i, 1] = j
    while before := _before(i, j):
        p, q = min(before, key=lambda place: cost[place[0]][place[1]])
        if p != i:
            ranges[i, 0], ranges[p, 1] = j, q
        i, j = p, q
    ranges[0, 0] = 0
    return ranges


def edit_distance(a: str, b: str) -> int:
    """Characters inserted, deleted or replaced (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def _before(i: int, j: int) -> list[tuple[int, int]]:
    """The steps that lead here, the diagonal first."""
    return [(p, q) for p, q in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if p >= 0 and q >= 0]
