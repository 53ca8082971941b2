"""A causal model of `transformers` and text by language: what is counted on, and what losses are taken of."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sigma_train.config import Config
from sigma_train.corpus import Document
from sigma_train.errors import WrongInput
from sigma_train.languages import files_of, language_of, splits_of
from sigma_train.teacher import TransformersTeacher
from torch import Tensor, nn

from sigma_neurons.measured import Split, count_activations, even_parts
from sigma_neurons.stats import ActivationStats

IGNORED = -100  # the target of a token that stands before a text: no text is to be predicted there


class Foreign:
    """A folder of `transformers`; the text, its split and the size of batches are those of `config`.

    Documents follow each other in windows, each after the token that the tokenizer names as the beginning of text.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        """Raises: WrongInput if the model cannot be loaded or read so much; CorpusError if there is no such text."""
        self._folder, self._reader, self._t = folder, TransformersTeacher(folder, "neurons"), config.train
        if self._t.seq_len > self._reader.context:
            raise WrongInput(
                f"neurons: train.seq_len must be at most {self._reader.context}, what {folder} can read, "
                f"found {self._t.seq_len}"
            )
        files = files_of(config.data)
        _, train, val = splits_of(files, config.data)
        self._text = [_digest(documents) for documents in (train, val)]
        self._documents: dict[Split, list[Document]] = {"train": train, "val": val}
        self._validation: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.languages = tuple(sorted({path.stem for path in files}))
        if len(self.languages) < 2:
            raise WrongInput(f"neurons wants text in at least 2 languages, found {self.languages[0]} alone")

    @property
    def model(self) -> nn.Module:
        return self._reader.model

    @cached_property
    def _about(self) -> dict[str, Any]:
        return {
            "checkpoint": str(self._folder),
            "checkpoint_sha256": self._reader.digest,
            "step": None,
            "text": self._text,
            "seq_len": self._t.seq_len,
            "batch_size": self._t.batch_size,
        }

    def about(self) -> dict[str, Any]:
        """As it was before the first ablation, and is after each."""
        return self._about

    @torch.no_grad()
    def count(self, split: Split, limit: int) -> ActivationStats:
        t = self._t
        found = {name: self._windows(split, name, limit)[0][:, :-1] for name in self.languages}
        return count_activations(self.model, self.languages, even_parts(found, t.batch_size), self._logits)

    @torch.no_grad()
    def losses(self, limit: int) -> dict[str, float]:
        """Bits per byte of each language on the validation split."""
        found = {}
        for name in self.languages:
            nats, num_bytes = 0.0, 0
            if (name, limit) not in self._validation:  # each ablation asks again, and to encode takes longest
                self._validation[name, limit] = self._windows("val", name, limit)
            rows, sizes = self._validation[name, limit]
            for tokens, of_tokens in zip(
                rows.split(self._t.batch_size), sizes.split(self._t.batch_size), strict=True
            ):
                targets = tokens[:, 1:].masked_fill(of_tokens[:, 1:] < 0, IGNORED)
                logits = self._logits(tokens[:, :-1]).flatten(0, 1).float()
                nats += F.cross_entropy(
                    logits, targets.flatten(), reduction="sum", ignore_index=IGNORED
                ).item()
                num_bytes += int(of_tokens[:, 1:].clamp(min=0).sum())
            found[name] = nats / math.log(2) / num_bytes
        return found

    def _logits(self, tokens: Tensor) -> Tensor:
        """Raises: WrongInput if one is no finite number: no gate of NaN is above zero, and none would be counted."""
        logits = self._reader.logits(tokens)
        if not logits.isfinite().all():
            found = logits[~logits.isfinite()][0].item()
            raise WrongInput(
                f"neurons: logits of {self._folder} must be finite numbers, found {found} in {logits.dtype}: it has "
                "diverged, is damaged or overflows"
            )
        return logits

    def _windows(self, split: Split, language: str, limit: int) -> tuple[Tensor, Tensor]:
        """[windows, S + 1] tokens, and the bytes of text that each stands for, -1 of one that is none of the text's.

        At most `limit` batches.  Raises: WrongInput if there is not one window.
        """
        t = self._t
        wanted = limit * t.batch_size * t.seq_len + 1
        tokens, sizes, found = [], [], 0
        for of_document, of_tokens in self._encoded(split, language):
            tokens.append(of_document)
            sizes.append(of_tokens)
            found += len(of_document)
            if found >= wanted:
                break
        windows = (min(found, wanted) - 1) // t.seq_len
        if windows < 1:
            raise WrongInput(
                f"neurons: the {split} split must have a window of {t.seq_len + 1} tokens in {language}, found "
                f"{found}; add text or lower train.seq_len"
            )
        places = torch.arange(windows)[:, None] * t.seq_len + torch.arange(t.seq_len + 1)
        return tuple(torch.from_numpy(np.concatenate(parts))[places] for parts in (tokens, sizes))

    def _encoded(self, split: Split, language: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        prefix = np.array(self._reader.prefix, dtype=np.int64)
        for document in self._documents[split]:
            if language_of(document) == language:
                ids, spans = self._reader.encode([document.read()])[0]
                ends = np.maximum.accumulate(spans[:, 1])  # tokens of one character have its bytes once
                sizes = np.diff(ends, prepend=0)
                yield np.concatenate([prefix, ids]), np.concatenate([np.full(len(prefix), -1), sizes])


def _digest(documents: Sequence[Document]) -> str:
    """sha256 of the documents of a split and their languages."""
    told = [(language_of(document), document.sha256) for document in documents]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
