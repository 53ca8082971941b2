"""A trained run with its text by language: what is counted on, and what losses are taken of."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from sigma_train.by_language import batches_of_language, evaluate_by_language, languages_of
from sigma_train.checkpoint import RECORD
from sigma_train.config import Config
from sigma_train.dataset import PreparedData
from sigma_train.errors import WrongInput
from sigma_train.files import sha256_file
from sigma_train.model import LanguageModel, precision
from sigma_train.trained import load_trained
from torch import Tensor, nn

from sigma_neurons.counting import ActivationCounter
from sigma_neurons.stats import ActivationStats

Split = Literal["train", "val"]


class Measured(Protocol):
    """A model and its text by language; about: whose the results are, of which text, and the size of a batch."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def languages(self) -> tuple[str, ...]: ...
    def about(self) -> dict[str, Any]: ...
    def count(self, split: Split, limit: int) -> ActivationStats: ...
    def losses(self, limit: int) -> dict[str, float]: ...


@dataclass(frozen=True)
class Run:
    """A model of a run, and the text that it was trained and validated on."""

    checkpoint: Path
    step: int
    config: Config
    model: LanguageModel
    data: PreparedData

    def about(self) -> dict[str, Any]:
        """Whose the results are: digests stay where the run is moved or named in another way."""
        t, splits = self.config.train, (self.data.train, self.data.val)
        return {
            "checkpoint": str(self.checkpoint),
            "checkpoint_sha256": sha256_file(self.checkpoint / RECORD),
            "step": self.step,
            "text": [languages_of(split).digest for split in splits],
            "seq_len": t.seq_len,
            "batch_size": t.batch_size,
        }

    @property
    def languages(self) -> tuple[str, ...]:
        return languages_of(self.data.train).names

    def batches(self, split: Split, limit: int) -> Iterator[tuple[str, Tensor]]:
        """As `even_parts` has them, `limit` batches of each language or what the least has."""
        t, data = self.config.train, getattr(self.data, split)
        found = {
            name: torch.cat(
                [inputs for inputs, _ in batches_of_language(data, name, t.batch_size, t.seq_len, limit)]
            )
            for name in self.languages
        }
        return even_parts(found, t.batch_size)

    @torch.no_grad()
    def count(self, split: Split, limit: int) -> ActivationStats:
        with precision(self.config):
            return count_activations(self.model, self.languages, self.batches(split, limit), self.model)

    def losses(self, limit: int) -> dict[str, float]:
        """Bits per byte of each language on the validation split."""
        return evaluate_by_language(self.model, self.data.val, self.config, limit)


def even_parts(windows: Mapping[str, Tensor], batch_size: int) -> Iterator[tuple[str, Tensor]]:
    """(language, tokens): batches of as many windows of each language as the least has.

    More of one language's text would move the quantile of all probabilities to its side.
    """
    least = min(map(len, windows.values()))
    for name, of_language in windows.items():
        yield from zip(itertools.repeat(name), of_language[:least].split(batch_size))


def count_activations(
    model: nn.Module,
    languages: Sequence[str],
    batches: Iterable[tuple[str, Tensor]],
    forward: Callable[[Tensor], Tensor],
) -> ActivationStats:
    with ActivationCounter(model, languages) as counter:
        for language, tokens in batches:
            with counter.batch(language, tokens):
                forward(tokens)
    return counter.stats


def load(place: Path) -> Run:
    """The newest model of a run, or one checkpoint of it, and its text.

    Raises: WrongInput if the text is not there as it was, or not in languages; CheckpointError if there is no model.
    """
    found = load_trained(place)
    if not found.config.data.languages:
        raise WrongInput(f"neurons wants a run with data.languages = true, {place} has false")
    run = Run(found.checkpoint, found.step, found.config, found.model.eval(), found.text())
    if len(run.languages) < 2:
        raise WrongInput(f"neurons wants text in at least 2 languages, found {run.languages[0]} alone")
    return run
