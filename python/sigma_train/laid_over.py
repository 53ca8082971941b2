"""A teacher's tokens of each of a split's tokens: those of the same bytes, or as what that is compared with has it.

    span    the teacher's tokens that share a byte (VocAgnoLM, algorithm 1)
    index   the i-th of a piece, and none where the teacher has fewer (how ULD pairs positions, arXiv 2402.12030)
    chunk   a piece of either cut into chunks of equal count, the i-th of one and of the other
    edit    the cheapest path of edit distances between the tokens' strings (MinED)

The last three know nothing of bytes but where a piece begins: a document, or 2,048 student tokens of a longer one.  The
teacher's tokens of a piece are those that begin in it; of one that ends beyond it `edit` sees the part within.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from sigma_train.alignment import UNMAPPED, align_spans, chunk_align
from sigma_train.dataset import TokenDataset
from sigma_train.kinds import Alignment
from sigma_train.mined_align import edit_distance, mined_align
from sigma_train.spans import spans_of_lengths

BLOCK = 1 << 18  # student tokens that are laid over by their bytes at once
PIECE = 1 << 11  # and of which edit distances fill a table


@dataclass(frozen=True)
class Aligned:
    """chunks: in a piece, for kind = chunk; strings: of the student's vocabulary, a character a byte, for edit."""

    kind: Alignment = "span"
    chunks: int = 16
    strings: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raises: ValueError."""
        if self.kind not in get_args(Alignment):
            raise ValueError(f"Aligned: kind must be {', '.join(get_args(Alignment))}, found {self.kind!r}")
        if self.kind == "edit" and not self.strings:
            raise ValueError("Aligned: kind = edit must have strings of the student's vocabulary, found none")
        if self.chunks < 1:
            raise ValueError(f"Aligned: chunks must be at least 1, found {self.chunks}")

    def over(
        self, dataset: TokenDataset, begins: Tensor, ends: Tensor
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Student tokens in their order, some at a time, and teacher tokens, and which of these are whose.

        Args: begins, ends [M] of the teacher's tokens, bytes of the split's text.
        Yields: both slices, and [n, 2] int64: the first and last of the teacher's slice for each, -1 without.
        """
        at = 0
        try:
            for block in self._blocks(dataset):
                tokens = dataset.tokens[block]
                student = torch.from_numpy(spans_of_lengths(dataset.token_bytes[tokens], at))
                until = int(student[-1, 1])
                hi = int(torch.searchsorted(begins, until))
                if self.kind == "span":  # a token that begins before this block may reach into it
                    lo = int(torch.searchsorted(ends, at, right=True))
                    ranges = align_spans(student, _spans(begins, ends, lo, hi))
                else:
                    lo = int(torch.searchsorted(begins, at))
                    ranges = self._of_piece(tokens, student, _spans(begins, ends, lo, hi))
                yield block, slice(lo, hi), ranges
                at = until
        finally:  # also where only the first are wanted
            edit_distance.cache_clear()

    def _blocks(self, dataset: TokenDataset) -> Iterator[slice]:
        size = BLOCK if self.kind == "span" else PIECE
        ends = [dataset.num_tokens]
        if self.kind != "span":
            ends = [*(_document_ends(dataset) + 1).tolist(), dataset.num_tokens]
        first = 0
        for end in ends:
            while first < end:
                yield slice(first, min(first + size, end))
                first = min(first + size, end)

    def _of_piece(self, tokens: np.ndarray, student: Tensor, teacher: Tensor) -> Tensor:
        """Ends of documents have no partner, as they have no bytes."""
        ranges = torch.full((len(tokens), 2), UNMAPPED)
        has_bytes = student[:, 0] < student[:, 1]
        own = (teacher[:, 0] < teacher[:, 1]).nonzero()[:, 0]
        teacher = teacher[own]
        n, m = int(has_bytes.sum()), len(teacher)
        if not n or not m:
            return ranges
        if self.kind == "index":
            place = torch.arange(n)
            found = torch.where(place < m, place, UNMAPPED)[:, None].expand(n, 2)
        elif self.kind == "chunk":
            found = chunk_align(n, m, min(self.chunks, n, m))
        else:
            mine = [self.strings[token] for token in tokens[has_bytes.numpy()]]
            text, start = "".join(mine), int(student[0, 0])
            found = mined_align(mine, [text[begin:end] for begin, end in (teacher - start).tolist()])
        ranges[has_bytes] = torch.where(found == UNMAPPED, UNMAPPED, own[found])
        return ranges


def _spans(begins: Tensor, ends: Tensor, lo: int, hi: int) -> Tensor:
    return torch.stack([begins[lo:hi], ends[lo:hi]], dim=1)


def _document_ends(dataset: TokenDataset) -> np.ndarray:
    """Where the tokens of no byte stand, of a split that may be larger than memory."""
    is_end = dataset.token_bytes == 0
    found = [
        first + np.flatnonzero(is_end[dataset.tokens[first : first + BLOCK]])
        for first in range(0, dataset.num_tokens, BLOCK)
    ]
    return np.concatenate(found)
