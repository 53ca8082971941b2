"""Times on a command line."""

import re
from fractions import Fraction

import typer

UNITS = {"ns": Fraction(1, 10**9), "us": Fraction(1, 10**6), "ms": Fraction(1, 1000), "s": 1, "m": 60, "h": 3600,
         "": 1}  # fmt: skip


def seconds(text: str | float) -> float:
    """A number with a unit of UNITS, such as 250us; seconds without one."""
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?) ?([a-z]*)", str(text))
    try:
        if match is None or match[2] not in UNITS:
            raise ValueError
        return float(Fraction(match[1]) * UNITS[match[2]])
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no time such as 250us, 1ms, 10s or 2m") from None
