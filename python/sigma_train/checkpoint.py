"""The folder of a checkpoint: whole or absent, written beside its place, synced, then renamed into it.

DIR/step-00000200/__R_0.distcp   rank R's part of the weights and of the optimizer's tensors (`sharded.py`)
                  .metadata      where each piece of each tensor lies
                  state.json     step, extra state, and the sha256 of the files above
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from sigma_train.errors import WrongInput
from sigma_train.files import TEMPORARY, sha256_file, sync
from sigma_train.ranks import Ranks

VERSION = 4
RECORD = "state.json"
MODEL, OPTIMIZER = "model.", "optimizer."  # how names of tensors begin
PLACEMENT = ".placement"  # how that of a layer's experts ends; where there is none they are in order
T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """All of it, whole, in one process.

    Attributes: model_state by the model's names, optim_state as "state.NAME.exp_avg"; extra as it was given.
    """

    step: int
    model_state: dict[str, Tensor]
    optim_state: dict[str, Tensor]
    extra: dict[str, Any]


class CheckpointError(WrongInput):
    """A checkpoint can't be used; one sentence."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over."""


def place_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def sweep(folder: Path) -> None:
    """Remove what a killed process left unfinished; whoever calls holds the run's folder, so nobody writes there."""
    for stale in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(stale, ignore_errors=True)


def seal(temporary: Path, place: Path, step: int, extra: Mapping[str, Any], digests: dict[str, str]) -> None:
    """Write the record of files that are durable, and give their folder its name.

    `extra` must be JSON.  The first line of the record is the sha256 of the second.
    """
    text = json.dumps({"version": VERSION, "step": step, "sha256": digests, "extra": dict(extra)})
    (temporary / RECORD).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n")
    sync(temporary / RECORD)
    sync(temporary)
    if place.exists():
        shutil.rmtree(place)
    temporary.rename(place)
    sync(place.parent)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep`."""
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def read_record(path: Path) -> dict[str, Any]:
    """version, step, sha256 of each file, extra.  Raises: CheckpointError if it is damaged or of another format."""
    try:
        digest, _, text = (path / RECORD).read_text().partition("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from None
    text = text.rstrip("\n")
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise CheckpointError(f"checkpoint {path} is damaged: {RECORD} is not what was written")
    record: dict[str, Any] = json.loads(text)
    if record["version"] != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format {record['version']}, this program reads {VERSION}"
        )
    return record


def verify(path: Path, ranks: Ranks = Ranks()) -> None:  # noqa: B008
    """Look whether every file is what was written, each rank at its share of them; a collective.

    Raises: CheckpointError, on all ranks the same.
    """
    files, told = [], None
    try:
        files = list(read_record(path)["sha256"].items()) if ranks.is_first else []
    except CheckpointError as error:
        told = str(error)
    told = _damage(path, ranks.first(files)[ranks.rank :: ranks.size]) or told
    for message in ranks.gathered(told):
        if message:
            raise CheckpointError(message)


def _damage(path: Path, files: list[tuple[str, str]]) -> str | None:
    for name, digest in files:
        try:
            if sha256_file(path / name) != digest:
                return f"checkpoint {path} is damaged: the sha256 of {name} differs"
        except OSError as error:
            return f"checkpoint {path} is damaged: {error}"
    return None


def latest_checkpoint(folder: Path, ranks: Ranks = Ranks()) -> Path | None:  # noqa: B008
    """The newest sound checkpoint below `folder`, None if there is none at all; a collective.

    A damaged one is named in a warning, of the first rank, and passed over.
    Raises: CheckpointError if all are damaged, on all ranks the same.
    """
    damaged = []
    for path in ranks.first(sorted(folder.glob("step-*"), reverse=True)):
        try:
            verify(path, ranks)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for message in damaged if ranks.is_first else []:
            warnings.warn(f"{message}; using the one before", CheckpointWarning, stacklevel=2)
        return path
    if damaged:
        raise CheckpointError(
            f"{damaged[0]}, and no other below {folder} is sound; a new run needs another folder"
        )
    return None


def named_checkpoint(path: Path, ranks: Ranks = Ranks()) -> Path:  # noqa: B008
    """A checkpoint, or the newest of a run or of a folder of them; sound; a collective.

    Raises: CheckpointError if there is none or it is damaged.
    """
    if (path / RECORD).exists():
        verify(path, ranks)
        return path
    for folder in (path / "checkpoints", path):
        if (found := latest_checkpoint(folder, ranks)) is not None:
            return found
    raise CheckpointError(f"{path} must be a run or a checkpoint, found neither there")


def run_of(checkpoint: Path) -> Path:
    """The folder of a run, from wherever its checkpoint is named."""
    return checkpoint.absolute().parent.parent


def prefixed(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    return {f"{prefix}{name}": x for name, x in state.items()}


def unprefixed(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """Those that begin with it, without it."""
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def save_checkpoint(
    folder: Path,
    step: int,
    model_state: Mapping[str, Tensor],
    optim_state: Mapping[str, Tensor],
    extra: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint from one process, as `Saver.save` does; what `load_checkpoint` gives goes in.

    Of weights that share memory the first is written.
    """
    from sigma_train.saver import Saver  # DTensor takes a second to import

    own = {(x.data_ptr(), x.shape): name for name, x in reversed([*model_state.items()]) if x.numel()}
    weights = {name: x for name, x in model_state.items() if name in own.values() or not x.numel()}
    Saver(folder, keep).save(step, prefixed(weights, MODEL) | prefixed(optim_state, OPTIMIZER), extra)
    return place_of(folder, step)


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint of any number of ranks, experts in order, into this process.  Raises: CheckpointError for damage."""
    from sigma_train import sharded

    verify(path)
    record, state = read_record(path), sharded.empty(path)
    sharded.load_whole(path, state)
    state = {name: x for name, x in state.items() if not name.endswith(PLACEMENT)}
    return Checkpoint(record["step"], unprefixed(state, MODEL), unprefixed(state, OPTIMIZER), record["extra"])


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model that is whole.  Raises: CheckpointError if the checkpoint is of another."""
    from sigma_train import sharded

    must_fit(model, path)
    sharded.load_whole(path, prefixed(own_tensors(model, model.state_dict()), MODEL))


def must_fit(model: nn.Module, path: Path) -> None:
    """Raises: CheckpointError naming the first tensor that a whole model or the checkpoint lacks or has otherwise."""
    from sigma_train import sharded

    wanted = own_tensors(model, model.state_dict())
    found = unprefixed(sharded.described(path), MODEL)
    found = {name: x for name, x in found.items() if not name.endswith(PLACEMENT)}
    misfits = [f"{name} is missing" for name in wanted if name not in found]
    misfits += [f"{name} is unexpected" for name in found if name not in wanted]
    misfits += [
        f"{name} has shape {list(found[name].size)} instead of {list(x.shape)}"
        for name, x in wanted.items()
        if name in found and found[name].size != x.shape
    ]
    if misfits:
        more = f", and {len(misfits) - 1} more do not fit" if len(misfits) > 1 else ""
        raise CheckpointError(f"{path} does not fit the model of the settings: {misfits[0]}{more}")


def holds_moments(path: Path) -> bool:
    """Whether an optimizer that had made a step was saved."""
    from sigma_train import sharded

    return any(name.startswith(OPTIMIZER) for name in sharded.described(path))


def own_tensors(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of a state those that are saved: one that two names share under the first."""
    names = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    return {name: x for name, x in state.items() if name in names}
