"""The torch library `sigma` and what every operation's file needs: registration, checks, native memory."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sigma_kernels import _C

LIB = torch.library.Library("sigma", "FRAGMENT")
NATIVE = (torch.float32,)
REFERENCE = (torch.float32, torch.float64)

_LARGE = (
    32 << 20
)  # bytes: what malloc takes from the system anew each time, at most (mallopt(3), M_MMAP_THRESHOLD)


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register one operation: its schema, its implementation for all devices, and its shapes."""
    name = schema.split("(")[0]
    LIB.define(schema)
    LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sigma::{name}", fake, lib=LIB)


def differentiable(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> Callable[..., Any]:
    """The operation `sigma::name` with its gradient, for public functions to call.

    The same gradient is registered for torch.compile and callers of torch.ops.  There torch.func.grad raises and
    forward-mode differentiation answers with zeros; what this returns does the first and refuses the second.
    """
    torch.library.register_autograd(f"sigma::{name}", backward, setup_context=setup, lib=LIB)
    op = getattr(torch.ops.sigma, name)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

        setup_context = staticmethod(setup)

    Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]
    Differentiable.__name__ = Differentiable.__qualname__ = name
    return lambda *inputs: (op if torch.compiler.is_compiling() else Differentiable.apply)(*inputs)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(op: str, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(f"{ctx.op} is differentiable once; its gradient has no derivative")


def once(op: str, grad: Tensor | None, *sources: Tensor) -> Tensor | None:
    """A gradient computed from `sources` that says so when it is differentiated, where autograd finds it constant.

    torch's once_differentiable does so only where the incoming gradient is differentiated as well: the gradient of a
    gradient penalty would lack its part without a word.
    """
    if grad is None or not torch.is_grad_enabled():
        return grad
    return _Once.apply(op, grad, *sources)


def saturated(indices: Tensor) -> Tensor:
    """int64 as int32; what does not fit becomes the nearest int32, which no number of experts allows."""
    if indices.dtype == torch.int32:
        return indices
    limit = torch.iinfo(torch.int32)
    return indices.clamp(limit.min, limit.max).int()


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Memory with undefined contents; from the kept blocks of csrc/cpu/memory.h where it is large and on a CPU.

    As torch's own it is NaN under deterministic algorithms with torch.utils.deterministic.fill_uninitialized_memory.
    """
    dtype = dtype or like.dtype
    count = math.prod(shape)
    if like.device.type != "cpu" or count * dtype.itemsize < _LARGE:
        return like.new_empty(shape, dtype=dtype)
    out = torch.frombuffer(_C.Block(count * dtype.itemsize), dtype=dtype).view(shape)
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fill and torch.are_deterministic_algorithms_enabled():
        out.fill_(math.nan)
    return out


def empty_cache() -> None:
    """Give the memory of freed large tensors back to the system.

    Results and gradients of 32 MiB and more lie in blocks that stay with the library when they are freed, so that the
    next step does not pay for fresh pages.  Blocks in use and kept never exceed the most that was in use at once, and
    the system may take the pages of kept ones when it runs short of memory; this gives them back at once.
    """
    _C.release_free_blocks()


def widened(x: Tensor) -> Tensor:
    """bf16 [rows, columns] as contiguous f32; any other x itself."""
    if x.dtype != torch.bfloat16:
        return x
    x = rows(x)
    out = empty(x, *x.shape, dtype=torch.float32)
    _C.widen(*x.shape, x.data_ptr(), x.stride(0), out.data_ptr(), torch.get_num_threads())
    return out


def narrowed(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous f32 [rows, columns] rounded to bf16 where that is wanted."""
    if dtype != torch.bfloat16:
        return y
    out = empty(y, *y.shape, dtype=dtype)
    _C.narrow(*y.shape, y.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def rows(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous each, else a contiguous copy: what the kernels take."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def matrices(w: Tensor) -> Tensor:
    """w [E, N, K] itself if K is contiguous, else a copy."""
    return w if w.stride(-1) == 1 else w.contiguous()


def check_float(op: str, **tensors: Tensor) -> None:
    """All of one floating dtype and one device."""
    (first, want), *others = tensors.items()
    if not want.dtype.is_floating_point:
        raise TypeError(f"{op}: {first} must be floating point, found {want.dtype}")
    for name, tensor in others:
        if tensor.dtype != want.dtype:
            raise TypeError(
                f"{op}: {name} must have the dtype of {first}, {want.dtype}, found {tensor.dtype}"
            )
        if tensor.device != want.device:
            raise ValueError(
                f"{op}: {name} must lie where {first} does, on {want.device}, found {tensor.device}"
            )


def check_shape(op: str, name: str, tensor: Tensor, wanted: tuple[int | str, ...]) -> None:
    """wanted names free dimensions by a letter and fixes others by a number."""
    shape = tuple(tensor.shape)
    if len(shape) != len(wanted) or any(
        isinstance(w, int) and w != s for w, s in zip(wanted, shape, strict=True)
    ):
        text = ", ".join(map(str, wanted))
        raise ValueError(f"{op}: {name} must be [{text}], found {list(shape)}")


def check_index(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, found {tensor.dtype}")


def check_offsets(op: str, offsets: Tensor, experts: int, rows: int) -> None:
    """offsets [E+1] rises from 0 to the number of rows; its values are looked at on a CPU only."""
    check_shape(op, "offsets", offsets, (experts + 1,))
    check_index(op, "offsets", offsets)
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling() and type(offsets) is Tensor:
        ends = offsets.tolist()
        if ends[0] != 0 or ends[-1] != rows or any(b < a for a, b in pairwise(ends)):
            raise ValueError(f"{op}: offsets must rise from 0 to {rows}, the rows of x, found {_brief(ends)}")


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{values[:4]} ... {values[-3:]}"
