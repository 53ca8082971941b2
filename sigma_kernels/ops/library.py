"""The torch library `sigma` and what every operation's file needs: registration, checks, native memory."""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from sigma_kernels import _C
from sigma_kernels.routing import Routing

LIB = torch.library.Library("sigma", "FRAGMENT")
NATIVE = (torch.float32,)
STORED = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels take as it is stored; sums are f32
REFERENCE = (torch.float32, torch.float64)
NO_SUMS = (True, 0, 0)  # of a router: whether of softmax, and where the probabilities' and the square's lie

_LARGE = (
    32 << 20
)  # bytes: what malloc takes from the system anew each time, at most (mallopt(3), M_MMAP_THRESHOLD)
_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register one operation: its schema, its implementation for all devices, and its shapes."""
    name = schema.split("(")[0]
    LIB.define(schema)
    LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sigma::{name}", fake, lib=LIB)
    return getattr(torch.ops.sigma, name).default


def is_recorded(*inputs: Any) -> bool:
    """Whether a call on these must go through autograd; under torch.no_grad() it need not, and costs less.

    Decoding pays for every function on the way: its weights, streamed, leave none of them in a cache.
    """
    return torch.is_grad_enabled() or any(isinstance(x, Tensor) and has_tangent(x) for x in inputs)


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation runs and x takes part: a bare operation answers it with zeros."""
    return not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None


