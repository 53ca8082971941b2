"""Inputs whose true results are exact in f32 whatever the order of sums, so that one digest holds for every kernel.

All numbers are small integers times a power of two.  A sum of products is exact in any order while the sum of the
magnitudes stays below 2^24 of its unit; the bounds below are worst cases at E=96, H=1024, I=512, 400 rows an expert.

Between the products of an expert some kernels round to bf16, others do not: what lies there has 8 bits at most.
x, the output's gradient and the weights are therefore made of pairs: x holds each number twice, the weights hold r and
-r + net.  The multipliers see dense numbers, of the sums only the few nets remain.  Gates are 64 or 128, where
silu(g) = g and its derivative is 1 in f32 and in f64.

    what                    magnitudes, in its unit            worst case
    grouped product         2047 * 7 * 1024 (f32), 127 * 15 * 1024    14.7 M
    gate, up                (7 * 3) * 1024 + 128; at most 7 bits, 14  22 k
    output                  (128 * 14 / 64) * 3 * 512          43 k
    gradient of x           (14 * 14 + 14 * 128) * 3 * 512 + 32 * 64 * 196   3.5 M
    gradient of gate_up     14 * 128 * 2 * 7 * 400             10 M
    gradient of down        7 * (128 * 14 / 64) * 2 * 400      157 k
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

import sigma_kernels as sk

ANCHORS = 16  # pairs of x that are 1 or 2: one of them makes each gate
SHIFT = 4099  # numbers from one expert's beginning to the next in a long sequence; prime: no row recurs
SMALL = 2.0**-6  # keeps f16 in its range
NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Size:
    """Of an expert layer: T tokens, E experts, H hidden, I intermediate."""

    name: str
    T: int
    E: int
    H: int
    I: int


SIZES = {size.name: size for size in (Size("full", 2048, 96, 1024, 512), Size("quick", 512, 96, 256, 128))}


def noise(count: int, seed: int) -> np.ndarray:
    """splitmix64 (Steele et al. 2014): the same 64-bit numbers with every library and on every machine."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def integers(most: int, *shape: int, seed: int) -> Tensor:
    """int16 in -most..most."""
    drawn = noise(int(np.prod(shape)), seed) >> np.uint64(32)
    values = (drawn % np.uint64(2 * most + 1)).astype(np.int16) - np.int16(most)
    return torch.from_numpy(values).view(shape)


def of_experts(most: int, E: int, rows: int, columns: int, seed: int) -> Tensor:
    """[E, rows, columns] int8 in -most..most: overlapping parts of one sequence, each expert's another."""
    sequence = integers(most, rows * columns + E * SHIFT, seed=seed).to(torch.int8)
    return sequence.as_strided((E, rows, columns), (SHIFT, columns, 1))


