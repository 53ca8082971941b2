"""Which tokens of a batch are learned from: those with the highest score, and the mean loss of them alone."""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from sigma_train.kinds import Scope, Unmapped


@dataclass(frozen=True)
class Selection:
    """Keeps the share `keep_rate` of the tokens that have a score, those whose score is highest.

    unmapped: what is done with tokens that have none.  scope: whether the share is of the batch or of each sequence.
    """

    keep_rate: float = 0.4
    unmapped: Unmapped = "include"
    scope: Scope = "batch"

    def __post_init__(self) -> None:
        """Raises: ValueError."""
        if not 0 < self.keep_rate <= 1:
            raise ValueError(f"Selection: keep_rate must be above 0 and at most 1, found {self.keep_rate}")
        for name, kind in (("unmapped", Unmapped), ("scope", Scope)):
            if (found := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"Selection: {name} must be {' or '.join(get_args(kind))}, found {found!r}")

    def weights(self, score: Tensor, has_score: Tensor) -> Tensor:
        """[B, S] f32: 1 where a token is kept, else 0; of equal scores the first, a NaN before all.

        So a student's loss that is no number is kept, and seen.
        """
        shape = score.shape
        if self.scope == "batch":
            score, has_score = score.reshape(1, -1), has_score.reshape(1, -1)
        kept = self._highest(score.masked_fill(~has_score, -torch.inf), has_score.sum(1))
        if self.unmapped == "include":
            kept |= ~has_score
        return kept.reshape(shape).float()

    def _highest(self, score: Tensor, count: Tensor) -> Tensor:
        """Of each row of which so many have a score: its share of them, to the nearest token and at least one."""
        most = torch.minimum((self.keep_rate * count.double()).round().long().clamp(min=1), count)
        order = score.argsort(dim=1, descending=True, stable=True)
        is_among = torch.arange(score.shape[1], device=score.device) < most[:, None]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, is_among)


def weighted_mean(loss: Tensor, weights: Tensor, total: Tensor | None = None) -> Tensor:
    """sum(w l) / total; what has no weight has no gradient, and where nothing has the mean is 0.

    A loss without weight is left out and not multiplied by 0: it may be infinite.
    total: sum(w) by default; else what takes its place, where others have a part of the tokens.
    """
    kept = loss.masked_fill(weights == 0, 0.0)
    total = weights.sum() if total is None else total
    return (weights * kept).sum() / total.clamp(min=torch.finfo(weights.dtype).tiny)
