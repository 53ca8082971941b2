"""llama.cpp's expert layer: three ggml_mul_mat_id and what lies between them, by the package ggml-python.

`pip install --no-deps --target peers ggml-python` builds it for this machine; PYTHONPATH=peers shows it to us.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from race import CannotRun
from torch import Tensor


class Layer:
    """One graph for inputs of one size: x [T, H], index and weights [T, k]; weights of experts are not copied."""

    def __init__(self, T: int, k: int, gate_up: Tensor, down: Tensor) -> None:
        try:
            import ggml
        except ImportError as error:
            raise CannotRun("the package ggml-python is not installed") from error
        self.ggml = ggml
        E, H, I = down.shape
        types = {torch.float32: ggml.GGML_TYPE_F32, torch.bfloat16: ggml.GGML_TYPE_BF16}
        stored = types[down.dtype]
        self.context = ggml.ggml_init(ggml.ggml_init_params(mem_size=1 << 20, mem_buffer=None, no_alloc=True))
        self.memory: list[Tensor] = [gate_up, down]
        self.x, self.weights = torch.empty(T, H), torch.empty(T, k)
        self.index = torch.empty(T, k, dtype=torch.int32)
        steps = [s * down.itemsize for s in (1, H, 2 * I * H, 2 * I * H * E)]
        gate = self.wrap(gate_up, stored, (H, I, E), steps)
        up = self.wrap(gate_up[:, I:], stored, (H, I, E), steps)
        x = self.wrap(self.x, ggml.GGML_TYPE_F32, (H, 1, T))
        index = self.wrap(self.index, ggml.GGML_TYPE_I32, (k, T))
        weights = self.wrap(self.weights, ggml.GGML_TYPE_F32, (1, k, T))
        product = lambda w, rows: self.filled(ggml.ggml_mul_mat_id(self.context, w, rows, index))  # noqa: E731
        active = self.filled(ggml.ggml_silu(self.context, product(gate, x)))
        hidden = self.filled(ggml.ggml_mul(self.context, active, product(up, x)))
        y = self.filled(
            ggml.ggml_mul(self.context, product(self.wrap(down, stored, (I, H, E)), hidden), weights)
        )
        self.by_slot = self.memory[-1].view(T, k, H)
        self.graph = ggml.ggml_new_graph(self.context)
        ggml.ggml_build_forward_expand(self.graph, y)
        self.plan = ggml.ggml_graph_plan(self.graph, torch.get_num_threads(), None)
        self.work = torch.empty(self.plan.work_size + 64, dtype=torch.uint8)
        self.plan.work_data = ctypes.cast(self.work.data_ptr(), ctypes.POINTER(ctypes.c_uint8))

    def wrap(self, data: Tensor, kind: int, shape: Sequence[int], steps: Sequence[int] = ()) -> Any:
        """A tensor of ggml over memory of torch; ggml names the innermost dimension first."""
        tensor = self.ggml.ggml_new_tensor(
            self.context, kind, len(shape), (ctypes.c_int64 * len(shape))(*shape)
        )
        tensor.contents.data = data.data_ptr()
        for i, step in enumerate(steps):
            tensor.contents.nb[i] = step
        return tensor

    def filled(self, tensor: Any) -> Any:
        """The result of a step of the graph, with memory."""
        self.memory.append(torch.empty(self.ggml.ggml_nelements(tensor)))
        tensor.contents.data = self.memory[-1].data_ptr()
        return tensor

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.x.copy_(x)
        self.index.copy_(index)
        self.weights.copy_(weights)
        self.ggml.ggml_graph_compute(self.graph, ctypes.byref(self.plan))
        return self.by_slot.sum(1).to(x.dtype)

    def __del__(self) -> None:
        if hasattr(self, "context"):
            self.ggml.ggml_free(self.context)
