"""Which k each layer has when all layers together have a budget: greedy, by the loss of one layer's k changed.

A search that makes L plans at a move and moves (k_most - k_least) L / 2 times or so; a plan is measured once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from sigma_train.elastic import Plan

Loss = Callable[[Plan], float]


@dataclass(frozen=True)
class Found:
    """Both ways to the budget, each from its start; `plan` is the better of their ends, of equals the lowered one."""

    lowered: tuple[Plan, ...]
    raised: tuple[Plan, ...]
    plan: Plan
    tried: int  # plans whose loss was asked for


def search(loss: Loss, layers: int, least: int, most: int, total: int) -> Found:
    """Plans of sum `total` with k in least..most, by lowering from `most` in all layers and by raising from `least`."""
    asked = cache(loss)
    lowered = walk(asked, (most,) * layers, total, least)
    raised = walk(asked, (least,) * layers, total, most)
    best = min(lowered[-1], raised[-1], key=asked)
    return Found(tuple(lowered), tuple(raised), best, asked.cache_info().currsize)


def walk(loss: Loss, start: Plan, total: int, limit: int) -> list[Plan]:
    """Plans from `start` on, each with the k of one layer changed by one towards `limit`, until they sum to `total`.

    The layer is that with which the loss is lowest, the first of equals.
    """
    path, by = [start], 1 if limit > max(start) else -1
    while sum(path[-1]) != total:
        path.append(min(_neighbours(path[-1], by, limit), key=loss))
    return path


def _neighbours(plan: Plan, by: int, limit: int) -> list[Plan]:
    return [(*plan[:i], k + by, *plan[i + 1 :]) for i, k in enumerate(plan) if k != limit]


def even(layers: int, total: int) -> tuple[Plan, Plan]:
    """The two plans that spread `total` evenly, what is left over to the last layers, and to the first."""
    k, more = divmod(total, layers)
    last = (k,) * (layers - more) + (k + 1,) * more
    return last, last[::-1]


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point has at most this one's cost and loss, and less of one of them; (cost, loss)."""
    return [
        not any(c <= cost and b <= loss and (c, b) != (cost, loss) for c, b in points)
        for cost, loss in points
    ]
