"""How large the weights of each layer are, and where a grown model breaks with it (arXiv 2510.08008, section 3.2)."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from sigma_train.growth_layers import LayerGrowthPlan
from sigma_train.growth_names import parse


class Seam(NamedTuple):
    """The steepest fall of a profile: from `layer` to the next, and how many of the others' mean step it is."""

    layer: int
    fall: float
    ratio: float


def weight_norm_profile(tensors: Iterable[tuple[str, Tensor]]) -> Tensor:
    """[layers] f64: root of the mean square of all elements of a layer's matrices; each tensor is read once."""
    squares: dict[int, float] = {}
    counts: dict[int, int] = {}
    for name, x in tensors:
        layer = parse(name).layer
        if layer is not None and x.dim() > 1:
            squares[layer] = squares.get(layer, 0.0) + float(x.float().square().sum(dtype=torch.float64))
            counts[layer] = counts.get(layer, 0) + x.numel()
    return torch.tensor([math.sqrt(squares[i] / counts[i]) for i in sorted(counts)], dtype=torch.float64)


def planned_profile(profile: Tensor, plan: LayerGrowthPlan) -> Tensor:
    """Of the grown model at its begin, whatever its experts: copies have the norms of what they are copies of."""
    return profile[list(plan.sources)]


def norm_seam(profile: Tensor) -> Seam:
    """In a trained model norms rise over most of the depth; a stack falls from its last layer back to its first.

    The fall is below 0 where norms rise everywhere; the ratio is 0 where no other step is there or has any height.
    """
    falls = profile[:-1] - profile[1:]
    layer = int(falls.argmax())
    others = torch.cat([falls[:layer], falls[layer + 1 :]]).abs()
    usual = float(others.mean()) if len(others) else 0.0
    fall = float(falls[layer])
    return Seam(layer, fall, fall / usual if usual else 0.0)
