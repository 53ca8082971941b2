"""What a teacher loses on each of its tokens of a text, in nats, and how sure it was there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_train.context_windows import Window, windows
from sigma_train.errors import WrongInput
from sigma_train.teacher import Teacher


@dataclass(frozen=True)
class Reading:
    """How a teacher reads: at most `context` tokens at once, all but `overlap` of them new, so many in one call."""

    context: int
    overlap: int
    batch_tokens: int
    top: int = 0  # highest probabilities that are kept


class Read(NamedTuple):
    """Of a text: loss [tokens] f32, NaN for a first token that nothing stands before; top [tokens, top] f16.

    The latter are the highest probabilities of what was expected there, falling, and zero where nothing was.
    """

    loss: np.ndarray
    top: np.ndarray


@torch.no_grad()
def read_texts(teacher: Teacher, texts: Sequence[list[int]], reading: Reading) -> list[Read]:
    """Raises: WrongInput if a loss is no finite number."""
    sequences = [np.array([*teacher.prefix, *ids], dtype=np.int64) for ids in texts]
    found = [
        Read(np.full(len(each), np.nan, np.float32), np.zeros((len(each), reading.top), np.float16))
        for each in sequences
    ]
    for batch in _batches(sequences, reading):
        length = batch[0][1].end - batch[0][1].begin  # the longest
        rows = np.zeros((len(batch), length + 1), np.int64)  # what is filled up comes after all that counts
        for row, (text, w) in zip(rows, batch, strict=True):
            row[: w.end - w.begin + 1] = sequences[text][w.begin : w.end + 1]
        tokens = torch.from_numpy(rows)
        logits = teacher.logits(tokens[:, :-1]).float()
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        highest = _highest(logits, reading.top)
        for row, top, (text, w) in zip(nats.view(len(batch), length).numpy(), highest, batch, strict=True):
            new = slice(w.first - w.begin - 1, w.end - w.begin)
            taken = row[new]
            if not np.isfinite(taken).all():  # NaN would be taken for a token without context, and kept
                raise WrongInput(
                    "--teacher: its loss of a token must be a finite number, found "
                    f"{taken[~np.isfinite(taken)][0]}: it has diverged or is damaged"
                )
            found[text].loss[w.first : w.end + 1] = taken
            found[text].top[w.first : w.end + 1] = top[new]
    first = len(teacher.prefix)
    return [Read(each.loss[first:], each.top[first:]) for each in found]


def _highest(logits: Tensor, count: int) -> np.ndarray:
    """[B, S, count] f16."""
    probabilities = logits.softmax(-1) if count else logits
    return probabilities.topk(count).values.half().numpy()


def _batches(sequences: Sequence[np.ndarray], reading: Reading) -> Iterator[list[tuple[int, Window]]]:
    """Windows of all texts, long ones together, so that few rows are filled up."""
    all_ = [
        (i, w) for i, s in enumerate(sequences) for w in windows(len(s), reading.context, reading.overlap)
    ]
    all_.sort(key=lambda each: each[1].begin - each[1].end)
    while all_:
        longest = all_[0][1].end - all_[0][1].begin
        rows = max(1, reading.batch_tokens // longest)
        yield all_[:rows]
        all_ = all_[rows:]