def differentiable(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> Callable[..., Any]:
    """The operation `sigma::name` with its gradient, for public functions to call.

    The same gradient is registered for torch.compile and callers of torch.ops.  There torch.func.grad raises and
    forward-mode differentiation answers with zeros; what this returns does the first and refuses the second.
    """
    torch.library.register_autograd(f"sigma::{name}", backward, setup_context=setup, lib=LIB)
    op = getattr(torch.ops.sigma, name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return op(*inputs)

        setup_context = staticmethod(setup)

    Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]
    Differentiable.__name__ = Differentiable.__qualname__ = name

    def call(*inputs: Any) -> Any:
        is_bare = torch.compiler.is_compiling() or not is_recorded(*inputs)
        return op(*inputs) if is_bare else Differentiable.apply(*inputs)

    return call


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
    """int64 as int32; what does not fit becomes the nearest int32, which no number of experts or rows allows."""
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


def saved_dtype(x: Tensor) -> torch.dtype:
    """Of the numbers before SwiGLU that the layer keeps for its backward: f32, but on a GPU as narrow as x.

    A CPU's kernels compute on in what they have; a GPU's memory holds the activations of every layer at once.
    """
    return torch.promote_types(x.dtype, torch.float32) if x.is_cpu else x.dtype


def empty_cache() -> None:
    """Give the memory of freed large tensors back to the system.

    Results and gradients of 32 MiB and more lie in blocks that stay with the library when they are freed, so that the
    next step does not pay for fresh pages.  Blocks in use and kept never exceed the most that was in use at once, and
    the system may take the pages of kept ones when it runs short of memory; this gives them back at once.
    """
    _C.release_free_blocks()


SUFFIX = {torch.float32: "", torch.bfloat16: "_bf16", torch.float16: "_f16", torch.int8: "_int8"}


def native(name: str, dtype: torch.dtype) -> Any:
    """The function or class of _C that computes `name` on tensors of this dtype as they lie."""
    return getattr(_C, name + SUFFIX[dtype])


def operand(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """x [rows, columns] as a GEMM's kernel takes it: f32, or bf16 where the processor multiplies it by bf16 weights."""
    x = rows(x)
    is_taken = (
        x.dtype == torch.bfloat16 and _C.multiplies_bf16() and (weight is None or weight.dtype == x.dtype)
    )
    return x if is_taken else widened(x)


def gemm_kernel(name: str, operand: Tensor, weight: Tensor, result: str = "") -> Any:
    """The function or class of _C for these dtypes of the left operand and of the weights.

    result: "_f32" where it is stored in f32 beside narrower weights.
    """
    is_widened = weight.dtype == torch.bfloat16 and operand.dtype == torch.float32
    return getattr(_C, name + ("_widened" if is_widened else SUFFIX[weight.dtype]) + result)


def widened(x: Tensor) -> Tensor:
    """bf16 or f16 [rows, columns] as contiguous f32; any other x itself."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return x
    x = rows(x)
    out = empty(x, *x.shape, dtype=torch.float32)
    native("widen", x.dtype)(*x.shape, x.data_ptr(), x.stride(0), out.data_ptr(), torch.get_num_threads())
    return out


def rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y [rows, columns] itself if it has that dtype, else rounded from contiguous f32 to bf16 or f16."""
    if y.dtype == dtype:
        return y
    out = empty(y, *y.shape, dtype=dtype)
    native("narrow", dtype)(*y.shape, y.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def address(x: Tensor | None) -> int:
    """Where x begins; 0 where there is none."""
    return 0 if x is None else x.data_ptr()


def rows(x: Tensor) -> Tensor:
    """x itself if its rows are contiguous each, else a contiguous copy: what the kernels take."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def matrices(w: Tensor) -> Tensor:
    """w [E, N, K] itself if K is contiguous, else a copy."""
    return w if w.stride(-1) == 1 else w.contiguous()


def in_autocast(x: Tensor) -> bool:
    """Whether torch.autocast is on where x lies; meta knows none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def as_weights(x: Tensor, weight: Tensor) -> Tensor:
    """x in the dtype of the weights under torch.autocast, which casts floats but no f64; else x itself."""
    if x.dtype == weight.dtype or x.dtype not in _AUTOCAST or not in_autocast(x):
        return x
    return x.to(weight.dtype)


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
        check_device(op, name, tensor, first, want)


def check_device(op: str, name: str, tensor: Tensor, first: str, want: Tensor) -> None:
    """tensor lies where the tensor `want`, named `first`, does."""
    if tensor.device != want.device:
        raise ValueError(f"{op}: {name} must lie where {first} does, on {want.device}, found {tensor.device}")


def check_tensor(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, found {type(x).__name__}")


def check_size(op: str, name: str, size: Any) -> None:
    if not _is_integer(size):
        found = f"a Tensor {list(size.shape)} of {size.dtype}" if isinstance(size, Tensor) else repr(size)
        raise TypeError(f"{op}: {name} must be an integer, found {found}")
    if size < 1:
        raise ValueError(f"{op}: {name} must be at least 1, found {size}")


def _is_integer(x: Any) -> bool:
    """A tensor of one integer is one, of a float or a bool none, though each has an __index__."""
    if isinstance(x, int | torch.SymInt):  # first: the index of a SymInt is a constant of the graph
        return not isinstance(x, bool)
    try:
        operator.index(x)
    except TypeError:
        return False
    return getattr(x, "dtype", None) != torch.bool


def check_shape(op: str, name: str, tensor: Tensor, wanted: tuple[int | str, ...]) -> None:
    """wanted names free dimensions by a letter and fixes others by a number."""
    shape = tensor.shape
    fits = len(shape) == len(wanted)
    for want, size in zip(wanted, shape, strict=False):
        fits = fits and (want == size or isinstance(want, str))
    if not fits:
        text = ", ".join(map(str, wanted))
        raise ValueError(f"{op}: {name} must be [{text}], found {list(shape)}")


def check_index(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, found {tensor.dtype}")


def check_experts(
    op: str,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
) -> tuple[int, int, int]:
    """E, H and I of an expert layer whose tensors have the shapes of `moe_experts`."""
    check_index(op, "top_k_index", top_k_index)
    check_device(op, "top_k_index", top_k_index, "hidden_states", hidden_states)
    check_shape(op, "hidden_states", hidden_states, ("T", "H"))
    T, H = hidden_states.shape
    check_shape(op, "top_k_index", top_k_index, (T, "k"))
    k = top_k_index.shape[1]
    check_shape(op, "top_k_weights", top_k_weights, (T, k))
    check_shape(op, "down_proj", down_proj, ("E", H, "I"))
    E, _, I = down_proj.shape
    check_shape(op, "gate_up_proj", gate_up_proj, (E, 2 * I, H))
    if k == 0 or E == 0:
        raise ValueError(f"{op}: at least one expert must be there and chosen, found E={E}, k={k}")
    return E, H, I


def check_offsets(op: str, name: str, offsets: Tensor, experts: int, first: str, data: Tensor) -> None:
    """offsets [E+1]; `risen` looks at their values."""
    check_shape(op, name, offsets, (experts + 1,))
    check_index(op, name, offsets)
    check_device(op, name, offsets, first, data)


def check_routing(op: str, routing: Routing, first: str, data: Tensor) -> tuple[int, int]:
    """T and k of a routing whose map fits them; `slots` looks at its values."""
    indices, row_map = routing.indices, routing.row_map
    if indices.dim() != 2 or indices.shape[1] == 0:
        raise ValueError(f"{op}: routing.indices must be [T, k] with k > 0, found {list(indices.shape)}")
    T, k = indices.shape
    check_shape(op, "routing.row_map", row_map, ("R",))
    if row_map.shape[0] > T * k:
        raise ValueError(
            f"{op}: routing.row_map must be [R], R <= {T * k} = T*k, found {list(row_map.shape)}"
        )
    if row_map.dtype != torch.int32:
        raise TypeError(f"{op}: routing.row_map must be int32, found {row_map.dtype}")
    check_device(op, "routing.row_map", row_map, first, data)
    return T, k


def risen(op: str, name: str, offsets: Tensor, of: str, data: Tensor) -> Tensor:
    """offsets as the kernels take them: int32, contiguous and, on a CPU, seen to rise from 0 to the rows of `data`.

    Operations call it themselves, since values are not there yet where torch.compile traces what calls them.
    """
    narrow, R = saturated(offsets).contiguous(), data.shape[0]
    if narrow.is_cpu and not _C.rises(narrow.data_ptr(), narrow.shape[0] - 1, R):
        found = _brief(offsets.tolist())
        raise ValueError(f"{op}: {name} must rise from 0 to {R}, the rows of {of}, found {found}")
    return narrow


def slots(op: str, row_map: Tensor, count: int) -> Tensor:
    """row_map as the kernels take it: contiguous and, on a CPU, seen to name none of `count` slots twice.

    Looking costs 0.2 us at 16 rows and 1.5 us at 2,048 (2 cores, AVX-512), so that no routing need be trusted.
    """
    row_map = row_map.contiguous()
    R = row_map.shape[0]
    if row_map.is_cpu and (wrong := _C.wrong_row(row_map.data_ptr(), R, count)) >= 0:
        raise ValueError(
            f"{op}: routing.row_map must name each slot of 0..{count - 1} once, "
            f"found {int(row_map[wrong])} at row {wrong}"
        )
    return row_map


def row_of_slot(row_map: Tensor, count: int) -> Tensor:
    """[count] int32 on a CPU, -1 for a slot that has no row."""
    out = rows_of_slots(row_map, count)
    _C.invert(row_map.data_ptr(), row_map.shape[0], out.data_ptr())
    return out


def rows_of_slots(row_map: Tensor, count: int) -> Tensor:
    """Memory for the row of each slot, -1 where row_map will name none."""
    return torch.empty_like(row_map) if row_map.shape[0] == count else row_map.new_full((count,), -1)


def weights_of_slots(weights: Tensor, row_map: Tensor) -> Tensor:
    """Memory for the gradient of weights [T, k], zero where row_map names no row."""
    return torch.empty_like(weights) if weights.numel() == row_map.shape[0] else torch.zeros_like(weights)


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{values[:4]} ... {values[-3:]}"
