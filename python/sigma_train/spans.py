"""Byte spans of tokens: [N, 2] int64, half open, in the order of the text.

Bytes, since a token of a byte-level vocabulary may end within a character, and tokens of all kinds end between bytes.
"""

from collections.abc import Sequence

import numpy as np


class OffsetError(ValueError):
    """A tokenizer's offsets cannot be laid over the text; the message goes after its name."""


def spans_of_lengths(lengths: np.ndarray, first: int = 0) -> np.ndarray:
    """Of tokens that follow each other without a gap, the first beginning at byte `first`; lengths [N]."""
    ends = first + np.cumsum(lengths, dtype=np.int64)
    return np.stack([ends - lengths, ends], axis=1)


def spans_of_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Of a fast tokenizer's character offsets, made to leave no byte out.

    Several tokens of one character share its bytes.  What lies between two tokens, as a normaliser or the trimming of
    offsets leaves it, goes to them: from its first white space on to the token that follows, for " there" is trimmed
    to "there"; what is before that, an accent say, to the token it follows, or to all that end there as parts of one
    character.
    Raises: OffsetError if begins or ends fall or lie outside the text.
    """
    if not len(offsets):
        return np.empty((0, 2), np.int64)
    characters = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    begins, ends = characters.T
    if begins.min() < 0 or ends.max() > len(text) or (begins > ends).any():
        raise OffsetError(f"gives offsets outside of the text's {len(text)} characters")
    if (np.diff(begins) < 0).any() or (np.diff(ends) < 0).any():
        at = int(np.flatnonzero((np.diff(begins) < 0) | (np.diff(ends) < 0))[0]) + 1
        raise OffsetError(
            f"gives offsets that fall, {offsets[at]} after {offsets[at - 1]} at token {at}: its normaliser moves text"
        )
    return byte_starts(text)[_without_gaps(text, characters)]


def byte_starts(text: str) -> np.ndarray:
    """[characters + 1] int64: the byte at which each character begins in UTF-8, and the end of the text."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    lengths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _without_gaps(text: str, offsets: np.ndarray) -> np.ndarray:
    out, ends = offsets.copy(), offsets[:, 1]
    out[0, 0] = 0
    out[ends == ends[-1], 1] = len(text)
    for at in np.flatnonzero(offsets[1:, 0] > ends[:-1]):
        begin, end = ends[at], offsets[at + 1, 0]
        cut = next((i for i in range(begin, end) if text[i].isspace()), end)
        out[np.searchsorted(ends, begin) : at + 1, 1] = out[at + 1, 0] = cut
    return out
