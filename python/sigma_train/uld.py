"""Universal logit distillation (Boizard et al. 2024): distributions over different vocabularies, compared as sorted."""

import torch.nn.functional as F
from torch import Tensor


def uld_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """[...]: sum_i |sort(p)_i - sort(q)_i|, the smaller vocabulary filled up with zeros.

    Wasserstein's distance where every two tokens are as far from each other: no token needs a counterpart.
    Args: probabilities, student [..., V], teacher [..., W], position by position.
    Raises: ValueError if they have other positions.
    """
    if not student.dim() or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"uld_loss: both must have the same positions, found {list(student.shape)} and {list(teacher.shape)}"
        )
    p, q = (x.sort(dim=-1, descending=True).values for x in (student, teacher))
    size = max(p.shape[-1], q.shape[-1])
    p, q = (F.pad(x, (0, size - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1)
