"""Choices left out where those before them already have the weight that is asked for: another k for each token."""

import torch
import torch.nn.functional as F

from sigma_kernels.ops.library import check_float
from sigma_kernels.ops.route import check_choices, group_where_present
from sigma_kernels.routing import Routing


def limit_mass(routing: Routing, mass: float, *, normalize: bool = False) -> Routing:
    """Of each token's choices the fewest, best first, whose weights add up to `mass`; the others are answered by none.

    k'(t) = min {k' : w[t, 1] + ... + w[t, k'] >= mass}, or all k where they do not reach it (top-p routing: Huang et
    al. 2024, arXiv 2403.07652).  The weights must be probabilities that are not yet divided by their sum; `normalize`
    divides those that stay by theirs.  A choice that was answered by none before weighs nothing.

    Returns: the Routing, which has R' = sum_t k'(t) rows and index E where a choice is left out.
    Raises: ValueError for a mass that is no number in (0, 1], weights that are not [T, k] or, on a CPU, an index out of
        range; TypeError for weights that are integers.
    Cost: R' is waited for, as the number of rows decides shapes.
    """
    op = "limit_mass"
    if isinstance(mass, bool) or not isinstance(mass, int | float) or not 0 < mass <= 1:
        raise ValueError(f"{op}: mass must be a number above 0 and at most 1, found {mass!r}")
    check_choices(op, routing)
    check_float(op, weights=routing.weights)
    indices, weights, E = routing.indices, routing.weights, routing.num_experts
    is_there = indices < E
    before = F.pad(weights.detach().double().where(is_there, 0).cumsum(1)[:, :-1], (1, 0))
    stays = is_there & (before < mass)
    if normalize:
        kept = weights.where(stays, 0)
        weights = kept / kept.sum(1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
    return group_where_present(indices.masked_fill(~stays, E), E, weights, int(stays.sum()))
