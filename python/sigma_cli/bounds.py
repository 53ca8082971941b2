"""The bounds of a race, as its page and its pictures read them."""

from typing import Any


def fastest_bounds(race: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each bound that has a time, by its name; of NAME and NAME_f32 the faster, as NAME.

    Where bf16 is slower than f32 nobody is bound to multiply in it.
    """
    found: dict[str, dict[str, Any]] = {}
    measured = (c for c in race["candidates"] if c["kind"] == "bound" and "median_s" in c)
    for c in sorted(measured, key=lambda c: c["median_s"]):
        found.setdefault(c["name"].removesuffix("_f32"), c)
    return found
