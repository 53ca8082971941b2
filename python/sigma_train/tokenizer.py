"""A byte-level BPE, trained once for a corpus and cached; any text survives encode and decode."""

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sigma_train.errors import WrongInput
from sigma_train.files import write_text

END_OF_TEXT = "<|endoftext|>"
VERSION = 1  # of the recipe below and of the file; part of every cache key


class DamagedFile(Exception):
    """A cached file is not what was written; the message says how."""


class Tokenizer:
    """encode and decode; ids 0..vocab_size-1, of which `eos_id` ends a document and is never made from text."""

    def __init__(self, serialized: str) -> None:
        self._serialized = serialized
        self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        # A text that spells the end of text is text, or any document could close itself.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.eos_id: int = self._tokenizer.token_to_id(END_OF_TEXT)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8, as where a character was cut, become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    @functools.cached_property
    def pieces(self) -> list[str]:
        """[vocab_size]: each token's bytes, written in the byte-level alphabet; none of the end of text."""
        pieces = [self._tokenizer.id_to_token(i) for i in range(self.vocab_size)]
        pieces[self.eos_id] = ""
        return pieces

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """[vocab_size] int64: bytes of text that each token stands for, 0 for the end of text."""
        return np.array([len(piece) for piece in self.pieces], dtype=np.int64)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self._serialized.encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the `tokenizer.json` that Hugging Face libraries read."""
        write_text(path, self._serialized)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens; a small corpus has fewer pairs worth merging."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str())


def read_tokenizer(path: Path) -> Tokenizer:
    """The file that `Tokenizer.save` wrote.  Raises: WrongInput if it is another."""
    try:
        tokenizer = Tokenizer(path.read_bytes().decode())
    except FileNotFoundError:
        raise WrongInput(f"{path} is missing") from None
    except Exception as error:  # tokenizers raises no kind of its own
        raise WrongInput(f"{path} is not a tokenizer: {error}") from None
    if tokenizer.eos_id is None:
        raise WrongInput(f"{path} is not the tokenizer of a run: it has no token {END_OF_TEXT}")
    return tokenizer


def save_cached(tokenizer: Tokenizer, path: Path) -> None:
    """One file with its own digest, so that it can neither be half there nor lie."""
    write_text(path, json.dumps({"sha256": tokenizer.digest, "tokenizer": tokenizer._serialized}))


def load_cached(path: Path) -> Tokenizer:
    """Raises FileNotFoundError, or DamagedFile if the content is not what `save_cached` wrote."""
    try:
        entry = json.loads(path.read_bytes())
        serialized, sha256 = entry["tokenizer"], entry["sha256"]
        matches = hashlib.sha256(serialized.encode()).hexdigest() == sha256
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedFile("not the JSON that was written") from None
    if not matches:
        raise DamagedFile("sha256 differs")
    return Tokenizer(serialized)
