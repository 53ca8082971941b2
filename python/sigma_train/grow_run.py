"""Growth of a run of ours: from one of its checkpoints to a folder that `train.init_from` takes.

OUT/config.toml       the run's settings, of the grown model, with train.init_from = OUT
    tokenizer.json    as it was
    checkpoints/step-00000000/
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from sigma_train.checkpoint import (
    MODEL,
    OPTIMIZER,
    PLACEMENT,
    CheckpointError,
    must_fit,
    named_checkpoint,
    read_record,
    run_of,
    unprefixed,
)
from sigma_train.config import Config, load_config, shaping_settings
from sigma_train.files import atomic_folder, must_be_new, temporary_name, write_text
from sigma_train.growth import assembled, grown_moments, must_have_layers
from sigma_train.growth_config import grown_config
from sigma_train.growth_cost import KEY, SunkCostLedger, ledger_of
from sigma_train.growth_pieces import Grown, Growth, Piece, grown_tensors
from sigma_train.model import LanguageModel
from sigma_train.ranks import Ranks
from sigma_train.sharded import Writer, described, first_failure, is_alone, load, placements
from sigma_train.tokenizer import read_tokenizer


@dataclass(frozen=True)
class Base:
    """A sound checkpoint, and the settings of the run that it is of."""

    checkpoint: Path
    config: Config

    @classmethod
    def named(cls, source: Path) -> "Base":
        """Raises: CheckpointError, ConfigError."""
        checkpoint = named_checkpoint(source)
        config = load_config(None, run_of(checkpoint) / "config.toml", [])
        with torch.device("meta"):
            must_fit(LanguageModel(config), checkpoint)
        return cls(checkpoint, config)

    @property
    def run(self) -> Path:
        return run_of(self.checkpoint)


class Reading(Mapping[str, Tensor]):
    """Tensors of a checkpoint by name, experts in order; each is read when it is asked for, and not kept."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._of = {name: x for name, x in described(checkpoint).items() if not name.endswith(PLACEMENT)}
        self._placements = placements(checkpoint)

    def __getitem__(self, name: str) -> Tensor:
        x = torch.empty(self._of[name].size, dtype=self._of[name].properties.dtype)
        load(self._checkpoint, {name: x})
        for layer, placement in self._placements.items():
            if f"{layer}.experts." in name and x.dim() > 0:
                return x[placement]
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """By the model's names, one after the other."""
        for name in self._of:
            if name.startswith(MODEL):
                yield name.removeprefix(MODEL), self[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._of[name].properties.dtype

    def shapes(self, prefix: str) -> dict[str, torch.Size]:
        return {name: x.size for name, x in unprefixed(self._of, prefix).items()}


class Growing(DefaultSavePlanner):
    """Has each tensor made when it is written, so that one at a time is in memory."""

    def __init__(self, source: Reading, made: Mapping[str, Grown]) -> None:
        super().__init__()
        self._source, self._made = source, made

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        made = self._made[index.fqn]
        name = made.pieces[0].source  # all pieces of a tensor of ours are of one
        return assembled({name: self._source[name]}, made)


def grow_run(base: Base, growth: Growth, optimizer: Literal["reset", "inherit"], out: Path) -> SunkCostLedger:
    """Write `out`, whole or not at all; what the grown model has cost so far.

    Raises: WrongInput if `out` is there, the growth does not fit the model, or there are no moments to inherit.
    """
    must_be_new(out, "--out")
    source = Reading(base.checkpoint)
    weights, moments = source.shapes(MODEL), source.shapes(OPTIMIZER)
    if optimizer == "inherit" and not moments:
        raise CheckpointError(f"--optimizer: {base.checkpoint} holds no moments of an optimizer to inherit")
    must_have_layers(weights, growth.layers)
    made = _stored(MODEL, grown_tensors(weights, growth))
    if optimizer == "inherit":
        made |= _stored(OPTIMIZER, grown_moments(moments, growth))
    config = _beginning_with(grown_config(base.config, growth), out, optimizer == "inherit")
    ledger = ledger_of(base.checkpoint).grown(_told(base.checkpoint, growth, optimizer))
    tokenizer = read_tokenizer(base.run / "tokenizer.json")
    with atomic_folder(out, "--out") as temporary:
        (temporary / "checkpoints").mkdir()
        write_text(temporary / "config.toml", config.to_toml())
        tokenizer.save(temporary / "tokenizer.json")
        _write(temporary / "checkpoints", source, made, _extra(base, config, ledger))
    return ledger


def _beginning_with(config: Config, out: Path, has_moments: bool) -> Config:
    settings = config.model_dump()
    settings["train"] |= {"init_from": str(out.absolute()), "init_optimizer": has_moments}
    return Config.from_dict(settings)


def _stored(prefix: str, made: Mapping[str, Grown]) -> dict[str, Grown]:
    """Under the names of a checkpoint."""

    def stored(piece: Piece) -> Piece:
        return replace(piece, source=f"{prefix}{piece.source}")

    return {
        f"{prefix}{name}": Grown(each.shape, tuple(map(stored, each.pieces))) for name, each in made.items()
    }


def _write(folder: Path, source: Reading, made: Mapping[str, Grown], extra: dict[str, Any]) -> None:
    dtypes = {name: source.dtype(each.pieces[0].source) for name, each in made.items()}
    state = {name: torch.empty(each.shape, dtype=dtypes[name], device="meta") for name, each in made.items()}
    writer = Writer(temporary_name(folder / "step"), folder, 0, extra, keep=1)
    writer.single_file_per_rank = False  # of a file DCP keeps all tensors until it is written
    with first_failure():
        save(state, storage_writer=writer, planner=Growing(source, made), no_dist=is_alone(Ranks()))


def _extra(base: Base, config: Config, ledger: SunkCostLedger) -> dict[str, Any]:
    """Of the record: what a run at its begin would have written."""
    extra = read_record(base.checkpoint)["extra"]
    now = shaping_settings(config)
    if "settings" in extra:  # of several ranks
        now["train.batch_size"] = extra["settings"]["train.batch_size"]
    return {
        "settings": now,
        "corpus_digest": extra.get("corpus_digest"),
        "tokens_seen": 0,
        KEY: ledger.record(),
    }


def _told(checkpoint: Path, growth: Growth, optimizer: str) -> dict[str, Any]:
    record = read_record(checkpoint)
    return {
        "from": str(checkpoint),
        "step": record["step"],
        "tokens": record["extra"].get("tokens_seen", 0),
        **growth.record(),
        "optimizer": optimizer,
    }
