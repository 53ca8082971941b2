"""Tokens to the ranks that hold their experts, and what these answer back to the tokens.

P ranks hold E/P experts each, in order.  A token goes to a rank once, whatever number of its experts is there: with
k > 1 the choices travel beside it, the rank sums what its experts make of it, and one row comes back (as DeepEP does:
Zhao et al. 2025, arXiv 2505.09343).  A visit is a token at a rank; those of a rank are a Routing among ranks, so that
`permute` packs what is sent and `unpermute` sums what comes back.  Uneven exchanges, no capacity: no token is dropped.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sigma_kernels.collectives import Where, observed
from sigma_kernels.distributed.exchange import Exchange, all_to_all, begin_exchange
from sigma_kernels.distributed.payload import Payload, check_payload
from sigma_kernels.distributed.placement import experts_of_rank
from sigma_kernels.ops.library import check_float, check_shape
from sigma_kernels.ops.permute import permute, sum_by_token, unpermute
from sigma_kernels.ops.route import check_choices, group_where_present
from sigma_kernels.routing import Routing


class Dispatch(NamedTuple):
    """What a rank received, and the way back.

    Attributes:
        rows:    [R', H], tokens by the rank they come from; differentiable.
        routing: of these among this rank's E/P experts; its weights are the experts' to apply, and one where k = 1.
            Choices that other ranks answer have no row in it.
        send, receive: rows to and from each rank.
        visits:  the Routing by which the tokens of this rank were sent: among ranks, or for k = 1 among experts.
        group:   the ranks.
        payload_back: how what comes back travels.
    """

    rows: Tensor
    routing: Routing
    send: list[int]
    receive: list[int]
    visits: Routing
    group: dist.ProcessGroup
    payload_back: Payload = "same"


def dispatch(
    x: Tensor, routing: Routing, group: dist.ProcessGroup | None = None, payload: Payload = "same"
) -> Dispatch:
    """Send each token to the ranks that hold its experts; a collective, called by all of them.

    Counts are exchanged first, and are waited for: the sizes of what follows depend on them.

    Args:
        x: [T, H] on this rank; T may differ between ranks, and be 0.
        routing: of these tokens among all E experts; top_k is the same on all ranks.
        group: the ranks that share the experts; all ranks where not given.
        payload: how rows travel: "same" as they are, "bf16", or "int8" or "fp8" with a scale every 128 columns; what
            comes back and the gradients of all but "same" in bf16.
    Returns: a Dispatch, whose `rows` and `routing` are what the experts of this rank take, and `combine` their answer.
    Raises: RuntimeError without a process group, ValueError if E is no multiple of its ranks, for another payload, or
        as `permute`.
    """
    check_payload("dispatch", payload)
    return begin_dispatch(x, routing, process_group(group), payload).wait()


class Dispatching(NamedTuple):
    """A `dispatch` on its way: of what comes, choices among the `experts` of this rank (that number where absent),
    their weights, and how many are not absent.
    """

    coming: Exchange
    indices: Tensor | Exchange
    weights: Tensor | Exchange
    experts: int
    choices: int
    send: list[int]
    receive: list[int]
    visits: Routing
    group: dist.ProcessGroup

    def wait(self) -> Dispatch:
        indices, weights = (x.wait() if isinstance(x, Exchange) else x for x in self[1:3])
        here = group_where_present(indices, self.experts, weights, self.choices)
        way_back = self.send, self.receive, self.visits, self.group, self.coming.payload_back
        return Dispatch(self.coming.wait(), here, *way_back)


def begin_dispatch(
    x: Tensor, routing: Routing, group: dist.ProcessGroup, payload: Payload = "same"
) -> Dispatching:
    """Counts are exchanged, and what they give the size of is on its way."""
    experts = experts_of_rank("dispatch", routing.num_experts, group.size())
    return (_one_choice if routing.top_k == 1 else _visited)(x, routing, experts, group, payload)


def _one_choice(
    x: Tensor, routing: Routing, experts: int, group: dist.ProcessGroup, payload: Payload
) -> Dispatching:
    """Rows in expert order are in the order of ranks too, and counts say which expert each is for."""
    ranks = group.size()
    packed = permute(x, routing)  # before anything is sent: what it refuses, no other rank waits for
    counts = routing.counts.contiguous()
    with observed("counts", Where.layer):
        arriving = all_to_all(counts, [experts] * ranks, [experts] * ranks, group).view(ranks, experts)
    send, receive = torch.stack([counts.view(ranks, experts).sum(1), arriving.sum(1)]).tolist()
    coming = begin_exchange(packed, send, receive, group, payload)
    expert = torch.arange(experts, dtype=torch.int32, device=x.device).repeat(ranks)
    index = expert.repeat_interleave(arriving.flatten(), output_size=sum(receive))
    ones, rows = x.new_ones(sum(receive), 1), sum(receive)
    return Dispatching(coming, index[:, None], ones, experts, rows, send, receive, routing, group)


def _visited(
    x: Tensor, routing: Routing, experts: int, group: dist.ProcessGroup, payload: Payload
) -> Dispatching:
    check_choices("dispatch", routing)
    ranks, (T, k) = group.size(), routing.indices.shape
    rank = routing.indices // experts  # `ranks` where a choice is absent, as its index is E
    is_repeated = (rank[:, :, None] == rank[:, None, :]).tril(-1).any(2)
    rank = rank.masked_fill(is_repeated, ranks)
    visits = group_where_present(rank, ranks, routing.weights.detach(), T * k)
    send = visits.counts.tolist()
    visits = visits._replace(row_map=visits.row_map[: sum(send)])
    packed = permute(x, visits)  # before anything is sent: what it refuses, no other rank waits for
    choices = routing.counts.view(ranks, experts).sum(1, dtype=torch.int32)
    sizes = torch.stack([visits.counts, choices], 1)
    with observed("counts", Where.layer):
        arriving = all_to_all(sizes, [1] * ranks, [1] * ranks, group).tolist()
    receive = [rows for rows, _ in arriving]
    coming = begin_exchange(packed, send, receive, group, payload)
    token, per_rank = visits.row_map // k, visits.counts
    first = torch.arange(0, ranks * experts, experts, dtype=torch.int32, device=x.device)
    index = routing.indices[token] - first.repeat_interleave(per_rank, output_size=sum(send))[:, None]
    index = index.masked_fill((index < 0) | (index >= experts), experts)
    indices = begin_exchange(index, send, receive, group, what="indices")
    weights = begin_exchange(routing.weights[token], send, receive, group, what="weights")
    choices_here = sum(rows for _, rows in arriving)
    return Dispatching(coming, indices, weights, experts, choices_here, send, receive, visits, group)


def combine(y: Tensor, sent: Dispatch) -> Tensor:
    """Bring the experts' answers back to the tokens; a collective.

    out[t] = sum_j weights[t, j] * (the answer of choice j of token t).

    Args:
        y: [R', H], for each of `sent.rows` what the experts of this rank made of it by `sent.routing`, its weights
            applied: as `moe_experts` does.
        sent: what `dispatch` returned.
    Returns: [T, H].
    Raises: ValueError if y is not [R', H], TypeError if its dtype is not that of the weights.
    """
    return begin_combine(y, sent).wait()


class Combining(NamedTuple):
    """A `combine` on its way."""

    coming: Exchange
    sent: Dispatch

    def wait(self) -> Tensor:
        visits = self.sent.visits
        # With k > 1 the weights were applied where the experts are.
        return (unpermute if visits.top_k == 1 else sum_by_token)(self.coming.wait(), visits)


def begin_combine(y: Tensor, sent: Dispatch) -> Combining:
    check_float("combine", **{"y": y, "routing.weights": sent.visits.weights})
    check_shape("combine", "y", y, (sent.rows.shape[0], "H"))
    coming = begin_exchange(y, sent.receive, sent.send, sent.group, sent.payload_back, "answers")
    return Combining(coming, sent)


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
