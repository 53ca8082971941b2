"""The search of `elastic_search.py` on a model: chosen on the first half of the batches, judged on the second."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sigma_train.elastic import Batch, Elastic, Measured, Plan, measure
from sigma_train.elastic_search import Found, even, front, search


@dataclass(frozen=True)
class Allocation:
    """What was searched for and found.

    `searched` and `judged` are the plans of both paths, the even ones and the uniform ones, on the two halves.
    """

    mean_k: float
    total: int  # of the k of all layers, which the budget allows
    found: Found
    even: tuple[
        Plan, Plan
    ]  # nothing searched: the budget spread evenly, the rest to the last layers, or the first
    uniform: tuple[Plan, ...]
    searched: dict[Plan, float]
    judged: dict[Plan, Measured]

    def on_the_front(self) -> dict[Plan, bool]:
        """Whether no plan that was judged is better at no more active parameters."""
        plans = [*self.judged]
        points = [(self.judged[p].active_parameters, self.judged[p].bits_per_byte) for p in plans]
        return dict(zip(plans, front(points), strict=True))

    def gains(self) -> list[tuple[Plan, float, float]]:
        """Bits per byte saved over each even plan, on the half that nothing was chosen on, and their error."""
        chosen = self.judged[self.found.plan]
        differences = [(plan, *self.judged[plan].over(chosen)) for plan in dict.fromkeys(self.even)]
        return [(plan, gain, error) for plan, gain, error in differences if plan != self.found.plan]

    def gains_as_json(self) -> list[dict[str, Any]]:
        """An error that is not known is null."""
        return [
            {"over": list(plan), "bits_per_byte": gain, "error": error if math.isfinite(error) else None}
            for plan, gain, error in self.gains()
        ]

    def figures(self, elastic: Elastic) -> dict[str, Any]:
        """Everything, as JSON has it."""
        on_front = self.on_the_front()

        def row(plan: Plan) -> dict[str, Any]:
            return self.judged[plan].figures() | {
                "standing": elastic.standing(plan),
                "searched_bits_per_byte": self.searched[plan],
                "pareto": on_front[plan],
            }

        return {
            "mean_k": self.mean_k,
            "found": row(self.found.plan),
            "gains": self.gains_as_json(),
            "tried": self.found.tried,
            "lowered": [row(plan) for plan in self.found.lowered],
            "raised": [row(plan) for plan in self.found.raised],
            "even": [row(plan) for plan in self.even],
            "uniform": [row(plan) for plan in self.uniform],
        }


def allocate(elastic: Elastic, batches: Sequence[Batch], mean_k: float, least: int, most: int) -> Allocation:
    """The k of each layer in least..most with a mean of at most `mean_k`."""
    half = len(batches) // 2
    first, second = batches[:half], batches[half:]
    searched: dict[Plan, float] = {}

    def loss(plan: Plan) -> float:
        if plan not in searched:
            searched[plan] = measure(elastic, plan, first).bits_per_byte
        return searched[plan]

    layers = elastic.num_layers
    total = math.floor(mean_k * layers + 1e-9)  # 2.333333333 * 3 is meant as 7
    found = search(loss, layers, least, most, total)
    uniform = tuple(elastic.uniform(k) for k in range(least, most + 1))
    spread = even(layers, total)
    plans = dict.fromkeys([*found.lowered, *found.raised, *spread, *uniform])
    judged = {plan: measure(elastic, plan, second) for plan in plans}
    return Allocation(mean_k, total, found, spread, uniform, {plan: loss(plan) for plan in plans}, judged)
