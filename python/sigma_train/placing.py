"""Where experts stand, decided anew at every n-th checkpoint by the tokens that each has had since the last time.

All ranks decide by the same counts, so that they come to the same places without asking one another.
"""

import time

import torch
from torch import Tensor
from torch.optim import Optimizer

from sigma_kernels.distributed import ExpertParallelMoE, balanced_placement, rank_load
from sigma_train.config import TrainConfig
from sigma_train.model import LanguageModel
from sigma_train.ranks import Ranks


class Placing:
    """Counts what is to be decided by; `state` goes into checkpoints."""

    def __init__(self, config: TrainConfig) -> None:
        self._every, self._steps = config.place_every * config.save_every, config.steps
        self._load: Tensor | None = None  # [layers, E], of all ranks since experts were placed

    def see(self, counts: list[Tensor]) -> None:
        """counts [E] of each layer, over all ranks, of a step that was learned from."""
        if self._every and counts:
            now = torch.stack(counts).long()
            self._load = now if self._load is None else self._load + now

    def is_due(self, step: int) -> bool:
        """Not at the last step, after which nothing is gained."""
        return self._every > 0 and step % self._every == 0 and step < self._steps

    def place(self, model: LanguageModel, optimizer: Optimizer, ranks: Ranks) -> dict[str, float]:
        """Have experts stand where the load that was seen is spread best, and forget it; a collective.

        Returns: of the layer where it is largest the busiest rank's load over the mean, as it was and as it would have
            been; experts that went to another rank, bytes, and seconds of this rank.  Nothing where no rank shares.
        """
        load, self._load = self._load, None
        layers = [moe for moe in model.moe_layers() if isinstance(moe, ExpertParallelMoE)]
        if load is None or not layers or layers[0].group.size() == 1:
            return {}
        began, before, after, moved, sent = time.monotonic(), 0.0, 0.0, 0, 0
        for moe, of_layer in zip(layers, load, strict=True):
            shared, former = moe.group.size(), moe.places
            placement = balanced_placement(of_layer, shared, former)
            before = max(before, _busiest(rank_load(of_layer, shared, former)))
            after = max(after, _busiest(rank_load(of_layer, shared, placement)))
            moved += int((former != placement).sum())
            sent += moe.place(placement, optimizer)
        seconds = time.monotonic() - began
        (everywhere,) = ranks.summed(sent)
        return {
            "rank_load": before,
            "rank_load_placed": after,
            "experts_moved": moved,
            "bytes_moved": int(everywhere),
            "placing_s": seconds,
        }

    def state(self) -> list[list[int]] | None:
        """As JSON has it."""
        return None if self._load is None else self._load.tolist()

    def load(self, state: list[list[int]] | None) -> None:
        """Have seen this, or nothing; where experts stay it would only grow old."""
        self._load = torch.tensor(state) if state and self._every else None


def in_words(row: dict[str, float]) -> str:
    """Of what `place` did."""
    return (
        f"busiest rank {row['rank_load']:.2f} of the mean, {row['rank_load_placed']:.2f} once "
        f"{row['experts_moved']:,} experts have moved: {row['bytes_moved'] / 1e6:,.1f} MB in {row['placing_s']:.2f} s"
    )


def _busiest(loads: Tensor) -> float:
    """Over the mean."""
    return loads.max().item() * len(loads) / loads.sum().item()
