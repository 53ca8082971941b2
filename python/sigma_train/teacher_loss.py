"""Tokens chosen by how much better a teacher of another vocabulary does on them (VocAgnoLM, arXiv 2503.19123).

    t_i = aggregate of the teacher's losses l_t[first..last] of the tokens that cover student token i
    gap_i = l_s[i] - t_i, without a gradient;  kept are the mapped tokens of the highest gaps
    L = sum(w l_s) / sum(w),  w = 1 for what is kept, and for what is unmapped where that is included

All the teacher gives is one number for each of its own tokens.  With the aggregate bytes, which is no part of the
paper, t_i is what the teacher loses a byte over these tokens, times the bytes of student token i: what is compared is
as long on both sides, however long the tokens are.
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from sigma_train.alignment import UNMAPPED
from sigma_train.kinds import Aggregate
from sigma_train.selection import Selection, weighted_mean


def aggregate_teacher_loss(
    loss: Tensor, ranges: Tensor, how: Aggregate = "max", share: Tensor | None = None
) -> Tensor:
    """[N] of loss's dtype: one number of each range of teacher tokens.

    NaN where a range is unmapped, or a token that counts is NaN, since it had no context.  Ranges are many, and
    overlap: sums are differences of sums from the start, in f64; the largest is that of two halves that overlap.
    Args: loss [M]; ranges [N, 2] as `align_spans` gives them; share [N] of `byte_share`, with how = bytes alone.
    Raises: ValueError if `how` is none of the five, or loss, ranges or share cannot be.
    """
    if how not in get_args(Aggregate):
        raise ValueError(f"aggregate_teacher_loss: how must be max, mean, sum, first or bytes, found {how!r}")
    if (how == "bytes") != (share is not None) or (share is not None and share.shape != ranges.shape[:1]):
        found = "none" if share is None else f"one of {list(share.shape)} for {len(ranges)} ranges"
        raise ValueError(
            f"aggregate_teacher_loss: share must be [N] with how = bytes and none with others, found {found} with {how}"
        )
    if loss.dim() != 1 or not loss.is_floating_point() or ranges.shape[1:] != (2,):
        raise ValueError(
            "aggregate_teacher_loss: loss must be floating-point of shape [M], ranges of shape [N, 2], found "
            f"{loss.dtype} {list(loss.shape)} and {list(ranges.shape)}"
        )
    is_mapped = ranges[:, 0] != UNMAPPED
    first, last = ranges[is_mapped].unbind(1)
    if len(wrong := ((first < 0) | (last < first) | (last >= len(loss))).nonzero()):
        raise ValueError(
            f"aggregate_teacher_loss: ranges must lie in 0..{len(loss) - 1}, the first not after the last, found "
            f"{ranges[is_mapped][wrong[0, 0]].tolist()}"
        )
    out = loss.new_full((len(ranges),), torch.nan)
    if how == "max":
        out[is_mapped] = _largest(loss, first, last)
    elif how == "first":
        out[is_mapped] = loss[first]
    else:
        total = _total(loss, first, last)
        if how == "mean":
            total /= last - first + 1
        elif share is not None:
            total *= share[is_mapped]
        out[is_mapped] = total.to(loss.dtype)
    return out


def _total(loss: Tensor, first: Tensor, last: Tensor) -> Tensor:
    is_nan = loss.isnan()
    sums = _from_start(loss.masked_fill(is_nan, 0).double())
    nans = _from_start(is_nan.long())
    total = sums[last + 1] - sums[first]
    return total.masked_fill(nans[last + 1] > nans[first], torch.nan)


def _from_start(x: Tensor) -> Tensor:
    """[M + 1]: the sum of the first i."""
    return torch.cat([x.new_zeros(1), x.cumsum(0)])


def _largest(loss: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Row k of the table holds the largest of 2^k neighbours; no more rows than the longest range needs."""
    out = loss.new_empty(len(first))
    length = last - first + 1
    row, size = loss, 1
    while len(left := ((length >= size) & (length < 2 * size)).nonzero()[:, 0]) or (length >= 2 * size).any():
        out[left] = torch.maximum(row[first[left]], row[last[left] - size + 1])
        row = torch.maximum(row[:-size], row[size:])
        size *= 2
    return out


@dataclass(frozen=True)
class TeacherGuidedLoss(Selection):
    """The loss of a batch whose teacher losses are at hand, for a training loop of one's own."""

    aggregate: Aggregate = "max"

    def __call__(
        self, student: Tensor, teacher: Tensor, ranges: Tensor, share: Tensor | None = None
    ) -> Tensor:
        """Args: student [B, S] or [S] with a gradient, teacher [M], ranges [B * S, 2] of their tokens; with aggregate =
        bytes their share [B * S] of `byte_share`.
        """
        if student.dim() not in (1, 2) or len(ranges) != student.numel():
            raise ValueError(
                "TeacherGuidedLoss: student must be [S] or [B, S] with a range for each token, found "
                f"{list(student.shape)} and {len(ranges)} ranges"
            )
        rows = student if student.dim() == 2 else student[None]
        target = aggregate_teacher_loss(teacher.detach(), ranges, self.aggregate, share).view(rows.shape)
        return weighted_mean(rows, self.weights(*gap(rows, target)))


def gap(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Student's loss less the teacher's, without a gradient, and where there is one."""
    return student.detach() - target, ~target.isnan()
