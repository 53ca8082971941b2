"""Rows from every rank to every rank, and their gradient the same way back; begun, then waited for."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class Exchange:
    """One on its way, forward or backward; what it reads and writes is not to be touched until it is waited for."""

    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup
    coming: Tensor | None = None  # as autograd knows it
    out: Tensor | None = None
    work: Any = None
    read: Tensor | None = None

    def begin(self, x: Tensor, send: list[int], receive: list[int]) -> None:
        self.read = x.contiguous()
        self.out = x.new_empty(sum(receive), *x.shape[1:])
        self.work = dist.all_to_all_single(
            self.out, self.read, receive, send, group=self.group, async_op=True
        )

    def finish(self) -> Tensor:
        self.work.wait()
        out, self.out, self.work, self.read = self.out, None, None, None
        assert out is not None
        return out

    def wait(self) -> Tensor:
        """The rows that came."""
        return _Wait.apply(self.coming, self)


def begin_exchange(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
) -> Exchange:
    """Send the rows of x [sum(send), ...], send[p] of them to rank p, in order; receive[p] will come from it.

    `wait` gives what the ranks sent to this one, in the order of ranks: [sum(receive), ...].  Differentiable once:
    gradients go back to where their rows came from, begun where the gradient of what was waited for is there, and
    waited for where that of x is asked for, so that what lies between runs meanwhile.
    Bound: the bytes that leave for other ranks over the link's bandwidth.
    """
    found = Exchange(send, receive, group)
    found.coming = _Begin.apply(x, found)
    return found


def exchange(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """The same, waited for at once."""
    return begin_exchange(x, send, receive, group).wait()


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Exchange) -> Tensor:
        ctx.found = found
        found.begin(x, found.send, found.receive)
        return found.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.found.finish(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coming: Tensor, found: Exchange) -> Tensor:
        ctx.found = found
        out = found.finish()
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        found = ctx.found
        found.begin(grad, found.receive, found.send)
        return grad, None  # of the shape that autograd wants here; _Begin gives what comes instead


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """The exchange of what has no gradient."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out
