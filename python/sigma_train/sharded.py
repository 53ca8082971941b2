"""Tensors in the folder of a checkpoint, by torch.distributed.checkpoint: each rank writes and reads its own part.

Names and whole shapes are the same however many ranks wrote, so that any number of them can read.
"""

import contextlib
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.storage import WriteResult

from sigma_kernels.distributed.placement import check_placement
from sigma_train.checkpoint import (
    MODEL,
    PLACEMENT,
    CheckpointError,
    place_of,
    prune,
    seal,
    unprefixed,
)
from sigma_train.files import failed_writes_are_oserrors, sha256_file, sync
from sigma_train.ranks import Ranks

METADATA = ".metadata"


@dataclass(frozen=True)
class Digest:
    """sha256 of a file that a rank wrote; travels to the first rank among the results of its writes."""

    sha256: str


class Writer(FileSystemWriter):
    """One checkpoint of all ranks, which has its name once the parts of all are durable, or is not there.

    What fails on one rank, DCP raises on all.
    """

    def __init__(self, temporary: Path, folder: Path, step: int, extra: dict[str, Any], keep: int) -> None:
        super().__init__(temporary)
        self.temporary, self.folder, self.step, self.extra, self.keep = temporary, folder, step, extra, keep
        self.place = place_of(folder, step)

    def storage_meta(self) -> None:
        """None: the metadata would name the temporary folder."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        with failed_writes_are_oserrors(self.place):
            return super().prepare_local_plan(plan)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """On each rank."""
        with failed_writes_are_oserrors(self.place), without_crc32():
            results = super().write_data(plan, planner).value()
            files = sorted(self.temporary.glob(f"{plan.storage_data.prefix}*"))
            digests = [
                WriteResult(MetadataIndex(path.name), path.stat().st_size, Digest(sha256_file(path)))
                for path in files
            ]
            sync(self.temporary)
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result([*results, *digests])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, once all have written."""
        told = [result for each in results for result in each]
        digests = {x.index.fqn: x.storage_data.sha256 for x in told if isinstance(x.storage_data, Digest)}
        with failed_writes_are_oserrors(self.place):
            super().finish(metadata, [[x for x in told if not isinstance(x.storage_data, Digest)]])
            digests[METADATA] = sha256_file(self.temporary / METADATA)
            seal(self.temporary, self.place, self.step, self.extra, digests)
        prune(self.folder, self.keep)


@contextlib.contextmanager
def without_crc32() -> Iterator[None]:
    """Have torch.save leave it out, 0.5 s of 1.6 for 0.9 GB: the sha256 says more, and torch.load does not ask."""
    former = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(former)


class Metadatas(pickle.Unpickler):
    """The classes of DCP's metadata and no others: a pickle may call whatever it names."""

    PARTS = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", name) for name in (
                "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            *(("torch", name) for name in ("Size", "float32", "int64")),
        }
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        if (module, name) not in self.PARTS:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of it")
        return super().find_class(module, name)


def enum_member(enum: Any, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 pickle a member of an enumeration as is getattr of the two."""
    if not (isinstance(enum, EnumType) and name in enum.__members__):
        raise pickle.UnpicklingError(f"attribute {name} of {enum} is no part of it")
    return enum[name]


class Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with open(Path(self.path) / METADATA, "rb") as file:
                metadata: Metadata = Metadatas(file).load()
                return metadata
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"checkpoint {self.path} has metadata that are none: {error}") from None


def described(path: Path) -> dict[str, TensorStorageMetadata]:
    """Whole size and dtype of every tensor of a checkpoint."""
    parts = Reader(path).read_metadata().state_dict_metadata.items()
    return {name: x for name, x in parts if isinstance(x, TensorStorageMetadata)}  # there are no others


def empty(path: Path) -> dict[str, Tensor]:
    """Room for every tensor of a checkpoint, whole."""
    return {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in described(path).items()}


def load(path: Path, state: dict[str, Tensor], ranks: Ranks = Ranks()) -> None:  # noqa: B008
    """Fill the tensors of `state`, DTensors with this rank's part; a collective."""
    with first_failure():
        load_parts(state, storage_reader=Reader(path), no_dist=is_alone(ranks))


def load_whole(path: Path, state: dict[str, Tensor]) -> None:
    """Fill the tensors of `state`, which are whole: those of experts in the order of their numbers."""
    load(path, state)
    for layer, placement in placements(path).items():
        for name, x in state.items():
            if f"{layer}.experts." in name and x.dim() > 0:  # counts of steps have no row of an expert
                x.copy_(x[placement])


def placements(path: Path) -> dict[str, Tensor]:
    """Of each layer of the model whose experts are not in order: in a checkpoint row p is of whom stands at place p.

    Raises: CheckpointError for one that gives two experts one place.
    """
    found = {
        name: torch.empty(x.size, dtype=x.properties.dtype)
        for name, x in described(path).items()
        if name.endswith(PLACEMENT)
    }
    if found:
        load(path, found)
    for name, x in found.items():
        try:
            check_placement(f"checkpoint {path}", x, x.numel())
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{error}, in {name}") from None
    return {name.removesuffix(PLACEMENT): x for name, x in unprefixed(found, MODEL).items()}


@contextlib.contextmanager
def first_failure() -> Iterator[None]:
    """What failed on the lowest rank where something did, on all, in the place of DCP's collection of tracebacks."""
    try:
        yield
    except CheckpointException as error:
        raise min(error.failures.items())[1][0] from None


def is_alone(ranks: Ranks) -> bool:
    """DCP warns of every process without a group, from whichever thread it saves in."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    return ranks.size == 1