class Inputs:
    """The operands of all cases in one dtype, made when first asked for; the numbers are those of any dtype."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str = "cpu", wide: bool | None = None) -> None:
        """wide: whether grouped products are of 11-bit by 3-bit integers, as f32 holds them, or of 7-bit by 4-bit."""
        self.size, self.dtype, self.device = size, dtype, device
        self.wide = dtype not in NARROW if wide is None else wide

    def placed(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return x.to(self.device).to(self.dtype) * factor

    @cached_property
    def indices(self) -> Tensor:
        """[T, 2] int32: crowded at low experts, none for the sixth, two different ones of each token."""
        s = self.size
        share = (noise(2 * s.T, 1) >> np.uint64(40)).astype(np.float64) / 2.0**24
        drawn = torch.from_numpy((share * share * s.E).astype(np.int32)).view(s.T, 2)
        drawn[:, 1] = torch.where(drawn[:, 0] == drawn[:, 1], (drawn[:, 1] + 7) % s.E, drawn[:, 1])
        return torch.where(drawn == 5, 6, drawn).to(self.device)

    @cached_property
    def factors(self) -> Tensor:
        """[T, 2], 1/64 or 1/32: of the experts' outputs."""
        return self.placed(integers(1, self.size.T, 2, seed=2).sign().clamp(min=0) + 1, SMALL)

    @cached_property
    def logits(self) -> Tensor:
        """[T, E] in -8..7, sixteenths: many ties, which go to the lower expert."""
        return self.placed(integers(127, self.size.T, self.size.E, seed=3), 1 / 16)

    @cached_property
    def tokens(self) -> Tensor:
        """[T, H] in -127..127: rows to be moved and summed."""
        return self.placed(integers(127, self.size.T, self.size.H, seed=4))

    @cached_property
    def rows(self) -> Tensor:
        """[2T, H] in -127..127."""
        return self.placed(integers(127, 2 * self.size.T, self.size.H, seed=5))

    @cached_property
    def grouped(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [T, H], weight [E, 2I, H], weight [E, H, 2I] and a gradient [T, 2I], of one product and its gradients."""
        s, (of_x, of_weight) = self.size, (2047, 7) if self.wide else (127, 15)
        return (
            self.placed(integers(of_x, s.T, s.H, seed=6), SMALL),
            self.placed(of_experts(of_weight, s.E, 2 * s.I, s.H, 7)),
            self.placed(of_experts(of_weight, s.E, s.H, 2 * s.I, 8)),
            self.placed(integers(of_weight, s.T, 2 * s.I, seed=9)),
        )

    @cached_property
    def offsets(self) -> Tensor:
        return sk.group_by_expert(self.indices[:, :1].cpu(), self.size.E).offsets.to(self.device)

    @cached_property
    def x(self) -> Tensor:
        """[T, H]: pairs in -7..7, the anchors 1 or 2."""
        v = integers(7, self.size.T, self.size.H // 2, seed=10)
        v[:, :ANCHORS] = 1 + v[:, :ANCHORS].sign().clamp(min=0)
        return self.placed(v.repeat_interleave(2, 1))

    @cached_property
    def grad(self) -> Tensor:
        """[T, H]: pairs in -7..7, times 1/64."""
        return self.placed(integers(7, self.size.T, self.size.H // 2, seed=11).repeat_interleave(2, 1), SMALL)

    @cached_property
    def weights_int8(self) -> tuple[Tensor, Tensor]:
        """gate_up_proj [E, 2I, H] and down_proj [E, H, I] as int8: pairs r and -r + net."""
        s = self.size
        r = of_experts(3, s.E, 2 * s.I, s.H // 2, 12)
        gate_up = torch.stack([r, -r], 3)  # [E, 2I, H/2, 2]
        net = gate_up[..., 1]
        e, n = torch.arange(s.E)[:, None, None], torch.arange(s.I)[None, :, None]
        net[:, : s.I].scatter_add_(2, (n + e) % ANCHORS, torch.full((s.E, s.I, 1), 64, dtype=torch.int8))
        for step, sign in ((0, 1), (101, -1)):
            place = ANCHORS + (5 * n + 3 * e + step) % (s.H // 2 - ANCHORS)
            net[:, s.I :].scatter_add_(2, place, (sign * (-1) ** (n + e)).to(torch.int8))
        r = of_experts(3, s.E, s.H // 2, s.I, 13)
        down = torch.stack([r, -r], 2)  # [E, H/2, 2, I]
        i = n.transpose(1, 2)
        for step, sign in ((0, 1), (101, -1)):
            place = (5 * i + 3 * e + step) % (s.H // 2)
            down[:, :, 1].scatter_add_(1, place, (sign * (-1) ** (i + e)).to(torch.int8))
        return gate_up.flatten(2).to(self.device), down.flatten(1, 2).to(self.device)

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The same in this dtype."""
        gate_up, down = self.weights_int8
        return gate_up.to(self.dtype), down.to(self.dtype)

    @cached_property
    def scales(self) -> tuple[Tensor, Tensor]:
        """[E, 2I] and [E, H] f32, of int8 weights: 1 or 2 for gates, 1/2 or 1 elsewhere."""
        s = self.size
        of_gate_up = 1.0 + integers(1, s.E, 2 * s.I, seed=14).sign().clamp(min=0)
        of_gate_up[:, s.I :] /= 2
        of_down = 0.5 + 0.5 * integers(1, s.E, s.H, seed=15).sign().clamp(min=0)
        return of_gate_up.to(self.device), of_down.to(self.device)

    @cached_property
    def soft(self) -> Tensor:
        """[T, H] in -1/32..1/32: gates around zero, where silu bends."""
        return self.placed(integers(2047, self.size.T, self.size.H, seed=16), 2.0**-16)

    @cached_property
    def soft_grad(self) -> Tensor:
        return self.placed(integers(2047, self.size.T, self.size.H, seed=17), 2.0**-11)
