"""Lists of layers that config.json may lack, as transformers makes them of the layers' numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Every:
    """Each n-th layer is `last` and others are `others`, n being the setting `key`, or `default`.

    Layer i is one where n divides max(i + shift, 0).  With the setting `unless` transformers makes another list.
    """

    key: str
    default: int
    others: Any
    last: Any
    shift: int = 1
    unless: str = ""

    def made(self, model: Mapping[str, Any], n: int) -> list[Any] | None:
        """None if it is not known."""
        every = _count(model, self.key, self.default)
        if not every or model.get(self.unless) is not None:
            return None
        return [self.others if max(i + self.shift, 0) % every else self.last for i in range(n)]


@dataclass(frozen=True)
class First:
    """The first k layers are `first` and others are `others`, k being the setting `key`, or `default`."""

    key: str
    default: int
    first: Any
    others: Any

    def made(self, model: Mapping[str, Any], n: int) -> list[Any] | None:
        """None if it is not known."""
        count = _count(model, self.key, self.default)
        return None if count is None else [self.first if i < count else self.others for i in range(n)]


def _count(model: Mapping[str, Any], key: str, default: int) -> int | None:
    found = model.get(key)
    found = default if found is None else found
    return found if type(found) is int and found >= 0 else None  # True is an int, too
