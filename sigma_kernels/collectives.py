"""Who is told when this rank came to a collective, began to wait for it, and went on: nobody, unless a program asks.

A program adds a function to OBSERVERS.  Without one a collective costs a test of an empty list.
"""

import time
from collections.abc import Callable
from types import TracebackType

# Called with what was exchanged, the `layer` of when it was begun, whether it was a gradient's, and three stamps of
# time.monotonic_ns: when what this rank gives was there, when it had nothing to do but wait, and when it went on.
Observer = Callable[[str, int, bool, int, int, int], None]
OBSERVERS: list[Observer] = []


class Where:
    """The layer that is computed, which a program may set; -1: none of its layers."""

    layer = -1


def told(what: str, layer: int, is_backward: bool, arrived_ns: int, waits_ns: int) -> None:
    """It is over now."""
    ended_ns = time.monotonic_ns()
    for tell in OBSERVERS:
        tell(what, layer, is_backward, arrived_ns, waits_ns, ended_ns)


class observed:
    """`with observed("norm"):` around a collective that this rank waits for from its begin to its end."""

    __slots__ = ("_began_ns", "_layer", "_what")

    def __init__(self, what: str, layer: int = -1) -> None:
        self._what, self._layer = what, layer

    def __enter__(self) -> None:
        self._began_ns = time.monotonic_ns() if OBSERVERS else 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._began_ns and kind is None:
            told(self._what, self._layer, False, self._began_ns, self._began_ns)
