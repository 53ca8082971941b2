"""KTransformers' expert layer on the CPU, bf16, by the package kt-kernel.

`pip install --no-deps --target peers kt-kernel gguf`; PYTHONPATH=peers shows it to us.  Without its dependencies, as
it wants another torch than ours, for its own modules on a GPU.  Its wrapper class reads checkpoints from files; below
is what that class does with the extension, on tensors.
"""

from functools import cache
from typing import Any

import torch
from race import CannotRun
from torch import Tensor


@cache
def extension() -> Any:
    try:
        import kt_kernel
    except ImportError as error:
        raise CannotRun(f"the package kt-kernel is not installed, or lacks something: {error}") from error
    return kt_kernel.kt_kernel_ext


@cache
def pool(threads: int) -> Any:
    """One pool of threads for the process: they spin while they wait."""
    settings = extension().WorkerPoolConfig()
    settings.subpool_count, settings.subpool_numa_map, settings.subpool_thread_count = 1, [0], [threads]
    return extension().CPUInfer(settings)


class Layer:
    """Its own packed copy of the weights, made once, as inference may."""

    def __init__(self, T: int, k: int, gate_up: Tensor, down: Tensor) -> None:
        if down.dtype != torch.bfloat16:
            raise CannotRun("kt-kernel has no f32 experts")
        E, H, I = down.shape
        if H % 32 or I % 32:
            raise CannotRun("kt-kernel wants H and I in multiples of 32")
        moe = extension().moe
        if not hasattr(moe, "AMXBF16_MOE"):
            raise CannotRun("kt-kernel's bf16 experts need AVX512-BF16")
        self.pool, self.k = pool(torch.get_num_threads()), k
        on_gpu = torch.zeros(E, dtype=torch.bool)
        config = moe.MOEConfig(E, k, H, I, on_gpu.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, self.pool.backend_, max(T, 16)
        gate, up = (part.contiguous() for part in gate_up.chunk(2, 1))
        config.gate_projs, config.up_projs, config.down_projs = (
            [[expert.data_ptr() for expert in part]] for part in (gate, up, down)
        )
        self.layer = moe.AMXBF16_MOE(config)
        order = torch.arange(E)
        self.pool.submit(self.layer.load_weights_task(order.data_ptr()))
        self.pool.sync()
        self.on_gpu, self.rows = on_gpu, torch.tensor([T], dtype=torch.int32)
        self.out = torch.empty(T, H, dtype=down.dtype)

    def __call__(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        weights = weights.float()
        self.pool.submit(
            self.layer.forward_task(
                self.rows.data_ptr(), self.k, index.data_ptr(), weights.data_ptr(), x.data_ptr(),
                self.out.data_ptr(), False,
            )
        )  # fmt: skip
        self.pool.sync()
        return self.out
