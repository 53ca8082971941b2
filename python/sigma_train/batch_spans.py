"""Where in a split's text the targets of a batch stand, in bytes of UTF-8 and in characters.

Positions are of the text of all documents, one after the other, as in a file of `sigma teacher cache`.  A token that is
part of a character has all of it, as offsets of fast tokenizers do; the end of a document has nothing of the text.
"""

import numpy as np
import torch
from torch import Tensor

from sigma_train.dataset import TokenDataset
from sigma_train.tokenizer import Tokenizer

STRIDE = 1 << 12  # tokens from one kept sum to the next
CHUNK = 1 << 8  # of these that are widened at once


class SplitSpans:
    """Of a split's tokens; one pass over them when it is made, then 16 bytes are held for each `STRIDE`."""

    def __init__(self, data: TokenDataset, tokenizer: Tokenizer) -> None:
        """Raises: ValueError if the split's tokens are another tokenizer's."""
        if not np.array_equal(data.token_bytes, tokenizer.token_bytes):
            raise ValueError(
                "SplitSpans: tokenizer must be that of the split, found another's tokens in data"
            )
        self.data = data
        is_inside = [[byte in INSIDE for byte in piece] for piece in tokenizer.pieces]
        self._begins_inside = np.array([own[:1] == [True] for own in is_inside], np.int64)  # [vocabulary]
        characters = [own.count(False) for own in is_inside]  # that begin in a token
        self._sizes = np.stack([tokenizer.token_bytes, characters], axis=1)  # [vocabulary, 2]
        sums = [np.zeros((1, 2), np.int64)]
        for first in range(0, data.num_tokens, CHUNK * STRIDE):
            sizes = self._sizes[data.tokens[first : first + CHUNK * STRIDE]]
            sums.append(np.add.reduceat(sizes, np.arange(0, len(sizes), STRIDE), axis=0))
        self._before = np.concatenate(sums).cumsum(0)  # bytes and characters before each STRIDE

    def of_rows(self, first: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        """Bytes and characters, int64 [rows, length, 2] both, half open, of `length` tokens from each `first` on."""
        found = np.array([self._of_row(place, length) for place in first.tolist()]).reshape(-1, 2, length, 2)
        of_bytes, characters = torch.from_numpy(found).unbind(1)
        return of_bytes.contiguous(), characters.contiguous()

    def _of_row(self, first: int, length: int) -> np.ndarray:
        tokens = self.data.tokens[first // STRIDE * STRIDE : first + length]
        sizes = self._sizes[tokens]
        ends = (self._before[first // STRIDE] + sizes.cumsum(0))[-length:]
        begins = ends - sizes[-length:]
        begins[:, 1] -= self._begins_inside[tokens[-length:]]
        return np.stack([begins, ends], axis=2).transpose(1, 0, 2)


def batch_spans(
    spans: SplitSpans,
    step: int,
    batch_size: int,
    seq_len: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Bytes and characters of each target of `TokenDataset.batch`, int64 [batch_size, seq_len, 2] both, half open."""
    places = spans.data.target_places(step, batch_size, seq_len, seed, rank, world_size)
    return spans.of_rows(places[:, 0].numpy(), seq_len)


def _inside() -> frozenset[str]:
    """How a byte-level vocabulary writes the bytes of UTF-8 that begin no character, 0x80 to 0xBF.

    It writes a byte as the character of that number where that can be seen, the others as those from 256 on.
    """
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in seen]
    return frozenset(chr(b if b in seen else 256 + others.index(b)) for b in range(0x80, 0xC0))


INSIDE = _inside()
