"""Times on a command line: 25ms, 200us, 1.5s, 2m, or a number of seconds."""

import re

UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """Raises: ValueError that says what was wanted."""
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*([a-z]*)\s*", text)
    if not found or found[2] not in UNITS:
        raise ValueError(f"a time is a number with {', '.join(u for u in UNITS if u)}, found {text!r}")
    return float(found[1]) * UNITS[found[2]]
