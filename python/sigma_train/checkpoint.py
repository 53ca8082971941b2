"""Checkpoints that are either whole or absent: written beside their place, synced, then renamed into it.

DIR/step-00000200/model.safetensors   the weights
                  optimizer.pt        the optimizer's tensors
                  state.json          step, extra state, and the sha256 of the two files above
"""

import dataclasses
import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sigma_train.errors import WrongInput
from sigma_train.files import TEMPORARY, failed_writes_are_oserrors, sha256_file, sync, temporary_name

VERSION = 3
FILES = ("model.safetensors", "optimizer.pt")


class CheckpointError(WrongInput):
    """A checkpoint can't be used; one sentence."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    step: int
    model_state: dict[str, Tensor]
    optim_state: dict[str, Any]
    extra: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    model_state: Mapping[str, Tensor],
    optim_state: Mapping[str, Any],
    extra: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write step-NNNNNNNN below `folder`, then remove all but the newest `keep`; only once the new one is durable.

    A tensor that two names share is written under the first.  `extra` must be JSON.
    Raises: OSError if the disk is full; then the former checkpoints are as they were and nothing is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f"{TEMPORARY}*"):  # one writer a run: these are a killed process's
        shutil.rmtree(stale, ignore_errors=True)
    final = folder / f"step-{step:08d}"
    temporary = temporary_name(final)
    temporary.mkdir()
    try:
        with failed_writes_are_oserrors(final):
            save_file(_unshared(model_state), temporary / FILES[0])
            torch.save(dict(optim_state), temporary / FILES[1])
            digests = {name: sha256_file(temporary / name) for name in FILES}
            state = {"version": VERSION, "step": step, "sha256": digests, "extra": dict(extra)}
            text = json.dumps(state)
            seal = hashlib.sha256(text.encode()).hexdigest()
            (temporary / "state.json").write_text(f"{seal}\n{text}\n")
            for name in (*FILES, "state.json"):
                sync(temporary / name)
            sync(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[tuple[int, torch.Size]] = set()
    out = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        out[name] = tensor.detach().contiguous()
    return out


def _read_state(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if anything below `path` is not what was written."""
    try:
        seal, _, text = (path / "state.json").read_text().partition("\n")
        text = text.rstrip("\n")
        if hashlib.sha256(text.encode()).hexdigest() != seal:
            raise CheckpointError(f"checkpoint {path} is damaged: state.json is not what was written")
        state: dict[str, Any] = json.loads(text)
        for name, digest in state["sha256"].items():
            if sha256_file(path / name) != digest:
                raise CheckpointError(f"checkpoint {path} is damaged: the sha256 of {name} differs")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {error}") from None
    if state["version"] != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format {state['version']}, this program reads {VERSION}"
        )
    return state


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest sound checkpoint below `folder`, None if there is none at all.

    A damaged one is named in a warning and passed over.  Raises: CheckpointError if all are damaged.
    """
    damaged = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            _read_state(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            warnings.warn(f"{message}; using the one before", CheckpointWarning, stacklevel=2)
        return path
    if damaged:
        raise CheckpointError(
            f"{damaged[0]}, and no other below {folder} is sound; a new run needs another folder"
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Raises CheckpointError if it is damaged."""
    state = _read_state(path)
    optim_state = torch.load(path / FILES[1], weights_only=True)
    return Checkpoint(state["step"], load_file(path / FILES[0]), optim_state, state["extra"])


def load_weights(model: nn.Module, checkpoint: Checkpoint, source: Path) -> None:
    """Fill `model` with the weights of `checkpoint`, which came from `source`.

    Raises: CheckpointError naming the first tensor that one of them lacks or has in another shape.
    """
    wanted, found = _unshared(model.state_dict()), checkpoint.model_state
    misfits = [f"{name} is missing" for name in wanted if name not in found]
    misfits += [f"{name} is unexpected" for name in found if name not in wanted]
    misfits += [
        f"{name} has shape {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if misfits:
        more = f", and {len(misfits) - 1} more do not fit" if len(misfits) > 1 else ""
        raise CheckpointError(f"{source} does not fit the model of the settings: {misfits[0]}{more}")
    model.load_state_dict(found, strict=False)  # not strict: a tied tensor stands under its first name only
