"""Rows from every rank to every rank, and their gradient the same way back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows that the ranks send to this one, in the order of ranks: [sum(receive), ...] from x [sum(send), ...].

    send[p] rows of x go to rank p, in order, and receive[p] come from it.  Differentiable: gradients go back to where
    their rows came from.  Bound: the bytes that leave for other ranks over the link's bandwidth.
    """
    return _Exchange.apply(x, send, receive, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way = send, receive, group
        return all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        send, receive, group = ctx.way
        return exchange(grad, receive, send, group), None, None, None


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """The exchange alone."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out
