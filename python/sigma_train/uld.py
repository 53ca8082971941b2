"""Universal logit distillation (Boizard et al. 2024, arXiv 2402.12030): distributions compared as sorted.

    d(p, q) = sum_i |sort(p)_i - sort(q)_i|, the smaller vocabulary filled up with zeros

Wasserstein's distance where every two tokens are as far from each other: no token needs a counterpart.
"""

import torch.nn.functional as F
from torch import Tensor


def uld_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """[...]: the distance of probabilities, student [..., V], teacher [..., W], position by position.

    Raises: ValueError if they have other positions.
    """
    _check("uld_loss", student, teacher)
    return uld_to_highest(student, teacher.sort(dim=-1, descending=True).values)


def uld_to_highest(student: Tensor, top: Tensor) -> Tensor:
    """[...]: the same to a teacher whose highest probabilities are `top` [..., K], falling, and all others 0.

    Beyond K the sum is what the student has there, in whichever order: no more than K need to be sorted.
    """
    _check("uld_to_highest", student, top)
    K, V = top.shape[-1], student.shape[-1]
    p = student.topk(min(K, V)).values
    distance = (F.pad(p, (0, K - p.shape[-1])) - top).abs().sum(-1)
    return distance + student.sum(-1) - p.sum(-1) if K < V else distance


def _check(who: str, student: Tensor, teacher: Tensor) -> None:
    if not student.dim() or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"{who}: both must have the same positions, found {list(student.shape)} and {list(teacher.shape)}"
        )
