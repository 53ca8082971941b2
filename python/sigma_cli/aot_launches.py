"""What the layer would launch on a GPU that is not there: its own launchers, run on tensors without memory.

Nothing is listed by hand, so the kernels that are compiled and judged are those that a call compiles: same
configuration from the same table, same types, same alignment of pointers and sizes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

from sigma_kernels.triton import experts, group, grouped_gemm, grouped_outer, permute, router_sums, tiles


@dataclass(frozen=True)
class Shape:
    """A layer: T tokens, k of E experts each, H wide, I within."""

    T: int
    E: int
    k: int
    H: int
    I: int

    @property
    def rows(self) -> float:
        """Of an expert, where all have the same."""
        return self.T * self.k / self.E


@dataclass(frozen=True)
class Launch:
    """A call of a kernel that was written down instead of made."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removesuffix("_kernel")

    @property
    def bound(self) -> dict[str, Any]:
        """Arguments by name, keywords among them."""
        return {**dict(zip(self.kernel.arg_names, self.args, strict=False)), **self.options}

    def compiled(self, target: GPUTarget) -> CompiledKernel:
        """The kernel as the first such call on this target would compile it; no driver is asked."""
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        args = [MockTensor(x.dtype) if isinstance(x, Tensor) else x for x in self.args]
        bound, specialization, options = bind(*args, **self.options)
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, self.options, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return compile_source(source, target=target, options=options.__dict__)


@contextmanager
def recorded(architecture: str, processors: int) -> Iterator[list[Launch]]:
    """Launches inside are put into the list; a tensor on `meta` is taken for one on a GPU of this kind."""
    launches: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, grid, args, options))

    with (
        patch.object(JITFunction, "run", run),
        patch.object(tiles, "architecture", lambda device: architecture),
        patch.object(tiles, "processors", lambda device: processors),
    ):
        yield launches


def layer(shape: Shape, dtype: torch.dtype, architecture: str, processors: int) -> list[Launch]:
    """The layer's products, forward and backward, in order."""
    (T, E, k, H, I), R = (shape.T, shape.E, shape.k, shape.H, shape.I), shape.T * shape.k
    with recorded(architecture, processors) as launches:
        x, grad = (torch.empty(T, H, dtype=dtype, device="meta") for _ in range(2))
        weights = torch.empty(T, k, dtype=dtype, device="meta")
        gate_up = torch.empty(E, 2 * I, H, dtype=dtype, device="meta")
        down = torch.empty(E, H, I, dtype=dtype, device="meta")
        offsets = torch.empty(E + 1, dtype=torch.int32, device="meta")
        row_map = torch.empty(R, dtype=torch.int32, device="meta")
        saved = x, weights, offsets, row_map, gate_up, down
        _, kept = experts.forward(*saved)
        experts.backward(grad, *saved, kept, [True, True, True], dtype)
    return launches


def others(shape: Shape, dtype: torch.dtype, architecture: str, processors: int) -> list[Launch]:
    """Every other kernel, and other forms of products: alone, adding, keeping nothing, in int8, fp8, adding to f32."""
    (T, E, k, H, I), R = (shape.T, shape.E, shape.k, shape.H, shape.I), shape.T * shape.k
    with recorded(architecture, processors) as launches:
        logits, bias = torch.empty(T, E, device="meta"), torch.empty(E, device="meta")
        indices = torch.empty(T, k, dtype=torch.int32, device="meta")
        _, offsets, row_map = group.group_by_expert(indices, E)
        for softmax, normalize in ((True, False), (False, True)):
            how = softmax, normalize, None if softmax else bias, softmax
            weights, probabilities, square, indices, *_ = router_sums.route_with_sums(logits, k, *how)
            sums = weights, probabilities, square, logits, indices
            router_sums.route_with_sums_backward(*sums, softmax, normalize, softmax)
        x, weights = torch.empty(T, H, dtype=dtype, device="meta"), weights.to(dtype)
        y = permute.permute(x, row_map, k)
        permute.unpermute(y, row_map, weights, k, T)
        permute.unpermute_backward(x, y, row_map, weights)
        w = torch.empty(E, I, H, dtype=dtype, device="meta")
        for weight, transpose in ((w, True), (w.transpose(1, 2), False)):
            grouped_gemm.grouped_gemm(y, weight, offsets, transpose)
        grouped_outer.grouped_outer(w, y.new_empty(R, I), y, offsets, True)
        w1, w2 = (torch.empty(E, *shape, dtype=dtype, device="meta") for shape in ((2 * I, H), (H, I)))
        saved = x, weights, offsets, row_map, w1, w2
        _, kept = experts.forward(*saved)
        experts.forward(*saved, saves=False)
        experts.backward(x, *saved, kept, [True, True, True], dtype, (w1, w2))
        if dtype != torch.float32:
            wide = tuple(torch.empty_like(w, dtype=torch.float32) for w in (w1, w2))
            for into in (None, wide):
                experts.backward(x, *saved, kept, [False, True, True], torch.float32, into)
        int8 = {"dtype": torch.int8, "device": "meta"}
        gate_up, down = torch.empty(E, 2 * I, H, **int8), torch.empty(E, H, I, **int8)
        scales = torch.empty(E, 2 * I, device="meta"), torch.empty(E, H, device="meta")
        experts.inference(x, indices, weights, gate_up, down, *scales)
        if architecture != "sm_80":
            fp8 = {"dtype": torch.float8_e4m3fn, "device": "meta"}
            gate_up, down = torch.empty(E, 2 * I, H, **fp8), torch.empty(E, H, I, **fp8)
            experts.inference_fp8(x, indices, weights, gate_up, down, *scales)
            blocks = (
                torch.empty(E, 2 * I // 128, H // 128, device="meta"),
                torch.empty(E, H // 128, I // 128, device="meta"),
            )
            experts.inference_fp8(x, indices, weights, gate_up, down, *blocks)
    return launches
