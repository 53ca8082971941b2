"""Which neurons of a language are still its own after further training, or on other text."""

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from sigma_train.errors import WrongInput


@dataclass(frozen=True)
class Overlap:
    """Of one language: how many neurons two results give it, how many of them both do."""

    first: int
    second: int
    both: int

    @property
    def ratio(self) -> float:
        """|a and b| / min(|a|, |b|) (Szymkiewicz and Simpson); nan if one is empty."""
        least = min(self.first, self.second)
        return self.both / least if least else math.nan


def overlap(a: Set[Any], b: Set[Any]) -> Overlap:
    return Overlap(len(a), len(b), len(a & b))


def overlaps(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Overlap]:
    """By language, of two contents of neurons.json: the specific and related neurons.

    Raises: WrongInput if they are of other languages or of models of another shape.
    """
    for key in ("languages", "sites"):
        if first[key] != second[key]:
            raise WrongInput(f"neurons: both results must be of the same {key}, found others")
    named = first["named"], second["named"]
    return {
        name: overlap(*({tuple(unit) for unit in of[name]} for of in named)) for name in first["languages"]
    }
