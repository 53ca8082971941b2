"""Whether memory holds what is written into it."""

from collections.abc import Iterator

import torch
from torch import Tensor

WORD = 64  # bits, and words of a row of the walking patterns
PHASES = range(0, WORD, 8)
ODD = -7046029254386353131  # 0x9E3779B97F4A7C15: a multiple of it for each place, no two alike


def patterns(words: int, device: str) -> Iterator[tuple[str, Tensor]]:
    """Names and contents [words / 64, 64] int64 to be written and found again.

    A one walks through zeros from word to word, then a zero through ones: each bit is seen in both states, beside
    neighbours in the other; eight phases, so that it stands in eight places of each word.  The last is of each word's
    own place, which finds addresses that fall together.
    """
    word = torch.arange(WORD, dtype=torch.int64, device=device)
    rows = words // WORD
    for phase in PHASES:
        one = torch.bitwise_left_shift(torch.ones_like(word), (word + phase) % WORD)
        yield f"a walking one, phase {phase}", one.expand(rows, WORD)
        yield f"a walking zero, phase {phase}", one.bitwise_not().expand(rows, WORD)
    yield "its own address", (torch.arange(rows * WORD, device=device) * ODD).view(rows, WORD)


def failing_bits(num_bytes: int, device: str = "cpu") -> str | None:
    """Write each pattern over so much memory, then read all of it: the first word that did not hold, if any."""
    rows = num_bytes // (8 * WORD)
    memory = torch.empty(rows, WORD, dtype=torch.int64, device=device)
    for name, content in patterns(rows * WORD, device):
        memory.copy_(content)
        if not torch.equal(memory, content):
            place = int((memory != content).flatten().nonzero()[0])
            found, want = int(memory.view(-1)[place]), int(content.reshape(-1)[place])
            bits = [bit for bit in range(WORD) if (found ^ want) >> bit & 1]
            return f"with {name}, bits {bits} of the word at byte {8 * place} did not hold"
    return None
