"""KTransformers' expert layer on the CPU, bf16, by the package kt-kernel.

`pip install --no-deps --target peers kt-kernel gguf`; PYTHONPATH=peers shows it to us.  Without its dependencies, as
it wants another torch than ours, for its own modules on a GPU.  Its wrapper for inference reads checkpoints from files;
`Layer` is what that class does with the extension, on tensors.  Its wrapper for training takes tensors.
"""

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import torch
from race import CannotRun
from torch import Tensor


@cache
def package() -> Any:
    try:
        import kt_kernel
    except ImportError as error:
        raise CannotRun(f"the package kt-kernel is not installed, or lacks something: {error}") from error
    return kt_kernel


def extension() -> Any:
    return package().kt_kernel_ext


@cache
def pool(threads: int) -> Any:
    """One pool of threads for the process: they spin while they wait."""
    settings = extension().WorkerPoolConfig()
    settings.subpool_count, settings.subpool_numa_map, settings.subpool_thread_count = 1, [0], [threads]
    return extension().CPUInfer(settings)


def must_be_bf16(down: Tensor) -> None:
    """Raises: CannotRun, also for sizes that it does not take."""
    if down.dtype != torch.bfloat16:
        raise CannotRun("kt-kernel has no f32 experts")
    if down.shape[1] % 32 or down.shape[2] % 32:
        raise CannotRun("kt-kernel wants H and I in multiples of 32")


class Layer:
    """Forward alone.  Its own packed copy of the weights, made once, as inference may."""

    def __init__(self, T: int, k: int, gate_up: Tensor, down: Tensor) -> None:
        must_be_bf16(down)
        E, H, I = down.shape
        moe = extension().moe
        # The faster one first.
        kernels = [name for name in ("AMXBF16_MOE", "AVX2BF16_MOE") if hasattr(moe, name)]
        if not kernels:
            raise CannotRun("kt-kernel has no bf16 experts for this processor")
        self.pool, self.k = pool(torch.get_num_threads()), k
        on_gpu = torch.zeros(E, dtype=torch.bool)
        config = moe.MOEConfig(E, k, H, I, on_gpu.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, self.pool.backend_, max(T, 16)
        gate, up = (part.contiguous() for part in gate_up.chunk(2, 1))
        config.gate_projs, config.up_projs, config.down_projs = (
            [[expert.data_ptr() for expert in part]] for part in (gate, up, down)
        )
        self.layer = getattr(moe, kernels[0])(config)
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


class Training:
    """Forward, backward and gradients of the weights, which it keeps in memory of its own and gives out as `.grad`.

    Called, one turn: gradients are released at its end, or added to.  Weights are packed once; after a step of an
    optimizer they would be anew.  Written after the package's sources: no processor that it wants was at hand, so
    whatever it raises is the reason why it takes no part.
    """

    def __init__(self, leaves: Sequence[Tensor], index: Tensor, grad_out: Tensor, releases: bool) -> None:
        """leaves: x, weights, gate_up and down."""
        self.inputs, self.index = [leaf.detach() for leaf in leaves], index
        self.grad_out, self.releases = grad_out, releases
        self.of_inputs: tuple[Tensor, ...] = ()

    @cached_property
    def experts(self) -> Any:
        x, _, gate_up, down = self.inputs
        must_be_bf16(down)
        if not hasattr(extension().moe, "AMXBF16_SFT_MOE"):
            raise CannotRun("kt-kernel trains experts with AVX512-BF16 alone")
        E, H, I = down.shape
        made = package().KTMoEWrapper(
            layer_idx=0, num_experts=E, num_experts_per_tok=self.index.shape[1], hidden_size=H,
            moe_intermediate_size=I, gpu_experts_mask=None, cpuinfer_threads=torch.get_num_threads(),
            threadpool_count=1, weight_path="", chunked_prefill_size=len(x), mode="sft", method="AMXBF16_SFT",
            lora_rank=0, full_weight_grad=True,
        )  # fmt: skip
        parts = [*(part.contiguous() for part in gate_up.chunk(2, 1)), down]
        made.load_weights_from_tensors(*parts, torch.arange(E))
        made.init_full_weight_grad_buffers(*parts)
        return made

    def __call__(self) -> None:
        try:
            self._step()
            if self.releases:
                self.experts.release_authoritative_optimizer_grads()
        except CannotRun:
            raise
        except Exception as error:
            raise CannotRun(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error

    def _step(self) -> None:
        x, weights, _, _ = self.inputs
        self.experts.forward(x, self.index, weights, save_for_backward=True)
        self.of_inputs = self.experts.backward(self.grad_out)

    def gradients(self) -> list[Tensor]:
        """Made once more: of x, weights, gate_up and down."""
        self.experts.release_authoritative_optimizer_grads()
        self._step()
        gate, up, down = (getattr(self.experts, f"{name}_proj_buf").grad for name in ("gate", "up", "down"))
        return [*self.of_inputs, torch.cat([gate, up], 1), down]
