"""Values as JSON has them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def plain(x: Any) -> Any:
    """Of dataclasses, named tuples, mappings and arrays; numbers that are not finite are null."""
    match x:
        case None | bool() | str():
            return x
        case np.ndarray():
            return [plain(v) for v in x.tolist()]
        case np.generic():
            return plain(x.item())
        case float():
            return x if math.isfinite(x) else None
        case int():
            return int(x)
        case Mapping():
            return {str(k): plain(v) for k, v in x.items()}
        case tuple() if hasattr(x, "_asdict"):
            return plain(x._asdict())
        case list() | tuple() | set() | frozenset():
            return [plain(v) for v in x]
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: plain(getattr(x, f.name)) for f in dataclasses.fields(x)}
    raise TypeError(f"plain: {type(x).__name__} has no form in JSON")
