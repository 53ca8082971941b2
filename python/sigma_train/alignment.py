"""Which teacher tokens cover a student token: two tokenisations of one text, laid over each other by their spans.

A span is half open, [begin, end), in bytes of the text.  Student token [a, b) is mapped to all teacher tokens that
share a byte with it, which lie side by side (VocAgnoLM, arXiv 2503.19123, algorithm 1):

    first = the first with end > a,  last = the last with begin < b

Two binary searches a token: N log M comparisons.  What `alignment_ios` says of the answer is 1 wherever the teacher's
tokens leave no byte of the text out; the other alignments here are those it is compared with.
"""

import torch
from torch import Tensor

UNMAPPED = -1


def align_spans(student: Tensor, teacher: Tensor) -> Tensor:
    """[N, 2] int64: first and last teacher token of each student token, -1 where there is none.

    Args: student [N, 2], teacher [M, 2], integers.  An empty student span, as special tokens have, is unmapped;
    an empty teacher span inside of a student token is one of those that it is mapped to.
    Raises: ValueError if begins or ends of the teacher's spans fall: special tokens are no part of them.
    """
    a, b = _columns("student", student)
    begins, ends = _columns("teacher", teacher)
    for name, column in (("begins", begins), ("ends", ends)):
        if len(falls := (column[1:] < column[:-1]).nonzero()):
            at = int(falls[0]) + 1
            raise ValueError(
                f"align_spans: {name} of teacher spans must not fall, found {teacher[at].tolist()} after "
                f"{teacher[at - 1].tolist()} at token {at}; leave special tokens out"
            )
    first = torch.searchsorted(ends, a, right=True)
    last = torch.searchsorted(begins, b) - 1
    ranges = torch.stack([first, last], dim=1)
    return ranges.masked_fill(((a >= b) | (first > last))[:, None], UNMAPPED)


def chunk_align(num_student: int, num_teacher: int, chunks: int) -> Tensor:
    """[N, 2]: both sequences cut into as many chunks of equal count, the i-th of one mapped to the i-th of the other.

    It knows nothing of the text, so the finer the chunks the less of a token is in its own.
    """
    if chunks not in range(1, min(num_student, num_teacher) + 1):
        raise ValueError(
            f"chunk_align: chunks must be an integer from 1 to {min(num_student, num_teacher)}, "
            f"as there are {num_student} and {num_teacher} tokens, found {chunks}"
        )
    chunk = torch.arange(num_student) * chunks // num_student
    first = -(chunk * num_teacher // -chunks)  # the first j with j * chunks // M >= chunk
    last = -((chunk + 1) * num_teacher // -chunks) - 1
    return torch.stack([first, last], dim=1)


def alignment_ios(student: Tensor, teacher: Tensor, ranges: Tensor) -> Tensor:
    """[N] f64: the share of a student token that its teacher tokens cover, NaN where it is unmapped."""
    shared, _ = _overlap(student, teacher, ranges)
    return shared / (student[:, 1] - student[:, 0])


def alignment_iou(student: Tensor, teacher: Tensor, ranges: Tensor) -> Tensor:
    """[N] f64: bytes that a student token shares with its teacher tokens, over all bytes of either; NaN if unmapped."""
    shared, covered = _overlap(student, teacher, ranges)
    return shared / (student[:, 1] - student[:, 0] + covered - shared)


def byte_share(student: Tensor, teacher: Tensor, ranges: Tensor) -> Tensor:
    """[N] f64: bytes of a student token over those of its teacher tokens together, NaN where it is unmapped."""
    _, covered = _overlap(student, teacher, ranges)
    return (student[:, 1] - student[:, 0]) / covered


def _columns(name: str, spans: Tensor) -> tuple[Tensor, Tensor]:
    if spans.dim() != 2 or spans.shape[1] != 2 or spans.is_floating_point():
        raise ValueError(
            f"align_spans: {name} must be integers of shape [N, 2], found {spans.dtype} {list(spans.shape)}"
        )
    return spans[:, 0].contiguous(), spans[:, 1].contiguous()


def _overlap(student: Tensor, teacher: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes of each student token that its teacher tokens cover, and bytes of these, which lie side by side."""
    is_mapped = ranges[:, 0] != UNMAPPED
    first, last = ranges.clamp(min=0).unbind(1)
    begin, end = teacher[first, 0], teacher[last, 1]
    shared = (torch.minimum(end, student[:, 1]) - torch.maximum(begin, student[:, 0])).clamp(min=0)
    nothing = torch.full((), torch.nan, dtype=torch.float64)
    return torch.where(is_mapped, shared.double(), nothing), torch.where(
        is_mapped, (end - begin).double(), nothing
    )
