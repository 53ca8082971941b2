"""What no layer can beat on this machine: the same FLOPs in one dense layer, the same bytes in one stream."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert for all rows: x [R, H], gate_up [2I, H], down [H, I]."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def of_dtypes(
    name: str, make: Callable[[torch.dtype], Callable[[], object]], dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """The bound in this dtype, and in a narrower one the same in f32 beside it, which may be faster."""
    dtypes = {"": dtype} if dtype == torch.float32 else {"": dtype, "_f32": torch.float32}
    return {f"bound_{name}{suffix}": make(each) for suffix, each in dtypes.items()}


def read(*tensors: Tensor) -> Callable[[], object]:
    """Read every byte once."""
    return lambda: [t.sum() for t in tensors]


def read_write(read: Sequence[Tensor], written: Sequence[Tensor], added: bool) -> Callable[[], object]:
    """Read these twice, forward and for the input gradient; write as much as those hold, or add to it."""
    targets = [torch.zeros_like(t) for t in written]  # touched

    def run() -> None:
        for t in (*read, *read):
            t.sum()
        for t in targets:
            t.neg_() if added else t.zero_()

    return run


def copy(*tensors: Tensor) -> Callable[[], object]:
    """Read every byte once and write it once, into memory that has been touched."""
    targets = [torch.empty_like(t).copy_(t) for t in tensors]
    return lambda: [target.copy_(t) for target, t in zip(targets, tensors, strict=True)]
