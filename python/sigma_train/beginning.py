"""What a run begins with: nothing, the newest checkpoint of its own folder, or the weights of another run.

All of it is looked at before anything is written; the tensors come later, when the model is spread over its ranks.
"""

import os
from pathlib import Path
from typing import Any

from torch import nn

from sigma_train.checkpoint import holds_moments, latest_checkpoint, must_fit, named_checkpoint, read_record
from sigma_train.config import Config, ConfigError, shaping_settings
from sigma_train.expert_counts import same_past
from sigma_train.growth_cost import SunkCostLedger, ledger_of
from sigma_train.plan_shapes import unfilled
from sigma_train.ranks import Ranks


def weights_must_fit(config: Config) -> None:
    """Each rank makes all of them before they are spread.

    Raises: MemoryError if they are more than twice this machine's memory, which no swap makes up for: it would be
    filled before the system refuses.
    """
    weights = sum(p.numel() * p.element_size() for p in unfilled(config).parameters())
    if weights > 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise MemoryError(f"{weights} bytes")


def own_checkpoint(config: Config, resume: bool, ranks: Ranks) -> Path | None:
    """The newest sound one of the run's folder; a collective.

    Raises: ConfigError if there is one and the run is not to go on.
    """
    out = Path(config.train.out)
    found = latest_checkpoint(out / "checkpoints", ranks)
    if found is not None and not resume:
        raise ConfigError(f"{out} already holds a run; continue it with --resume or name another --out")
    return found


def others_checkpoint(config: Config, ranks: Ranks) -> Path | None:
    """Of `train.init_from`; a collective."""
    place = config.train.init_from
    return None if place is None else named_checkpoint(Path(place), ranks)


def record_of_own(
    path: Path, config: Config, settings: dict[str, Any], digest: str, model: nn.Module
) -> dict[str, Any]:
    """What the run's own checkpoint says of itself.

    Args:    settings: what shapes the weights of the run that is to go on; digest: of its text.
    Raises:  ConfigError if the run had other settings or another text; CheckpointError if the model is another.
    """
    record, out = read_record(path), config.train.out
    extra = record["extra"]
    then, now = _settings_of(extra), settings
    if same_past(then, now, record["step"]):  # what comes may be another schedule
        then |= {key: now[key] for key in ("sparsity.phases", "model.top_k")}
    if changed := [key for key in now | then if now.get(key) != then.get(key)]:
        differences = ", ".join(f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in changed)
        raise ConfigError(
            f"{out} holds a run of other settings: {differences}; give them again or name another --out"
        )
    if extra.get("corpus_digest") != digest:
        raise ConfigError(f"the text of data.paths is not what {out} began with; name another --out")
    must_fit(model, path)
    return record


def sunk_in_others(path: Path, config: Config, digest: str, model: nn.Module) -> SunkCostLedger:
    """What it has cost to train the weights of another run, if this one can begin with them.

    Raises: ConfigError if they are of another text, or have no moments that are asked for; CheckpointError if they do
            not fit.
    """
    extra = read_record(path)["extra"]
    if extra.get("corpus_digest") != digest:
        raise ConfigError(f"train.init_from: {path} was trained on another text, with another vocabulary")
    then, now = _settings_of(extra), shaping_settings(config)
    for key in ("data.val_fraction", "data.languages"):  # another vocabulary too, which is of the rest
        if then[key] != now[key]:
            raise ConfigError(
                f"train.init_from: {path} held out other text: {key} was {then[key]} and is {now[key]}"
            )
    must_fit(model, path)
    if config.train.init_optimizer and not holds_moments(path):
        raise ConfigError(f"train.init_optimizer: {path} holds no moments of an optimizer")
    return ledger_of(path).begun_with()


def _settings_of(extra: dict[str, Any]) -> dict[str, Any]:
    """A setting that is younger than the checkpoint had its default."""
    return shaping_settings(Config()) | extra["settings"]
