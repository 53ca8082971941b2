"""The layers that are raced, their loads, and what they cost in FLOPs and bytes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """E experts of which k run for each of T tokens, hidden size H, intermediate size I."""

    name: str
    E: int
    k: int
    H: int
    I: int
    T: int

    def __str__(self) -> str:
        return f"{self.name}-E{self.E}-k{self.k}-H{self.H}-I{self.I}-T{self.T}"

    @property
    def R(self) -> int:
        return self.T * self.k

    @property
    def flops(self) -> int:
        """Forward: gate, up and down of every routed row.  Backward is twice that."""
        return 6 * self.R * self.H * self.I

    @property
    def weights(self) -> int:
        """Elements of all experts' weights."""
        return 3 * self.E * self.H * self.I


A = Shape("A", E=96, k=1, H=1024, I=512, T=2048)
DECODE = replace(A, name="decode", T=16)
SIGMA_MOE_TINY = Shape("sigma-moe-tiny", E=96, k=1, H=1536, I=768, T=2048)  # arXiv 2512.16248
QWEN3_30B_A3B = Shape("qwen3-30b-a3b", E=128, k=8, H=2048, I=768, T=512)
OLMOE = Shape("olmoe", E=64, k=8, H=2048, I=1024, T=512)
SWITCH = Shape("switch-base-64", E=64, k=1, H=768, I=3072, T=2048)  # its sizes; SwiGLU where it has ReLU

LAYERS = [A, DECODE, SIGMA_MOE_TINY, QWEN3_30B_A3B, OLMOE, SWITCH]
LOADS = ["balanced", "zipf"]
DTYPES = [torch.float32, torch.bfloat16]


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


def choices(shape: Shape, load: str) -> Tensor:
    """index [T, k] int64: every expert equally often, or expert e with a share of 1 / (e + 1)**1.2."""
    generator = torch.Generator().manual_seed(0)
    if load == "balanced":
        by_token = (torch.arange(shape.R) % shape.E).view(shape.T, shape.k)
        return by_token[torch.randperm(shape.T, generator=generator)]
    share = 1 / torch.arange(1, shape.E + 1) ** 1.2
    return torch.multinomial(
        share.expand(shape.T, -1), shape.k, generator=generator
    )  # k different ones a token


def layer_inputs(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """x [T, H], weights [T, k], gate_up [E, 2I, H], down [E, H, I]: outputs of unit size."""
    generator = torch.Generator().manual_seed(1)
    T, k, E, H, I = shape.T, shape.k, shape.E, shape.H, shape.I
    return [
        torch.randn(T, H, generator=generator).to(dtype),
        torch.rand(T, k, generator=generator).to(dtype),
        torch.empty(E, 2 * I, H).normal_(std=H**-0.5, generator=generator).to(dtype),
        torch.empty(E, H, I).normal_(std=I**-0.5, generator=generator).to(dtype),
    ]
