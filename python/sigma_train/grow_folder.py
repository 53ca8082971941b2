"""Growth of a transformers checkpoint: a folder of config.json and safetensors, one file or many with an index.

What is copied passes in blocks of some MB, and what gets noise one matrix of one expert at a time, so memory does not
grow with the checkpoint, its files or its layers.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sigma_train.errors import WrongInput
from sigma_train.files import atomic_folder, failed_writes_are_oserrors, must_be_new, sync, write_text
from sigma_train.growth_cost import SunkCostLedger
from sigma_train.growth_names import Kind, parse
from sigma_train.growth_pieces import Grown, Growth, Piece, expert_counts, grown_tensors
from sigma_train.growth_settings import family_of, grown_settings, num_experts, top_k, what_gates_ask
from sigma_train.tensor_files import Stored, header_of, size_of, stored_tensors, sync_file

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".index.json")
NOISY = ("F64", "F32", "BF16", "F16")
LEDGER = "growth.json"


@dataclass(frozen=True)
class Folder:
    """A checkpoint: its settings, where its tensors lie, and how it came to be if it was grown."""

    path: Path
    settings: dict[str, Any]
    tensors: dict[str, Stored]
    ledger: SunkCostLedger

    @classmethod
    def read(cls, path: Path) -> "Folder":
        """Raises: WrongInput for a file that is missing, damaged or of no use here."""
        settings = _json(path / "config.json")
        is_sharded = (path / INDEX).exists() and not (path / WHOLE).exists()  # as transformers chooses
        index = _weight_map(path / INDEX) if is_sharded else None
        files = [WHOLE] if index is None else sorted(set(index.values()))
        tensors: dict[str, Stored] = {}
        for name in files:
            if not (path / name).is_file():
                raise WrongInput(f"{path / name} is missing; weights must be safetensors")
            tensors |= stored_tensors(path / name)
        if index is not None and (missing := index.keys() - tensors.keys()):
            raise WrongInput(f"{path / INDEX} names {min(missing)}, which is in none of its files")
        return cls(path, settings, tensors, _ledger(path / LEDGER))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: x.shape for name, x in self.tensors.items()}


class Open(Mapping[str, Tensor]):
    """Tensors of a folder by name, each read when it is asked for, and not kept."""

    def __init__(self, folder: Folder, stack: ExitStack) -> None:
        self._tensors = folder.tensors
        paths = {x.path for x in folder.tensors.values()}
        self._files = {path: stack.enter_context(path.open("rb")) for path in paths}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._tensors[name]
        return stored.read(self._files[stored.path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def blocks(self, piece: Piece) -> Iterator[bytes]:
        """What a piece of a grown tensor is, as bytes."""
        stored = self._tensors[piece.source]
        if piece.row is not None:
            stored = _one(stored, piece, piece.row)
        file = self._files[stored.path]
        if piece.noise == 0 and piece.scale == 1:
            yield from stored.blocks(file)
        elif stored.end > stored.begin:
            yield _bytes(piece.of(stored.read(file)))


def _one(stored: Stored, piece: Piece, row: int) -> Stored:
    if piece.parts:
        return stored.part(row, piece.parts)
    return stored.number(row) if piece.is_number else stored.row(row)


def grow_folder(
    folder: Folder, growth: Growth, sunk_tokens: int, shard_bytes: int, out: Path
) -> SunkCostLedger:
    """Write `out`, whole or not at all; what the grown model has cost so far, which is in growth.json too.

    Args:
        growth: what of it the gates decide, as `score`, is taken from config.json.
        sunk_tokens: that the weights were trained on; of a folder that was grown, since it was.
        shard_bytes: the most of a file of several tensors.
    Raises: WrongInput if `out` is there, or the growth does not fit the model.
    """
    must_be_new(out, "--out")
    growth = replace(growth, **what_gates_ask(folder.settings))
    settings = grown_settings(folder.settings, growth)
    made = _made(folder, growth)
    ledger = _grown_ledger(folder, growth, sunk_tokens)
    with atomic_folder(out, "--out") as temporary:
        with failed_writes_are_oserrors(out):
            _carry(folder.path, temporary)
            _write_shards(folder, made, temporary, shard_bytes)
        write_text(temporary / LEDGER, json.dumps(ledger.record(), indent=2) + "\n")
        write_text(temporary / "config.json", json.dumps(settings, indent=2) + "\n")
    return ledger


def _made(folder: Folder, growth: Growth) -> dict[str, Grown]:
    """Raises: WrongInput if config.json and the tensors disagree, or noise would be lost in a dtype's rounding."""
    made = grown_tensors(folder.shapes, growth)
    layers = {parse(name).layer for name in folder.shapes}
    if missing := set(range(growth.layers.num_layers)) - layers:
        raise WrongInput(
            f"config.json has {growth.layers.num_layers} layers, no tensor is of layer {min(missing)}"
        )
    E = num_experts(folder.settings)
    counts = {} if family_of(folder.settings).no_experts else expert_counts(folder.shapes)
    for layer, count in counts.items():
        if count != E:
            raise WrongInput(f"config.json has {E} experts, the tensors of layer {layer} are of {count}")
    for each in made.values():
        for piece in each.pieces:
            dtype = folder.tensors[piece.source].dtype
            if (piece.noise or piece.scale != 1) and dtype not in NOISY:
                raise WrongInput(f"{piece.source} is {dtype}; what changes must be one of {', '.join(NOISY)}")
    return made


