"""How many choices the routers make otherwise than at the last look: of tokens that are the same at every look."""

import math

import numpy as np
import torch
from torch import Tensor

from sigma_train.config import Config
from sigma_train.dataset import TokenDataset
from sigma_train.model import LanguageModel, precision
from sigma_train.ranks import Ranks, hold_shards

TOKENS = 512  # at most, or one sequence


class Probe:
    """Sequences of the validation split, spread over it, the same on every rank and in every run with this text.

    Every rank has all of them: what the experts of all ranks make of them is then the same on each, and no rank has to
    be told.
    """

    def __init__(self, config: Config, validation: TokenDataset) -> None:
        length = config.train.seq_len
        windows = validation.num_windows(length)
        count = min(windows, max(1, TOKENS // length))
        self._config = config
        self._tokens, _ = validation.windows(np.arange(count) * windows // count, length)
        self._last: list[Tensor] | None = None

    def forget(self) -> None:
        """The next look is the first."""
        self._last = None

    @torch.no_grad()
    def changes(self, model: LanguageModel, ranks: Ranks) -> Tensor:
        """Of each layer's (token, slot) pairs the share whose expert the token had in no slot at the last look.

        NaN at the first look.  Where k has changed, of the smaller k: slots are best first, so that the first of them
        are what the router would have chosen.  A collective.
        """
        with precision(self._config):
            model(self._tokens)
        hold_shards(model, ranks)
        now = [moe.last_routing.indices for moe in model.moe_layers()]  # [T, k] each
        last, self._last = self._last, now
        if last is None:
            return torch.full((len(now),), math.nan)
        return torch.tensor([changed(*pair) for pair in zip(now, last, strict=True)])


def changed(now: Tensor, last: Tensor) -> float:
    """Share of choices [T, k] that are not among the same token's [T, k'], of the first min(k, k')."""
    k = min(now.shape[1], last.shape[1])
    is_same = now[:, :k, None] == last[:, None, :k]  # [T, k, k]
    return 1 - is_same.any(2).double().mean().item()
