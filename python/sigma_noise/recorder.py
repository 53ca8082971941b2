"""Stamps of what a process does, while it does it: two reads of a clock and one store of four integers each.

Rows lie in blocks that were made and touched beforehand.  A row in the midst of a step allocates nothing, unless a
step has more rows than a block.
"""

import gc
import time
from array import array
from struct import Struct
from typing import Any

import numpy as np

from sigma_noise.trace import Key, Series

BLOCK = 1 << 16  # rows: 2 MiB
MOST = 1 << 20  # rows: 32 MiB, after which they want to be written
ROW = Struct("4q")  # code, start_ns, end_ns, value
ROW_BYTES = ROW.size
store = ROW.pack_into  # one call: four stores into an array take 0.1 us longer, in a row of 0.5

now_ns = time.monotonic_ns


class Recorder:
    """Rows of one rank, until `taken`.

    Every (kind, name) has a code, given by `code` before the first row.  Not to be shared between threads, but for
    pauses of Python's garbage collector, which may come in any and have a block of their own.
    """

    def __init__(self, rank: int, block: int = BLOCK, most: int = MOST) -> None:
        self.rank, self.most = rank, most
        self._size = block * ROW_BYTES  # bytes, as places are
        self._names: list[tuple[str, str]] = []
        self._full: list[array[int]] = []
        self._rows, self._spare = self._fresh(), self._fresh()
        self._at = 0
        self._pauses = array("q")
        self._pause_ns = 0

    def code(self, kind: str, name: str) -> int:
        self._names.append((kind, name))
        return len(self._names) - 1

    def add(self, code: int, start_ns: int, end_ns: int, value: int = 1) -> None:
        """One row; `value` up to 2**53."""
        at = self._at
        if at == self._size:
            at = self._turn_over()
        store(self._rows, at, code, start_ns, end_ns, value)
        self._at = at + ROW_BYTES

    @property
    def is_full(self) -> bool:
        """Whether the rows are as many as are to be held; no row is refused for that."""
        return len(self) >= self.most

    def __len__(self) -> int:
        return (len(self._full) * self._size + self._at) // ROW_BYTES

    def make_room(self) -> None:
        """Between steps, so that a block that fills up in one finds the next one ready."""
        if self._spare is None:
            self._spare = self._fresh()

    def taken(self) -> dict[Key, Series]:
        """All rows so far, which are then forgotten."""
        blocks = [np.frombuffer(rows, np.int64) for rows in self._full]
        blocks.append(np.frombuffer(self._rows, np.int64, self._at // 8))
        table = np.concatenate(blocks).reshape(-1, 4)
        if self._full:
            self._full = []
        self._at = 0
        found = {}
        order = np.lexsort((table[:, 1], table[:, 0]))
        cuts = np.flatnonzero(np.diff(table[order, 0])) + 1
        for rows in np.split(table[order], cuts) if len(table) else []:
            kind, name = self._names[rows[0, 0]]
            found[self.rank, kind, name] = _series(rows[:, 1:])
        pauses, self._pauses = self._pauses, array("q")
        if len(pauses):
            found[self.rank, "event", "gc"] = _series(np.array(pauses, np.int64).reshape(-1, 3))
        return found

    def watch_gc(self) -> None:
        """From here on a pause of Python's collector is an event "gc"; its value is the generation."""
        gc.callbacks.append(self._see_gc)

    def unwatch_gc(self) -> None:
        if self._see_gc in gc.callbacks:
            gc.callbacks.remove(self._see_gc)

    def _see_gc(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._pause_ns = now_ns()
        elif self._pause_ns:
            self._pauses.extend((self._pause_ns, now_ns(), info["generation"]))

    def _turn_over(self) -> int:
        self._full.append(self._rows)
        self._rows, self._spare = self._spare or self._fresh(), None
        self._at = 0
        return 0

    def _fresh(self) -> "array[int]":
        return array("q", bytes(self._size))  # written, so that its pages are there


def _series(rows: Any) -> Series:
    return Series(rows[:, 0].copy(), rows[:, 1].copy(), rows[:, 2].astype(np.float64))
