"""A text that is longer than a model's context, cut so that each token is predicted once and never with little before.

Windows overlap: but for the first, which begins where the text does, the first predictions of each are thrown away.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Window(NamedTuple):
    """The model reads tokens begin..end-1 and predicts begin+1..end, of which those from `first` on are taken."""

    begin: int
    end: int
    first: int


def windows(tokens: int, context: int, overlap: int) -> Iterator[Window]:
    """Of tokens 0..tokens-1 each but the first is predicted in one window, from all before it or more than `overlap`.

    The last window begins early enough to be full.  0 <= overlap < context.
    """
    done, last = 0, tokens - 1
    while done < last:
        begin = max(0, min(done - overlap, last - context))
        end = min(begin + context, last)
        yield Window(begin, end, done + 1)
        done = end
