"""Rows from every rank to every rank, and their gradient the same way back; begun, then waited for."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sigma_kernels.collectives import OBSERVERS, Where, told
from sigma_kernels.distributed.payload import Payload, decode, encode


@dataclass
class Exchange:
    """One on its way, forward or backward; what it reads and writes is not to be touched until it is waited for."""

    send: list[int]
    receive: list[int]
    group: dist.ProcessGroup
    payload: Payload = "same"
    what: str = "rows"
    layer: int = -1
    coming: Tensor | None = None  # what autograd takes for what comes; no memory
    _sent: Tensor | None = None
    _out: Tensor | None = None
    _work: Any = None
    _arrived_ns: int = 0  # 0: nobody asked

    def begin(self, x: Tensor, send: list[int], receive: list[int], payload: Payload) -> None:
        self._sent = encode(x, payload)
        self._out = self._sent.new_empty(sum(receive), *self._sent.shape[1:])
        self._arrived_ns = time.monotonic_ns() if OBSERVERS else 0
        self._work = dist.all_to_all_single(
            self._out, self._sent, receive, send, group=self.group, async_op=True
        )

    def finish(self, payload: Payload, shape: torch.Size, dtype: torch.dtype, is_backward: bool) -> Tensor:
        waits_ns = time.monotonic_ns() if self._arrived_ns else 0
        self._work.wait()
        if waits_ns:
            told(self.what, self.layer, is_backward, self._arrived_ns, waits_ns)
        out, self._out, self._work, self._sent = self._out, None, None, None
        assert out is not None
        return decode(out, payload, shape[-1], dtype)

    @property
    def payload_back(self) -> Payload:
        """Of gradients, whose range no 8 bits are trusted with."""
        return "same" if self.payload == "same" else "bf16"

    def wait(self) -> Tensor:
        """The rows that came."""
        return _Wait.apply(self.coming, self)


def begin_exchange(
    x: Tensor,
    send: list[int],
    receive: list[int],
    group: dist.ProcessGroup,
    payload: Payload = "same",
    what: str = "rows",
) -> Exchange:
    """Send the rows of x [sum(send), ...], send[p] of them to rank p, in order; receive[p] will come from it.

    `wait` gives what the ranks sent to this one, in the order of ranks: [sum(receive), ...].  Differentiable once:
    gradients go back to where their rows came from, begun where the gradient of what was waited for is there, and
    waited for where that of x is asked for, so that what lies between runs meanwhile.  A payload rounds what is sent,
    and gradients pass as if it had not.  `what` is its name for `collectives.OBSERVERS`.
    Bound: the bytes that leave for other ranks over the link's bandwidth.
    """
    found = Exchange(send, receive, group, payload, what, Where.layer)
    found.coming = _Begin.apply(x, found)
    return found


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Exchange) -> Tensor:
        ctx.found, ctx.shape, ctx.dtype = found, x.shape, x.dtype
        found.begin(x, found.send, found.receive, found.payload)
        return x.new_empty(()).expand(sum(found.receive), *x.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.found.finish(ctx.found.payload_back, ctx.shape, ctx.dtype, True), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coming: Tensor, found: Exchange) -> Tensor:
        ctx.found = found
        return found.finish(found.payload, coming.shape, coming.dtype, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        found = ctx.found
        found.begin(grad, found.receive, found.send, found.payload_back)
        return grad, None  # of the shape that autograd wants here; _Begin gives what comes instead


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """The exchange of what has no gradient."""
    out = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out
