"""A million student tokens laid over the tokens of a teacher, and the teacher's losses gathered for them."""

from bisect import bisect_left, bisect_right

import numpy as np
import pytest
import torch
from sigma_train.alignment import align_spans
from sigma_train.spans import spans_of_lengths
from sigma_train.teacher_loss import aggregate_teacher_loss
from torch import Tensor

TOKENS = 1_000_000


def spans(tokens: int, mean: int, seed: int) -> Tensor:
    lengths = np.random.default_rng(seed).integers(1, 2 * mean, tokens)
    return torch.from_numpy(spans_of_lengths(lengths))


def by_bisection(student: list[list[int]], teacher: list[list[int]]) -> Tensor:
    """The published pseudocode as it stands."""
    begins, ends = zip(*teacher, strict=True)
    found = []
    for a, b in student:
        first, last = bisect_right(ends, a), bisect_left(begins, b) - 1
        found.append((first, last) if first <= last else (-1, -1))
    return torch.tensor(found)


@pytest.fixture
def texts(pytestconfig) -> tuple[Tensor, Tensor]:
    """Student tokens of four bytes and teacher tokens of five, over the same bytes or nearly."""
    tokens = TOKENS // 100 if pytestconfig.getoption("--tiny") else TOKENS
    return spans(tokens, 4, 0), spans(tokens * 4 // 5, 5, 1)


def test_align(race, device, texts):
    if device.type != "cpu":
        pytest.skip("alignment is the host's")
    student, teacher = texts
    lists, want = (student.tolist(), teacher.tolist()), align_spans(student, teacher)

    def check(who: str, ranges: Tensor) -> None:
        assert torch.equal(ranges, want), who

    race(
        "align_spans",
        lambda: align_spans(student, teacher),
        shape=f"{len(student):,} tokens over {len(teacher):,}",
        check=check,
        limits={"bisection": 3},
        bisection=lambda: by_bisection(*lists),
    )


@pytest.mark.parametrize("how", ["max", "mean"])
def test_aggregate(race, device, texts, how):
    if device.type != "cpu":
        pytest.skip("alignment is the host's")
    student, teacher = texts
    loss = torch.rand(len(teacher), generator=torch.Generator().manual_seed(0))
    ranges = align_spans(student, teacher)
    shape = f"{len(student):,} tokens over {len(teacher):,}"
    race(f"aggregate_teacher_loss/{how}", lambda: aggregate_teacher_loss(loss, ranges, how), shape=shape)
