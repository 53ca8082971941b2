"""How many experts a token goes to, drawn anew while a model trains."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from sigma_kernels.nn.sparsity import check_integer

Granularity = Literal["global", "micro-batch", "layer"]
Distribution = Literal["uniform", "capacity"]


@dataclass(frozen=True)
class ExpertCountSampler:
    """k of each layer, drawn from a list (Matryoshka MoE, arXiv 2509.26520), so that a model serves at any of them.

    P(k) is the same for all k ("uniform"), or proportional to exp(log(k) / temperature), k^(1 / temperature), so that
    the counts that use more of the model are trained more ("capacity").  A draw is a function of the seed and of where
    it is made: the same on every rank, in any order of calls and after a restart, with no state to keep.

    Args:
        top_k: the k to draw from, rising.
        granularity: one draw for all layers and micro-batches of a step ("global"), one for all layers of a micro-batch
            ("micro-batch"), or one for each layer of each ("layer", which the paper finds best).
        temperature: of "capacity"; large ones come near to "uniform".
        budget: of "layer", the most experts that a token has in all layers together; draws above it are lowered by
            `within_budget`, so that no step takes longer or holds more rows than this.
    Raises: TypeError or ValueError that names the argument.
    """

    top_k: tuple[int, ...]
    granularity: Granularity = "layer"
    distribution: Distribution = "uniform"
    temperature: float = 1.0
    seed: int = 0
    budget: int | None = None

    def __post_init__(self) -> None:
        op = "ExpertCountSampler"
        if isinstance(self.top_k, str) or not isinstance(self.top_k, Sequence) or not self.top_k:
            raise TypeError(f"{op}: top_k must be a list of one integer or more, found {self.top_k!r}")
        least = 1
        for i, k in enumerate(self.top_k):
            check_integer(op, f"top_k[{i}]", k, least)
            least = k + 1
        object.__setattr__(self, "top_k", tuple(self.top_k))
        if self.granularity not in ("global", "micro-batch", "layer"):
            raise ValueError(
                f"{op}: granularity must be 'global', 'micro-batch' or 'layer', found {self.granularity!r}"
            )
        if self.distribution not in ("uniform", "capacity"):
            raise ValueError(
                f"{op}: distribution must be 'uniform' or 'capacity', found {self.distribution!r}"
            )
        is_number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        if not (is_number and 0 < self.temperature < math.inf):
            raise ValueError(f"{op}: temperature must be a finite number above 0, found {self.temperature!r}")
        check_integer(op, "seed", self.seed, 0, 2**64 - 1)
        if self.budget is not None:
            check_integer(op, "budget", self.budget, self.top_k[0])
            if self.granularity != "layer":
                raise ValueError(f"{op}: budget needs the granularity 'layer', found {self.granularity!r}")

    @property
    def probabilities(self) -> tuple[float, ...]:
        """P(k) of each of top_k."""
        power = 0.0 if self.distribution == "uniform" else 1 / self.temperature
        weights = [(k / self.top_k[-1]) ** power for k in self.top_k]  # of the largest 1: none overflows
        return tuple(weight / sum(weights) for weight in weights)

    def sample(self, step: int, micro_batch: int, layers: int) -> tuple[int, ...]:
        """k of each of so many layers, at this step and micro-batch, both counted from 0.

        A layer's k does not depend on how many layers there are, unless there is a budget.
        Raises: TypeError or ValueError that names the argument, also where all layers at the least k exceed the budget.
        """
        for name, value, least in (("step", step, 0), ("micro_batch", micro_batch, 0), ("layers", layers, 1)):
            check_integer("ExpertCountSampler.sample", name, value, least, 2**64 - 1)
        draws = layers if self.granularity == "layer" else 1
        # Philox 4x64: a block of four numbers for each (0, micro-batch, step) + its place, under the seed as the key.
        counter = np.array([0, 0, 0 if self.granularity == "global" else micro_batch, step], np.uint64)
        philox = np.random.Philox(counter=counter, key=np.array([self.seed, 0], np.uint64))
        below = list(accumulate(self.probabilities))[:-1]
        drawn = [
            self.top_k[bisect_right(below, (x >> 11) * 2.0**-53)] for x in philox.random_raw(draws).tolist()
        ]
        ks = tuple(drawn * (layers // draws))
        return ks if self.budget is None else within_budget(ks, self.budget, self.top_k)


def within_budget(top_k: Sequence[int], budget: int, choices: Sequence[int]) -> tuple[int, ...]:
    """The k of each layer, lowered until their sum is at most `budget`.

    The largest goes down first, of equal ones that of the lowest layer, to the next smaller of `choices`, which rise.
    Raises: ValueError if all layers at the smallest choice are above the budget.
    """
    ks, least = list(top_k), len(top_k) * choices[0]
    if least > budget:
        raise ValueError(
            f"ExpertCountSampler: budget must be at least {least}, {choices[0]} in each of {len(ks)} layers, "
            f"found {budget}"
        )
    while sum(ks) > budget:
        layer = ks.index(max(ks))
        ks[layer] = max(k for k in choices if k < ks[layer])
    return tuple(ks)
