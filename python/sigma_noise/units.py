"""Numbers as people read them: three digits and a unit."""

from math import isfinite

UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def time_of(seconds: float) -> str:
    """Three digits and a unit."""
    if not isfinite(seconds):
        return "-"
    rounded = float(f"{seconds:.3g}")  # first, so that 999.9 us is 1 ms
    for unit, name in UNITS:
        if rounded >= unit:
            return f"{rounded / unit:.4g} {name}"
    return "0 s"


def share_of(x: float) -> str:
    """Per cent."""
    return f"{x * 100:.3g} %" if isfinite(x) else "-"


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
