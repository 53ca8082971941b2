"""Tokens to the ranks that hold their experts, and what these answer back to the tokens.

P ranks hold E/P experts each, in order: rows in expert order are in the order of ranks too, so that `permute` packs
what is sent and nothing else moves on this side.  Uneven exchanges, no capacity: no token is dropped.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sigma_kernels.distributed.exchange import all_to_all, exchange
from sigma_kernels.ops.library import check_float, check_shape
from sigma_kernels.ops.permute import permute, unpermute
from sigma_kernels.ops.route import group_by_expert
from sigma_kernels.routing import Routing


class Dispatch(NamedTuple):
    """What a rank received, and the way back.

    Attributes:
        rows:    [R', H], by the rank they come from, then by expert; differentiable.
        routing: of these rows among this rank's E/P experts, one choice each of weight 1.
        send, receive: rows to and from each rank.
        source:  the Routing by which the tokens of this rank were sent.
        group:   the ranks.
    """

    rows: Tensor
    routing: Routing
    send: list[int]
    receive: list[int]
    source: Routing
    group: dist.ProcessGroup


def dispatch(x: Tensor, routing: Routing, group: dist.ProcessGroup | None = None) -> Dispatch:
    """Send each token to the ranks that hold its experts; a collective, called by all of them.

    Counts are exchanged first, [E] integers, and are waited for: the sizes of what follows depend on them.

    Args:
        x: [T, H] on this rank; T may differ between ranks, and be 0.
        routing: of these tokens among all E experts.
        group: the ranks that share the experts; all ranks where not given.
    Returns: a Dispatch, whose `rows` and `routing` are what the experts of this rank take, and `combine` their answer.
    Raises: RuntimeError without a process group, ValueError if E is no multiple of its ranks, or as `permute`.
    """
    group = process_group(group)
    ranks = group.size()
    experts = experts_of_rank("dispatch", routing.num_experts, ranks)
    packed = permute(x, routing)  # before anything is sent: what it refuses, no other rank waits for
    counts = routing.counts.contiguous()
    arriving = all_to_all(counts, [experts] * ranks, [experts] * ranks, group).view(ranks, experts)
    sent, received = torch.stack([counts.view(ranks, experts).sum(1), arriving.sum(1)]).tolist()
    rows = exchange(packed, sent, received, group)
    expert = torch.arange(experts, dtype=torch.int32, device=x.device).repeat(ranks)
    index = expert.repeat_interleave(arriving.flatten(), output_size=rows.shape[0])
    ones = rows.new_ones(rows.shape[0], 1)
    return Dispatch(rows, group_by_expert(index[:, None], experts, ones), sent, received, routing, group)


def combine(y: Tensor, sent: Dispatch) -> Tensor:
    """Bring the experts' answers back to the tokens, weighted as they were routed; a collective.

    out[t] = sum_j weights[t, j] * (the answer to choice j of token t).

    Args:
        y: [R', H], for each of `sent.rows` what the experts of this rank made of it.
        sent: what `dispatch` returned.
    Returns: [T, H].
    Raises: ValueError if y is not [R', H], TypeError if its dtype is not that of the weights.
    """
    check_float("combine", **{"y": y, "routing.weights": sent.source.weights})
    check_shape("combine", "y", y, (sent.rows.shape[0], "H"))
    back = exchange(y, sent.receive, sent.send, sent.group)
    return unpermute(back, sent.source)


def process_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    found = group if group is not None or not dist.is_available() else dist.group.WORLD
    if not isinstance(found, dist.ProcessGroup | None):
        raise TypeError(
            f"sigma_kernels.distributed: group must be a ProcessGroup, found {type(found).__name__}"
        )
    if found is None:
        raise RuntimeError(
            "sigma_kernels.distributed: no process group; call torch.distributed.init_process_group"
        )
    return found


def experts_of_rank(op: str, num_experts: int, ranks: int) -> int:
    """E/P."""
    if num_experts % ranks:
        raise ValueError(
            f"{op}: the number of experts must be a multiple of the {ranks} ranks, found E={num_experts}"
        )
    return num_experts // ranks
