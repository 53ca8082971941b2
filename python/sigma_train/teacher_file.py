"""The file of `sigma teacher cache`: what a teacher loses on each of its tokens of a training text.

A safetensors file, mapped into memory: `loss` [M] f16 or f32, NaN without context; `begins`, `ends` [M] int64, bytes of
the text, whose documents follow each other as in the split; `top` [M, K] f16, the K highest probabilities of what was
expected, falling, if any were asked for; and a record of what it is of, in its metadata.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sigma_train.alignment import UNMAPPED, byte_share
from sigma_train.config import DataConfig
from sigma_train.dataset import TokenDataset
from sigma_train.errors import WrongInput
from sigma_train.files import atomic_file
from sigma_train.kinds import Aggregate
from sigma_train.laid_over import Aligned
from sigma_train.spans import spans_of_lengths
from sigma_train.teacher_loss import aggregate_teacher_loss

VERSION = 2
RECORD = "sigma_teacher"
TENSORS = ("loss", "begins", "ends", "top")
BY_BYTES = Aligned()


@dataclass(frozen=True)
class TeacherLosses:
    """record: `text` (of `text_of`), `teacher`, `reading`, and in a file `sha256` of the tensors and of all this."""

    loss: Tensor
    begins: Tensor
    ends: Tensor
    top: Tensor
    record: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of losses and of what they are of; where the file lies does not matter."""
        return self.record["sha256"]

    @property
    def bits_per_byte(self) -> float:
        """Of the teacher on the text, without the tokens that have no loss and their bytes."""
        has_none = self.loss.isnan()
        num_bytes = self.record["text"]["bytes"] - (self.ends - self.begins)[has_none].sum().item()
        return self.loss[~has_none].double().sum().item() / math.log(2) / num_bytes

    def targets(self, dataset: TokenDataset, how: Aggregate, aligned: Aligned = BY_BYTES) -> Tensor:
        """[tokens] f32: the teacher's loss for each token of the split, NaN where it has none.

        Raises: WrongInput if the split has another number of bytes.
        """
        self._must_have_bytes_of(dataset)
        found = torch.empty(dataset.num_tokens)
        for tokens, of_teacher, ranges in aligned.over(dataset, self.begins, self.ends):
            share = None
            if how == "bytes":
                student = torch.from_numpy(spans_of_lengths(dataset.token_bytes[dataset.tokens[tokens]]))
                teacher = torch.stack([self.begins[of_teacher], self.ends[of_teacher]], dim=1)
                share = byte_share(student, teacher, ranges)  # of lengths alone, wherever the block begins
            found[tokens] = aggregate_teacher_loss(self.loss[of_teacher].float(), ranges, how, share)
        return found

    def partners(self, dataset: TokenDataset, aligned: Aligned = BY_BYTES) -> Tensor:
        """[tokens] int64: the first of the teacher's tokens for each token of the split, -1 where it expected none.

        Raises: WrongInput if the split has another number of bytes.
        """
        self._must_have_bytes_of(dataset)
        found = torch.empty(dataset.num_tokens, dtype=torch.int64)
        for tokens, of_teacher, ranges in aligned.over(dataset, self.begins, self.ends):
            first = ranges[:, 0]
            found[tokens] = torch.where(first == UNMAPPED, UNMAPPED, first + of_teacher.start)
        nothing = torch.cat([self.loss.isnan(), torch.ones(1, dtype=torch.bool)])  # and of -1, the last
        return found.masked_fill_(nothing[found], UNMAPPED)

    def _must_have_bytes_of(self, dataset: TokenDataset) -> None:
        if (found := dataset.num_bytes) != (wanted := self.record["text"]["bytes"]):
            raise WrongInput(
                f"objective.teacher: its losses are of {wanted} bytes of text, the split has {found}"
            )


def write_losses(path: Path, losses: TeacherLosses) -> None:
    """Whole or not at all; `record` gets version and sha256."""
    tensors = {name: getattr(losses, name) for name in TENSORS}
    record = {"version": VERSION, **losses.record}
    record["sha256"] = _sha256(record, tensors.values())
    with atomic_file(path) as file:  # by its name: `save` would have all of it in memory once more
        save_file(tensors, file.name, metadata={RECORD: json.dumps(record)})


def read_losses(path: Path, who: str) -> TeacherLosses:
    """Raises: WrongInput, `who` being the setting or option that named the file."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(RECORD, "{}"))
            if "version" not in record:
                raise WrongInput(f"{who}: {path} must be a file of `sigma teacher cache`, found another")
            if record["version"] != VERSION:
                raise WrongInput(
                    f"{who}: {path} must be of version {VERSION}, found {record['version']}; make it anew with "
                    "`sigma teacher cache`"
                )
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except FileNotFoundError:
        raise WrongInput(f"{who}: {path} is missing; `sigma teacher cache` makes it") from None
    except OSError as error:
        raise WrongInput(f"{who}: cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise WrongInput(
            f"{who}: {path} is not a file of `sigma teacher cache`, or is damaged: {error}"
        ) from None
    if _sha256(record, tensors.values()) != record.get("sha256"):
        raise WrongInput(f"{who}: {path} is damaged: its sha256 differs")
    return TeacherLosses(**tensors, record=record)


def text_of(corpus_digest: str, data: DataConfig, num_bytes: int) -> dict[str, Any]:
    """What tells the text of a training split: its documents follow from these, whatever the vocabulary."""
    return {
        "corpus_digest": corpus_digest,
        "val_fraction": data.val_fraction,
        "languages": data.languages,
        "bytes": num_bytes,
    }


def must_be_of(losses: TeacherLosses, wanted: dict[str, Any], path: Path) -> None:
    """Raises: WrongInput if the losses are of another text."""
    found = losses.record["text"]
    if differs := [key for key in wanted if found[key] != wanted[key]]:
        key = differs[0]
        raise WrongInput(
            f"objective.teacher: {path} holds losses of another text than the training split: {key} is {found[key]} "
            f"there and {wanted[key]} here"
        )


def must_have_top(losses: TeacherLosses, path: Path) -> Tensor:
    """[M, K] f16.  Raises: WrongInput if K is 0."""
    if not losses.top.shape[1]:
        raise WrongInput(
            f"objective.teacher: {path} must hold probabilities for objective.kind = uld, found losses alone; "
            "`sigma teacher cache --top 64` stores them"
        )
    return losses.top


def _sha256(record: dict[str, Any], tensors: Iterable[Tensor]) -> str:
    told = {key: value for key, value in record.items() if key != "sha256"}
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for x in tensors:
        found.update(f"{x.dtype} {list(x.shape)}".encode())
        found.update(x.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
