"""FLOPs that a run's weights have cost: sunk in those that it began with, and extra since."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sigma_train.checkpoint import CheckpointError, read_record
from sigma_train.config import Config, ConfigError
from sigma_train.expert_counts import ExpertCounts
from sigma_train.model import LanguageModel, flops_per_token

KEY = "sunk"  # of a checkpoint's record, carried from each of a run to the next


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

    def begun_with(self) -> "SunkCostLedger":
        """Of a run that begins with these weights: all that was spent is sunk."""
        return SunkCostLedger(self.total_flops, 0.0, self.history)

    def grown(self, how: Mapping[str, Any]) -> "SunkCostLedger":
        """Of the grown weights, with one more entry in the history."""
        entry = {**how, "sunk_flops": self.total_flops}
        return replace(self.begun_with(), history=(*self.history, entry))

    def record(self) -> dict[str, Any]:
        """As JSON; what is extra follows from tokens."""
        return {"flops": self.sunk_flops, "history": list(self.history)}

    @classmethod
    def of_record(cls, record: Mapping[str, Any] | None) -> "SunkCostLedger":
        """None: of a run that began with nothing."""
        if record is None:
            return cls()
        return cls(float(record["flops"]), 0.0, tuple(record["history"]))


def ledger_of(checkpoint: Path) -> SunkCostLedger:
    """Of a run at one of its checkpoints, by its record; steps that were lost or left out count as nothing."""
    record = read_record(checkpoint)
    extra = record["extra"]
    ledger = SunkCostLedger.of_record(extra.get(KEY))
    if not extra.get("tokens_seen"):
        return ledger
    settings: dict[str, dict[str, Any]] = {}
    for name, value in extra["settings"].items():
        section, _, key = name.partition(".")
        settings.setdefault(section, {})[key] = value
    flops = mean_flops_per_token(Config.from_dict(settings), record["step"])
    return replace(ledger, extra_flops=extra["tokens_seen"] * flops)


def ledger_of_run(run: Path) -> SunkCostLedger | None:
    """Of its newest checkpoint whose record can be read; None if there is none."""
    for checkpoint in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            return ledger_of(checkpoint)
        except (CheckpointError, ConfigError):  # damaged, removed meanwhile by the run, or of another program
            continue
    return None


def mean_flops_per_token(config: Config, steps: int) -> float:
    """Of the first `steps` of a run, over which the experts a token may change; without making the model."""
    with torch.device("meta"):
        model = LanguageModel(config)
    top_k = ExpertCounts(config).mean(0, steps) if model.moe_layers() else ()
    return flops_per_token(model, config, top_k)
