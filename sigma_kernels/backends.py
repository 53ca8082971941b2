"""Which implementation of an operation runs: a table, not ifs.

Each operation lists its backends in order of preference; the first that supports the call runs.  SIGMA_BACKEND=name
or `with backend(name)` forces one, and a forced backend that can't run the call raises with its reason.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

NAMES = ("triton", "cuda", "cpu", "reference")

_forced: str | None = None
_tables: dict[str, Sequence["Backend"]] = {}


@dataclass(frozen=True)
class Backend:
    """One row of an operation's table: an implementation and the calls it supports.

    A row that is `by_name` runs in float32 only where it is forced: the reference is a definition, not a stand-in.
    `missing` says why a row can't run at all in this installation.
    """

    name: str
    run: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...]
    device: str | None = None
    by_name: bool = False
    missing: str | None = None

    def obstacle(self, dtype: torch.dtype, device: str) -> str | None:
        """Why this row can't run such a call, or None if it can."""
        if self.missing:
            return self.missing
        if self.device not in (None, device):
            return f"it runs on {self.device}, the data lie on {device}"
        if dtype not in self.dtypes:
            return f"it takes {', '.join(map(_short, self.dtypes))}, not {_short(dtype)}"
        if self.by_name and dtype != torch.float64 and _forced != self.name:
            return "it runs only when named"
        return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def register_table(op: str, rows: Sequence[Backend]) -> Sequence[Backend]:
    """Enter an operation's rows where `backends()` finds them."""
    _tables[op] = rows
    _first.cache_clear()
    return rows


def select(op: str, data: Tensor) -> Callable[..., Any]:
    """The implementation that runs `op` on tensors of this dtype and device.

    Raises: RuntimeError naming every row's obstacle if none can.
    """
    row = _first(op, data.dtype, data.device.type, _forced)
    if row is None:
        raise RuntimeError(refusal(op, data))
    return row.run


@cache
def _first(op: str, dtype: torch.dtype, device: str, forced: str | None) -> Backend | None:
    """`forced` is the module's: an argument so that it is part of the cache's key."""
    return next((row for row in _candidates(op) if row.obstacle(dtype, device) is None), None)


def refusal(op: str, data: Tensor) -> str | None:
    """Why no backend runs `op` on tensors of this dtype and device, or None if one does."""
    reasons = {row.name: row.obstacle(data.dtype, data.device.type) for row in _candidates(op)}
    if None in reasons.values():
        return None
    wanted = f"backend '{_forced}' cannot run {op} here" if _forced else f"no backend can run {op} here"
    text = "; ".join(f"'{name}': {reason}" for name, reason in reasons.items())
    return f"{wanted}: {text or 'it has no such kernel'} (sigma doctor shows the table)"


def _candidates(op: str) -> Sequence[Backend]:
    return [row for row in _tables[op] if _forced in (None, row.name)]


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: backend must be one of {', '.join(NAMES)}, found {name!r}")
    return name


if os.environ.get("SIGMA_BACKEND"):  # set to nothing is not set, as for SIGMA_ISA
    _forced = _check_name(os.environ["SIGMA_BACKEND"], "SIGMA_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside the block, for the whole process.

    Raises: ValueError if there is none of that name; RuntimeError later, from a call that it can't run.
    """
    global _forced
    before, _forced = _forced, _check_name(name, "backend")
    try:
        yield
    finally:
        _forced = before


def backends() -> dict[str, dict[str, str]]:
    """For each operation and backend, what it runs on this machine: {op: {backend: dtypes and device}}."""
    return {
        op: {
            row.name: row.missing or f"{', '.join(map(_short, row.dtypes))} on {row.device or 'any device'}"
            for row in rows
        }
        for op, rows in sorted(_tables.items())
    }
