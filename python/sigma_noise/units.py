"""Numbers as people read them: three digits and a unit."""

from math import isfinite

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def time_of(seconds: float) -> str:
    if not isfinite(seconds):
        return "-"
    for unit, name in UNITS:
        if abs(seconds) >= unit:
            return f"{seconds / unit:.3g} {name}"
    return "0 s"


def share_of(x: float) -> str:
    """Per cent."""
    return f"{x * 100:.3g} %" if isfinite(x) else "-"


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