def _carry(source: Path, out: Path) -> None:
    """Copy what is no weight: tokenizer, generation settings, code, licence."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHTS) and path.name not in ("config.json", LEDGER):
            shutil.copyfile(path, out / path.name)
            sync(out / path.name)


def _write_shards(folder: Folder, made: Mapping[str, Grown], out: Path, shard_bytes: int) -> None:
    described = {name: (folder.tensors[x.pieces[0].source].dtype, x.shape) for name, x in made.items()}
    shards = _shards(described, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [WHOLE]
    with ExitStack() as stack:
        source = Open(folder, stack)
        for file_name, shard in zip(names, shards, strict=True):
            with open(out / file_name, "xb") as file:
                file.write(header_of(shard))
                for name in shard:
                    _write(file, source, made[name])
                sync_file(file)
    if len(shards) > 1:
        total = sum(size_of(*each) for each in described.values())
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_text(out / INDEX, json.dumps(index, indent=2) + "\n")


def _write(file: BinaryIO, source: Open, made: Grown) -> None:
    for piece in made.pieces:
        for block in source.blocks(piece):
            file.write(block)


def _shards(
    described: Mapping[str, tuple[str, tuple[int, ...]]], most: int
) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """In order, each as full as it can be; a tensor that is larger has one to itself."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, each in described.items():
        if shards[-1] and size + size_of(*each) > most:
            shards.append({})
            size = 0
        shards[-1][name] = each
        size += size_of(*each)
    return shards


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _grown_ledger(folder: Folder, growth: Growth, tokens: int) -> SunkCostLedger:
    """6 FLOPs a token and active parameter: attention's scores, which depend on the sequence, are left out."""
    spent = 6.0 * active_parameters(folder) * tokens
    how = {"from": str(folder.path), "tokens": tokens, **growth.record()}
    return replace(folder.ledger, extra_flops=spent).grown(how)


def active_parameters(folder: Folder) -> float:
    """That one token meets, embeddings among them."""
    share = top_k(folder.settings) / num_experts(folder.settings)
    of_experts = (Kind.ALL_EXPERTS, Kind.ONE_EXPERT)
    return sum(
        math.prod(shape) * (share if parse(name).kind in of_experts else 1.0)
        for name, shape in folder.shapes.items()
    )


def _weight_map(path: Path) -> dict[str, str]:
    """Of each tensor its file."""
    found = _json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise WrongInput(f"{path} must have a weight_map, the file of each tensor")
    return found


def _ledger(path: Path) -> SunkCostLedger:
    told = _json(path) if path.exists() else None
    try:
        return SunkCostLedger.of_record(told)
    except (KeyError, TypeError, ValueError):
        raise WrongInput(f"{path} must hold flops and history, as sigma grow writes them") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise WrongInput(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise WrongInput(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise WrongInput(f"{path} must hold a JSON object, found {type(found).__name__}")
    return found
