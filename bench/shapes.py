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
A_TOP_8 = replace(A, k=8)
SIGMA_MOE_TINY = Shape("sigma-moe-tiny", E=96, k=1, H=1536, I=768, T=2048)  # arXiv 2512.16248
QWEN3_30B_A3B = Shape("qwen3-30b-a3b", E=128, k=8, H=2048, I=768, T=512)
OLMOE = Shape("olmoe", E=64, k=8, H=2048, I=1024, T=512)
SWITCH = Shape("switch-base-64", E=64, k=1, H=768, I=3072, T=2048)  # its sizes; SwiGLU where it has ReLU
MIXTRAL = Shape("mixtral-tp8", E=8, k=2, H=4096, I=1792, T=512)  # one rank of 8 that split I = 14,336
DEEPSEEK_V3 = Shape("deepseek-v3-ep32", E=8, k=1, H=7168, I=2048, T=512)  # one rank of 32: 8 of 256 experts

# Tokens of a training step, which are a GPU's to compute: there FLOPs bound the layer, not the weights' bytes.
STEPS = [
    replace(s, name=f"{s.name}-step", T=T) for s, T in ((SIGMA_MOE_TINY, 32_768), (QWEN3_30B_A3B, 16_384))
]

LAYERS = [A, SIGMA_MOE_TINY, QWEN3_30B_A3B, OLMOE, SWITCH, MIXTRAL, DEEPSEEK_V3, *STEPS]
DECODE = [replace(A, name="decode", T=T, k=k) for k in (1, 8) for T in (1, 16)]
SWEEP_T = [replace(A, name="sweep-T", T=T) for T in (16, 64, 256, 1024, 2048, 4096, 8192)]
# All of shape A's weight bytes (604 MB in f32): four times the experts, each half as wide and half as deep.
SWEEP_E = [
    Shape("sweep-E", E=E, k=1, H=H, I=I, T=2048)
    for E, H, I in (
        (8, 2048, 3072), (32, 1024, 1536), (128, 512, 768), (512, 256, 384), (2048, 128, 192), (4096, 128, 96),
    )
]  # fmt: skip
LOADS = ["balanced", "zipf"]


def shrink_all() -> None:
    """Every shape so small that a race tests itself and measures nothing."""
    for name, value in list(globals().items()):
        if isinstance(value, Shape):
            globals()[name] = _small(value)
        elif isinstance(value, list) and value and isinstance(value[0], Shape):
            globals()[name] = [_small(shape) for shape in value]


def _small(s: Shape) -> Shape:
    return replace(s, E=min(s.E, 6), k=min(s.k, 2), H=min(s.H, 32), I=min(s.I, 16), T=min(s.T, 12))


DTYPES = [torch.float32, torch.bfloat16]


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


def choices(shape: Shape, load: str, device: torch.device | str = "cpu") -> Tensor:
    """index [T, k] int64: every expert equally often, or expert e with a share of 1 / (e + 1)**1.2."""
    generator = torch.Generator().manual_seed(0)
    if load == "balanced":
        by_token = (torch.arange(shape.R) % shape.E).view(shape.T, shape.k)
        return by_token[torch.randperm(shape.T, generator=generator)].to(device)
    share = 1 / torch.arange(1, shape.E + 1) ** 1.2
    different = torch.multinomial(share.expand(shape.T, -1), shape.k, generator=generator)  # k a token
    return different.to(device)


def spread(index: Tensor, E: int) -> dict[str, float]:
    """Rows of the experts: of all on average, of the busiest, and how many have none."""
    counts = torch.bincount(index.reshape(-1), minlength=E)
    return {"mean": index.numel() / E, "most": int(counts.max()), "idle": int((counts == 0).sum())}


def layer_inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
    """x [T, H], weights [T, k], gate_up [E, 2I, H], down [E, H, I]: outputs of unit size, the same on any device."""
    generator = torch.Generator().manual_seed(1)
    T, k, E, H, I = shape.T, shape.k, shape.E, shape.H, shape.I
    return [
        torch.randn(T, H, generator=generator).to(device, dtype),
        torch.rand(T, k, generator=generator).to(device, dtype),
        torch.empty(E, 2 * I, H).normal_(std=H**-0.5, generator=generator).to(device, dtype),
        torch.empty(E, H, I).normal_(std=I**-0.5, generator=generator).to(device, dtype),
    ]
