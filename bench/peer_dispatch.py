"""What each rank calls in a race of dispatch and combine: ours, torch's operations, the exchange alone."""

import shapes
import torch
import torch.distributed as dist
from ranks import Calls
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

import sigma_kernels as sk


def dispatch_in_torch(x: Tensor, index: Tensor, weights: Tensor, E: int) -> Tensor:
    """Sort, index_select, all_to_all_single there and back, index_add; what arrives is not sorted by expert."""
    P, k = dist.get_world_size(), index.shape[1]
    flat = index.reshape(-1)
    slot = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=E)
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts)
    send, receive = (c.view(P, -1).sum(1).tolist() for c in (counts, arriving))
    rows = x.index_select(0, slot // k)
    there = all_to_all_single_autograd(rows, receive, send, dist.group.WORLD)
    back = all_to_all_single_autograd(there, send, receive, dist.group.WORLD)
    return torch.zeros_like(x).index_add(0, slot // k, back * weights.reshape(-1)[slot, None])


def answers(sent: sk.distributed.Dispatch) -> Tensor:
    """Of experts that answer what they are asked, weighted as experts do where k > 1."""
    if sent.routing.top_k == 1:
        return sent.rows
    is_here = sent.routing.indices < sent.routing.num_experts
    return sent.rows * (sent.routing.weights * is_here).sum(1, keepdim=True)


def rows_of_visits(index: Tensor, experts: int, P: int) -> list[int]:
    """Tokens that go to each rank, each once: no dispatch sends fewer rows."""
    rank = index // experts
    return [int((rank == p).any(1).sum()) for p in range(P)]


def calls_of(shape: shapes.Shape, backward: bool) -> Calls:
    """On each rank, with tokens of its own."""
    rank, P = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    index = shapes.choices(shape, "balanced")
    x, grad = (torch.randn(shape.T, shape.H, generator=generator) for _ in range(2))
    weights = torch.rand(shape.T, shape.k, generator=generator)
    leaves = x.requires_grad_(), weights.requires_grad_()
    send = rows_of_visits(index, shape.E // P, P)
    receive = [send[rank]] * P  # all ranks have the same choices
    there, back = torch.empty(sum(receive), shape.H), torch.empty(sum(send), shape.H)

    def ours() -> Tensor:
        sent = sk.distributed.dispatch(x, sk.group_by_expert(index, shape.E, weights))
        return sk.distributed.combine(answers(sent), sent)

    def exchange() -> None:
        for _ in range(2 if backward else 1):
            dist.all_to_all_single(there, back, receive, send)
            dist.all_to_all_single(back, there, send, receive)

    def call(function):
        if not backward:
            return torch.no_grad()(function)

        def run() -> list[Tensor]:
            out = function()
            return [out, *torch.autograd.grad(out, leaves, grad)]

        return run

    return {
        "ours": call(ours),
        "torch": call(lambda: dispatch_in_torch(x, index, weights, shape.E)),
        "exchange": exchange,
        "want": lambda: [x * weights.sum(1, keepdim=True), grad * weights.sum(1, keepdim=True),
                         (x * grad).sum(1, keepdim=True).expand_as(weights)],
    }  # fmt: skip
