"""Rows as an importer reads them, 24 bytes each, and where in a file it was when something was wrong."""

import contextlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sigma_train.errors import WrongInput

from sigma_noise.trace import Key, Series

MAX_NAMES = 10_000  # of one file; more are numbers or addresses that got into names
MAX_RANK = 2**31 - 1


class Rows:
    """Columns that grow, by rank, kind and name."""

    def __init__(self) -> None:
        self._columns: dict[Key, tuple[array[int], array[int], array[float]]] = {}

    def __len__(self) -> int:
        return sum(len(start) for start, _, _ in self._columns.values())

    def add(self, key: Key, start_ns: int, end_ns: int, value: float) -> None:
        """Raises: ValueError if it ends before it begins, a stamp has over 64 bits, or a name is none or too many."""
        if end_ns < start_ns:
            raise ValueError(f"a duration must not be negative, found {end_ns - start_ns} ns")
        if not -(2**63) <= start_ns <= end_ns < 2**63:
            raise ValueError(f"stamps must fit 64 bits of ns, found {start_ns} to {end_ns}")
        columns = self._columns.get(key)
        if columns is None:
            if not 0 <= key[0] <= MAX_RANK:
                raise ValueError(f"a rank must lie in 0..{MAX_RANK}, found {key[0]}")
            if not _is_text(key[2]):
                raise ValueError("a name must be text, found half a surrogate pair in it")
            if len(self._columns) == MAX_NAMES:
                raise ValueError(f"this is name number {MAX_NAMES + 1}; choose fewer of them")
            columns = self._columns[key] = array("q"), array("q"), array("d")
        for column, item in zip(columns, (start_ns, end_ns, value), strict=True):
            column.append(item)

    def names(self) -> list[Key]:
        return sorted(self._columns)

    def series(self) -> dict[Key, Series]:
        """In order of their begin; rows that begin together stay in the order of the file."""
        return {key: _sorted(*columns) for key, columns in self._columns.items()}


def _is_text(name: str) -> bool:
    """JSON can escape what UTF-8 has no bytes for."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sorted(start: "array[int]", end: "array[int]", value: "array[float]") -> Series:
    starts = np.frombuffer(start, np.int64)
    order = np.argsort(starts, kind="stable")
    return Series(starts[order], np.frombuffer(end, np.int64)[order], np.frombuffer(value)[order])


@contextlib.contextmanager
def in_file(path: Path) -> Iterator[None]:
    """A ValueError within becomes WrongInput that names the file."""
    try:
        yield
    except WrongInput:
        raise
    except ValueError as error:
        raise at(path, "", error) from None


def at(path: Path, place: str, error: ValueError) -> WrongInput:
    """The same in one sentence, with the file and the place in it."""
    where = f"{path}: {place}: " if place else f"{path}: "
    return WrongInput(f"{where}{' '.join(str(error).split())[:400]}")
