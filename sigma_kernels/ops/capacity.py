"""Choices left out where an expert has more of them than it takes."""

from typing import Literal

import torch
from torch import Tensor

from sigma_kernels.ops.library import check_routing, check_size
from sigma_kernels.ops.library import slots as named_slots
from sigma_kernels.ops.route import check_choices, group_where_present
from sigma_kernels.routing import Routing

Drop = Literal["lightest", "last"]


def check_drop(op: str, drop: str) -> None:
    if drop not in ("lightest", "last"):
        raise ValueError(f"{op}: drop must be 'lightest' or 'last', found {drop!r}")


def limit_rows(routing: Routing, capacity: int, drop: Drop = "lightest") -> tuple[Routing, Tensor]:
    """At most `capacity` rows for each expert; choices beyond are answered by none.

    Which are left out: the lightest routing weights of each expert (ties: the later tokens), or the last tokens
    (GShard: Lepikhin et al. 2020, arXiv 2006.16668).  A token whose choices are all left out gets zero from the layer,
    beside which its residual stream stays.

    Returns: the Routing, which has R' = sum_e min(counts[e], capacity) rows and index E where a choice is left out; and
        how many of each expert were, [E] int32.
    Raises: TypeError for a capacity that is no integer, ValueError for one below 1, a `drop` that is neither, weights
        that are not [T, k] or, on a CPU, an index out of range or a row map that names a slot twice.
    Cost: R' is waited for, as the number of rows decides shapes; "lightest" sorts the weights.
    """
    op = "limit_rows"
    check_size(op, "capacity", capacity)
    check_drop(op, drop)
    check_choices(op, routing)
    T, k = check_routing(op, routing, "routing.weights", routing.weights)
    E, counts, offsets = routing.num_experts, routing.counts, routing.offsets
    dropped = (counts - capacity).clamp(min=0)
    slots = named_slots(op, routing.row_map, T * k).long()
    if drop == "lightest":
        # Rows by weight, then by expert: both sorts are stable.
        weight = routing.weights.detach().reshape(-1)[slots]
        slots = slots[weight.argsort(descending=True, stable=True)]
        slots = slots[routing.indices.reshape(-1)[slots].argsort(stable=True)]
    expert = routing.indices.reshape(-1)[slots].long()
    place = torch.arange(slots.shape[0], device=slots.device) - offsets[expert]
    indices = routing.indices.reshape(-1).index_fill(0, slots[place >= capacity], E).view(T, k)
    rows = int((counts - dropped).sum())
    return group_where_present(indices, E, routing.weights, rows), dropped
