"""Files of text, packed by gzip or not, a line at a time."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from sigma_train.errors import WrongInput

HEAD = 1 << 16  # bytes that tell a format
LINE = 1 << 16  # characters: no tool writes longer lines of text
GZIP = b"\x1f\x8b"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """Undecodable bytes become U+FFFD.

    Raises: WrongInput if there is no such file, or it is packed and cut or damaged.
    """
    try:
        with open(path, "rb") as raw:
            packed = raw.peek(2)[:2] == GZIP
            unpacked = gzip.GzipFile(fileobj=raw) if packed else raw
            with io.TextIOWrapper(unpacked, encoding="utf-8", errors="replace") as text:
                yield text
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise WrongInput(f"{path}: its gzip stream is damaged or cut short: {error}") from None
    except (FileNotFoundError, IsADirectoryError) as error:
        raise WrongInput(f"{path}: {error.strerror}; import wants a file") from None


def head(path: Path) -> str:
    """The first characters of a file.  Raises: WrongInput as `opened`."""
    with opened(path) as file:
        return file.read(HEAD)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line with its number, from 1, without its end.

    Raises: WrongInput as `opened`, and if a line is binary or endless.
    """
    with opened(path) as file:
        number = 0
        while line := file.readline(LINE):
            number += 1
            if (len(line) == LINE and line[-1] != "\n") or "\0" in line:
                raise WrongInput(f"{path}: line {number}: this is no text, but binary")
            yield number, line.rstrip("\r\n")
