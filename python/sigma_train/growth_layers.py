"""Which layer of a model each layer of a deeper one is made of."""

from dataclasses import dataclass
from typing import Self

from sigma_train.errors import WrongInput


@dataclass(frozen=True)
class LayerGrowthPlan:
    """Layer j of the grown model is layer `sources[j]` of the former (arXiv 2510.08008, section 3).

        interposition   0 0 1 1 2 2     a copy behind each layer
        stack           0 1 2 0 1 2     all layers once more on top

    Interposition keeps the order in which norms of weights rise over the depth; a stack breaks it at its seam.  The
    first and last layers of a model differ most from their neighbours: `skip_first` and `skip_last` of them have no
    copy.

    Raises: WrongInput for sources that are no growth of layers 0, 1, ..., each of them there.
    """

    sources: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sources or sorted(set(self.sources)) != list(range(max(self.sources) + 1)):
            raise WrongInput(
                f"LayerGrowthPlan: sources must name every layer from 0 on, found {list(self.sources)}"
            )

    @classmethod
    def none(cls, n: int) -> Self:
        """n layers as they are."""
        return cls(tuple(range(n)))

    @classmethod
    def interposition(cls, n: int, factor: int = 2, skip_first: int = 0, skip_last: int = 0) -> Self:
        _check(n, factor, skip_first, skip_last)
        grows = range(skip_first, n - skip_last)
        return cls(tuple(i for i in range(n) for _ in range(factor if i in grows else 1)))

    @classmethod
    def stack(cls, n: int, factor: int = 2, skip_first: int = 0, skip_last: int = 0) -> Self:
        """The layers but the last, then `factor` - 2 times the grown ones alone, then all but the first."""
        _check(n, factor, skip_first, skip_last)
        block = range(skip_first, n - skip_last)
        inner = [i for _ in range(factor - 2) for i in block]
        if factor == 1:
            return cls.none(n)
        return cls((*range(n - skip_last), *inner, *range(skip_first, n)))

    @property
    def num_layers(self) -> int:
        """Of the model that grows."""
        return max(self.sources) + 1

    @property
    def copies(self) -> tuple[bool, ...]:
        """Of each layer whether one before it is made of the same."""
        return tuple(source in self.sources[:j] for j, source in enumerate(self.sources))

    def targets(self, layer: int) -> list[int]:
        """Where a layer goes; one beyond the model's, as DeepSeek's of several tokens, stays beyond."""
        if layer >= self.num_layers:
            return [layer + len(self.sources) - self.num_layers]
        return [j for j, source in enumerate(self.sources) if source == layer]


def _check(n: int, factor: int, skip_first: int, skip_last: int) -> None:
    least = {"n": (n, 1), "factor": (factor, 1), "skip_first": (skip_first, 0), "skip_last": (skip_last, 0)}
    for name, (value, low) in least.items():
        if value < low:
            raise WrongInput(f"LayerGrowthPlan: {name} must be at least {low}, found {value}")
    if skip_first + skip_last >= n:
        raise WrongInput(
            f"LayerGrowthPlan: skip_first + skip_last must leave one of {n} layers to copy, "
            f"found {skip_first} + {skip_last}"
        )
