"""FLOPs that a grown model's weights have cost: sunk before it grew, and extra since."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sigma_train.checkpoint import read_record
from sigma_train.config import Config
from sigma_train.expert_counts import ExpertCounts
from sigma_train.model import LanguageModel, flops_per_token

KEY = "growth"  # of a checkpoint's record, carried from each of a run to the next


@dataclass(frozen=True)
class SunkCostLedger:
    """A comparison by `extra_flops` leaves out what the former model cost; one by `total_flops` does not.

    Attributes: history: of each growth, the first one first, what grew and how, and what had been spent by then.
    """

    sunk_flops: float = 0.0
    extra_flops: float = 0.0
    history: tuple[dict[str, Any], ...] = ()

    @property
    def total_flops(self) -> float:
        return self.sunk_flops + self.extra_flops

    def grown(self, how: Mapping[str, Any]) -> "SunkCostLedger":
        """At a growth: all that was spent is sunk."""
        entry = {**how, "sunk_flops": self.total_flops}
        return SunkCostLedger(self.total_flops, 0.0, (*self.history, entry))

    def record(self) -> dict[str, Any]:
        """As JSON; what is extra follows from tokens."""
        return {"sunk_flops": self.sunk_flops, "history": list(self.history)}

    @classmethod
    def of_record(cls, record: Mapping[str, Any] | None) -> "SunkCostLedger":
        """None: of a run that did not begin with a grown model."""
        if record is None:
            return cls()
        return cls(float(record["sunk_flops"]), 0.0, tuple(record["history"]))


def ledger_of(checkpoint: Path, config: Config) -> SunkCostLedger:
    """Of a run at one of its checkpoints; steps that were lost or left out count as nothing."""
    record = read_record(checkpoint)
    extra = record["extra"]
    flops = extra.get("tokens_seen", 0) * mean_flops_per_token(config, record["step"])
    return replace(SunkCostLedger.of_record(extra.get(KEY)), extra_flops=flops)


def mean_flops_per_token(config: Config, steps: int) -> float:
    """Of the first `steps` of a run, over which the experts a token may change; without making the model."""
    with torch.device("meta"):
        model = LanguageModel(config)
    top_k = ExpertCounts(config).mean(0, steps) if model.moe_layers() else ()
    return flops_per_token(model, config, top_k)
