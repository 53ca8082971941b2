"""Triton's interpreter, made right in bf16 and strict about addresses.

As installed it adds and multiplies the bits of bf16 as integers.

It keeps bf16 in uint16, which numpy takes for numbers, and truncates where it rounds, fp8 too.  Our kernels widen what
they load, so that only conversions and the operands of tl.dot are narrow: these are mended here, rounding to nearest
even as a GPU does.  test_triton_interpreter.py tells when upstream changes any of it.

It reads and writes wherever a kernel says.  Here an address that is not of a tensor of the launch raises; or it is
written down, and what would be read there is taken for zero, so that arithmetic on addresses can be tried at sizes that
no memory has.

And it replaces the functions of triton.language anew wherever a kernel calls a function of its own, which took a third
of the time of a launch; here once a launch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e4b8: torch.float8_e4m3fnuz}

_memory: list[tuple[int, int]] = []  # first address and end of each tensor of the running launch
_outside: list[np.ndarray] | None = None  # where other addresses are written down; None: they raise


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 in uint16 as f32: the upper half of its bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """f32 as bf16 in uint16, to nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    even = (bits >> 16) & 1
    rounded = ((bits + 0x7FFF + even) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(x.shape)


def _is_bf16(dtype: tl.dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _wide(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar in FP8:
        bits = torch.from_numpy(np.ascontiguousarray(handle.data)).view(FP8[handle.dtype.scalar])
        return TensorHandle(bits.float().numpy(), tl.float32)
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle.dtype) else handle


@contextmanager
def addresses_outside() -> Iterator[list[np.ndarray]]:
    """Those of the launches inside that are in no tensor; nothing is read or written there."""
    global _outside
    _outside = []
    yield _outside
    _outside = None


def inside(pointers: TensorHandle, mask: TensorHandle) -> TensorHandle:
    """The mask, less what is in no tensor."""
    addresses, size = pointers.data.astype(np.int64), pointers.get_element_ty().primitive_bitwidth // 8
    is_inside = np.zeros(addresses.shape, bool)
    for first, end in _memory:
        is_inside |= (addresses >= first) & (addresses + size <= end)
    is_wrong = mask.data.astype(bool) & ~is_inside
    if not is_wrong.any():
        return mask
    if _outside is None:
        raise IndexError(f"{is_wrong.sum()} addresses are in no tensor of the launch")
    _outside.append(addresses[is_wrong])
    return TensorHandle(mask.data.astype(bool) & is_inside, tl.int1)


def patch_once_a_launch() -> None:
    """What one function of a kernel has replaced is so for the others of its file as well."""
    patch, call = interpreter._patch_lang, GridExecutor.__call__
    done: set[int] = set()  # the globals of the functions seen in this launch

    def patched(function):
        scope = None if id(function.__globals__) in done else patch(function)
        done.add(id(function.__globals__))
        return scope

    def launched(self, *args, **named):
        done.clear()
        return call(self, *args, **named)

    interpreter._patch_lang, GridExecutor.__call__ = patched, launched


def install() -> None:
    """Mend the interpreter of this process."""
    to_host, load, store = (
        GridExecutor._init_args_hst,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def known(self, args, kwargs):
        host = to_host(self, args, kwargs)
        storages = [
            x.untyped_storage()
            for y in (*host[0], *host[1].values())
            if hasattr(x := getattr(y, "base", y), "untyped_storage")  # a descriptor has its tensor as `base`
        ]
        _memory[:] = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages]
        return host

    GridExecutor._init_args_hst = known
    patch_once_a_launch()
    InterpreterBuilder.create_masked_load = lambda self, at, mask, *rest, **named: load(
        self, at, inside(at, mask), *rest, **named
    )
    InterpreterBuilder.create_masked_store = lambda self, at, value, mask, *rest, **named: store(
        self, at, value, inside(at, mask), *rest, **named
    )
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def right_cast(self, source, target):
        if not _is_bf16(target):
            return cast(self, _wide(source), target)
        wide = _wide(source)
        return TensorHandle(narrow(wide.data.astype(np.float32)), tl.bfloat16)

    def right_dot(self, a, b, *rest):
        a, b = (TensorHandle(h.data.astype(np.float32), tl.float32) for h in (_wide(a), _wide(b)))
        return dot(self, a, b, *rest)

    fp_to_fp = InterpreterBuilder.create_fp_to_fp

    def right_fp_to_fp(self, source, target, rounding):
        if target.scalar not in FP8:
            return fp_to_fp(self, source, target, rounding)
        wide = torch.from_numpy(np.ascontiguousarray(_wide(source).data, dtype=np.float32))
        return TensorHandle(wide.to(FP8[target.scalar]).view(torch.uint8).numpy(), target.scalar)

    InterpreterBuilder.create_fp_to_fp = right_fp_to_fp
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = right_cast, right_dot
