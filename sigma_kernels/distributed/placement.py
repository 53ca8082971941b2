"""Which rank an expert is on: E places, E/P of them on each rank in order, and the expert that stands at each.

placement [E] is the place of each expert.  Routers, counts and losses know experts by their numbers; by place go their
parameters, and the choices of a routing from where tokens are sent to a rank.
"""

import heapq
import math
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_kernels.ops.library import check_index, check_shape, check_size, check_tensor
from sigma_kernels.ops.route import group_where_present
from sigma_kernels.routing import Routing


def balanced_placement(
    load: Tensor, ranks: int, placement: Tensor | None = None, gain: float = 0.01
) -> Tensor:
    """Places that give each of P ranks E/P experts and, as far as a greedy rule finds it, the same load.

    Heaviest first, each expert goes to the rank with the least load among those that have room (longest processing
    time first: Graham 1969, doi 10.1137/0117039; here with E/P to a rank).  Ties: the lower number.  Groups of experts
    then go to the ranks that hold most of them already, and who stays on a rank keeps the place.  The same numbers give
    the same places, on all ranks.

    Args:
        load: [E], what each expert has to do, as its tokens since it was last asked.
        ranks: P.
        placement: where the experts stand now; in order of their numbers where not given.
        gain: of the mean load of a rank; where the busiest one would not lose more than that, all stay.
    Returns: [E] int64.
    Raises: TypeError for a dtype, ValueError for a load that is no finite number of at least 0, ranks that do not
        divide E, a placement that is none, or a gain below 0.
    Bound: the busiest rank has no less than the mean, and no less than the heaviest expert and the E/P - 1 lightest.
    """
    op = "balanced_placement"
    E, size = _check_load(op, load, ranks)
    if isinstance(gain, bool) or not (isinstance(gain, int | float) and gain >= 0):
        raise ValueError(f"{op}: gain must be a number of at least 0, found {gain!r}")
    now = _in_order(op, placement, E)
    weight, place = load.tolist(), now.tolist()
    heaviest_first = sorted(range(E), key=lambda e: (-weight[e], e))
    groups: list[list[int]] = [[] for _ in range(ranks)]
    with_room: list[tuple[float, int]] = [(0, g) for g in range(ranks)]
    totals = [0.0] * ranks
    for e in heaviest_first:
        total, g = heapq.heappop(with_room)
        groups[g].append(e)
        totals[g] = total + weight[e]
        if len(groups[g]) < size:
            heapq.heappush(with_room, (totals[g], g))
    totals_now = [0.0] * ranks
    for e in heaviest_first:
        totals_now[place[e] // size] += weight[e]
    if max(totals_now) - max(totals) <= gain * sum(weight) / ranks:
        return now.clone()
    new = [-1] * E
    for g, rank in _nearest_rank(groups, [p // size for p in place]).items():
        stay = [e for e in groups[g] if place[e] // size == rank]
        free = sorted(set(range(rank * size, (rank + 1) * size)) - {place[e] for e in stay})
        for e in stay:
            new[e] = place[e]
        for e in sorted(set(groups[g]) - set(stay)):
            new[e] = free.pop(0)
    return torch.tensor(new)


def _nearest_rank(groups: list[list[int]], rank: list[int]) -> dict[int, int]:
    """A rank for each group, the pairs with most in common first."""
    common = Counter((g, rank[e]) for g, group in enumerate(groups) for e in group)
    found: dict[int, int] = {}
    for g, r in sorted(common, key=lambda pair: (-common[pair], pair)):
        if g not in found and r not in found.values():
            found[g] = r
    left = iter(sorted(set(range(len(groups))) - set(found.values())))
    return found | {g: next(left) for g in range(len(groups)) if g not in found}


def rank_load(load: Tensor, ranks: int, placement: Tensor | None = None) -> Tensor:
    """[P], the load of each rank's experts; load [E] and placement as in `balanced_placement`."""
    op = "rank_load"
    E, size = _check_load(op, load, ranks)
    return load[experts_by_place(_in_order(op, placement, E))].view(ranks, size).sum(1)


def _check_load(op: str, load: Tensor, ranks: int) -> tuple[int, int]:
    """E, E/P."""
    check_tensor(op, "load", load)
    if load.is_complex() or load.is_meta:
        raise TypeError(f"{op}: load must be real numbers, found {load.dtype} on {load.device}")
    check_shape(op, "load", load, ("E",))
    check_size(op, "ranks", ranks)
    for e, value in enumerate(load.tolist()):
        if not 0 <= value < math.inf:
            raise ValueError(f"{op}: load must be numbers of at least 0, found {value} at expert {e}")
    return load.shape[0], experts_of_rank(op, load.shape[0], ranks)


def experts_of_rank(op: str, num_experts: int, ranks: int) -> int:
    """E/P."""
    if num_experts % ranks:
        raise ValueError(
            f"{op}: the number of experts must be a multiple of the {ranks} ranks, found E={num_experts}"
        )
    return num_experts // ranks


def check_placement(op: str, placement: Tensor, num_experts: int) -> None:
    """Each place of 0..E-1 is that of one expert."""
    check_tensor(op, "placement", placement)
    check_index(op, "placement", placement)
    check_shape(op, "placement", placement, (num_experts,))
    seen = set()
    for e, place in enumerate(placement.tolist()):
        if not 0 <= place < num_experts or place in seen:
            twice = " a second time" if place in seen else ""
            raise ValueError(
                f"{op}: placement must give each expert a place of its own in 0..{num_experts - 1}, "
                f"found {place}{twice} at expert {e}"
            )
        seen.add(place)


def _in_order(op: str, placement: Tensor | None, num_experts: int) -> Tensor:
    """[E] int64, on the host."""
    if placement is None:
        return torch.arange(num_experts)
    check_placement(op, placement, num_experts)
    return placement.to("cpu", torch.int64)


def experts_by_place(placement: Tensor) -> Tensor:
    """[E], the expert that stands at each place."""
    return placement.argsort()


def by_place(routing: Routing, placement: Tensor) -> Routing:
    """The same choices, among places; rows of an expert stay in the order of their slots."""
    E = routing.num_experts
    place = torch.cat([placement, placement.new_full((1,), E)]).int()  # E stands where a choice is absent
    return group_where_present(place[routing.indices], E, routing.weights, routing.row_map.shape[0])


class Moves(NamedTuple):
    """Of one rank: which of its rows leave, by the rank they go to; which are filled, by the rank they come from.

    Rows that change their place on the rank are among them; both lists are of experts in the order of new places.
    """

    leave: Tensor
    fill: Tensor
    send: list[int]
    receive: list[int]


def moves(old: Tensor, new: Tensor, rank: int, ranks: int) -> Moves:
    """From placement `old` to `new`, both [E] on the host."""
    size = old.shape[0] // ranks
    moved = new.argsort()
    moved = moved[old[moved] != new[moved]]
    leaving = moved[old[moved] // size == rank]
    filling = moved[new[moved] // size == rank]
    filling = filling[(old[filling] // size).argsort(stable=True)]
    send, receive = (
        torch.bincount(place // size, minlength=ranks).tolist() for place in (new[leaving], old[filling])
    )
    return Moves(old[leaving] % size, new[filling] % size, send, receive)
