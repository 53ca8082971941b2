"""Batches, their languages and losses of a split whose documents know theirs, with data.languages."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sigma_train.config import Config
from sigma_train.corpus import CorpusError
from sigma_train.dataset import TokenDataset
from sigma_train.evaluate import batch_nats
from sigma_train.languages import Languages
from sigma_train.model import LanguageModel


def languages_of(data: TokenDataset) -> Languages:
    """Raises: CorpusError without data.languages."""
    if data.languages is None:
        raise CorpusError("data.languages must be true where the language of text is asked for, found false")
    return data.languages


def batches_of_language(
    data: TokenDataset, name: str, batch_size: int, seq_len: int, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of the windows that are wholly in this language, in their order, at most `limit` batches.

    Raises: CorpusError if there is none.
    """
    languages = languages_of(data)
    if name not in languages.names:
        raise CorpusError(f"data: the language must be one of {', '.join(languages.names)}, found {name!r}")
    of_windows = languages.of_windows(np.arange(data.num_windows(seq_len)), seq_len)
    windows = np.flatnonzero(of_windows == languages.names.index(name))
    if not len(windows):
        raise CorpusError(
            f"data: the {data.split} split has no window of train.seq_len = {seq_len} in {name} alone; add text"
        )
    for start in itertools.islice(range(0, len(windows), batch_size), limit):
        yield data.windows(windows[start : start + batch_size], seq_len)


def batch_languages(
    data: TokenDataset,
    step: int,
    batch_size: int,
    seq_len: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """The language of each target of `data.batch`, int64 [batch_size, seq_len], as indices into the names."""
    places = data.target_places(step, batch_size, seq_len, seed, rank, world_size)
    return torch.from_numpy(languages_of(data).at(places.numpy()))


def evaluate_by_language(
    model: LanguageModel, data: TokenDataset, config: Config, limit: int | None = None
) -> dict[str, float]:
    """Bits per byte of each language, on at most `limit` batches of the windows that are wholly in it.

    Compare one language under two models, not two languages: a letter is one byte in English, two in Greek, three in
    Japanese.  Raises: CorpusError without data.languages, or naming a language that has no such window.
    """
    t, found = config.train, {}
    for name in languages_of(data).names:
        nats, num_bytes = 0.0, 0
        for inputs, targets in batches_of_language(data, name, t.batch_size, t.seq_len, limit):
            nats += batch_nats(model, inputs, targets, config)
            num_bytes += data.count_bytes(targets)
        found[name] = nats / math.log(2) / num_bytes
    return found
