"""Tokens in a memory-mapped file, and batches that are a pure function of the step.

Window w of S tokens covers tokens[w*S : w*S + S + 1], inputs all but its last, targets all but its first.
Sample p of a run is window permutation_{seed, epoch}(p mod W) with epoch = p div W: an epoch visits each of the
W windows once, a restart repeats what it would have seen, and no state is kept.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sigma_train import tokenizer as bpe
from sigma_train.config import Config, DataConfig
from sigma_train.corpus import (
    MAX_DOCUMENT_BYTES,
    Corpus,
    CorpusError,
    Document,
    at_most,
    digest_of,
)
from sigma_train.files import atomic_file, locked, must_be_writable, sha256_file, sweep, write_text
from sigma_train.languages import Languages, files_of, language_of, splits_of
from sigma_train.tokenizer import DamagedFile, Tokenizer, train_tokenizer

VERSION = 2  # of the files in the cache; part of every key
TOKENIZER_SAMPLE_BYTES = 1 << 26  # 64 MiB of training text settle a vocabulary of this size
COUNT_BLOCK = 1 << 20  # tokens that are widened at once to be counted
ENCODE_BATCH = 256  # documents, at most 16 MiB of text
STALE_S = 86_400.0  # an unfinished file this old belongs to no one

T = TypeVar("T")
log = logging.getLogger(__name__)


class CacheWarning(UserWarning):
    """A cached file was damaged and has been made again."""


@dataclasses.dataclass(frozen=True)
class TokenDataset:
    """One split: its tokens, its size in bytes of text, and batches of it."""

    split: str
    tokens: np.ndarray  # [N] uint16 or uint32, on disk
    num_bytes: int
    token_bytes: np.ndarray  # [vocabulary] bytes of text that a token stands for
    languages: Languages | None = None  # of the documents, with data.languages

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def commonest(self) -> float:
        """The share of all tokens that are the commonest one; one pass, less than the digest takes at the start."""
        counts = np.zeros(len(self.token_bytes), np.int64)
        for begin in range(0, self.num_tokens, COUNT_BLOCK):
            counts += np.bincount(self.tokens[begin : begin + COUNT_BLOCK], minlength=len(counts))
        return float(counts.max()) / self.num_tokens

    def count_bytes(self, targets: Tensor) -> int:
        """Bytes of text that exactly these tokens stand for, where a limited evaluation sees part of a split."""
        return int(self.token_bytes[targets.cpu().numpy()].sum())

    def num_windows(self, seq_len: int) -> int:
        windows = (self.num_tokens - 1) // seq_len
        if windows < 1:
            more = "raise data.val_fraction" if self.split == "val" else "lower train.seq_len"
            raise CorpusError(
                f"data: the {self.split} split has {self.num_tokens} tokens, a window of "
                f"train.seq_len = {seq_len} takes {seq_len + 1}; add text or {more}"
            )
        return windows

    def batch(
        self, step: int, batch_size: int, seq_len: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [batch_size, seq_len], of this rank's part of global batch `step`.

        The global batch has batch_size * world_size rows; ranks share it without overlap.  Where that product
        and the step stay the same, so do the rows, whatever the number of ranks.
        """
        return self.windows(self._sampled(step, batch_size, seq_len, seed, rank, world_size), seq_len)

    def target_places(
        self, step: int, batch_size: int, seq_len: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> Tensor:
        """Where in the split the targets of `batch` stand, int64 [batch_size, seq_len]."""
        windows = self._sampled(step, batch_size, seq_len, seed, rank, world_size)
        return torch.from_numpy(windows[:, None] * seq_len + np.arange(1, seq_len + 1))

    def _sampled(
        self, step: int, batch_size: int, seq_len: int, seed: int, rank: int, world_size: int
    ) -> np.ndarray:
        first = (step * world_size + rank) * batch_size
        return sample_windows(first, batch_size, self.num_windows(seq_len), seed)

    def eval_batches(
        self, batch_size: int, seq_len: int, limit: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The windows in their order, at most `limit` batches; the last batch of the split may be smaller."""
        windows = self.num_windows(seq_len)
        for start in itertools.islice(range(0, windows, batch_size), limit):
            yield self.windows(np.arange(start, min(start + batch_size, windows)), seq_len)

    def windows(self, windows: np.ndarray, seq_len: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of windows by their numbers."""
        rows = self.tokens[windows[:, None] * seq_len + np.arange(seq_len + 1)].astype(np.int64)  # [B, S + 1]
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def sample_windows(first: int, count: int, windows: int, seed: int) -> np.ndarray:
    """The windows of samples first..first+count-1, int64 [count]."""
    epoch, place = np.divmod(np.arange(first, first + count, dtype=np.int64), windows)
    out = np.empty(count, dtype=np.int64)
    for e in np.unique(epoch):
        out[epoch == e] = permuted(place[epoch == e], windows, f"{seed}/{e}")
    return out


def permuted(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """A keyed permutation of 0..size-1 at `index`, without the memory or the time of writing it out.

    A Feistel network permutes the next power of four; walking its cycle until it lands below `size` makes that
    a permutation of 0..size-1 (Black and Rogaway 2002).  Unlike a library's shuffle it never changes.
    """
    half = np.uint64(max(((size - 1).bit_length() + 1) // 2, 1))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.frombuffer(hashlib.sha512(key.encode()).digest(), dtype="<u8")  # [8]

    def scramble(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) >> (np.uint64(64) - half))
        return left << half | right

    out = scramble(index.astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = scramble(out[outside])
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class PreparedData:
    tokenizer: Tokenizer
    train: TokenDataset
    val: TokenDataset
    stats: dict[str, Any]  # counts and digests, ready for JSON


def cache_dir(config: DataConfig) -> Path:
    folder = config.cache_dir or os.environ.get("SIGMA_CACHE") or "~/.cache/sigma-kernels"
    return Path(folder).expanduser()


def prepare(config: Config) -> PreparedData:
    """Corpus, tokenizer and tokens, made once and found again at once the next time.

    Raises: CorpusError if no file matches, nothing is text, or a split is shorter than one window; WrongInput if
    the cache can't be written.
    """
    data = config.data
    files = files_of(data)
    settings = data.max_bytes, data.val_fraction, config.model.vocab_size, data.languages
    key = _key(*map(_fingerprint, files), *settings)
    folder = cache_dir(config.data)
    with contextlib.ExitStack() as stack:
        with must_be_writable("data.cache_dir, or SIGMA_CACHE", folder):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / f"lock-{key}"))
        cache = Cache(folder)
        prepared = cache.look_up(key) or cache.build(key, files, config)
    for dataset in (prepared.train, prepared.val):
        dataset.num_windows(config.train.seq_len)  # too short is an error now, not at the first evaluation
    return prepared


class Cache:
    """What `prepare` leaves behind: the record of a key names a tokenizer and a token file by their content."""

    def __init__(self, folder: Path) -> None:
        sweep(folder, STALE_S)
        self.folder = folder

    def look_up(self, key: str) -> PreparedData | None:
        record_path = self.folder / f"prepared-{key}.json"
        record = self._load(_load_record, record_path)
        if record is None:
            return None
        tokenizer = self._load(bpe.load_cached, self.folder / record["tokenizer"])
        splits = self._load(load_tokens, self.folder / record["tokens"])
        if tokenizer is None or splits is None or tokenizer.digest != record["stats"]["tokenizer_digest"]:
            return None
        return _prepared(tokenizer, splits, record)

    def build(self, key: str, files: Sequence[Path], config: Config) -> PreparedData:
        corpus, train, val = splits_of(files, config.data)
        tokenizer_path, tokenizer = self._tokenizer(train, config.model.vocab_size)
        tokens_key = _key(digest_of(train), digest_of(val), tokenizer.digest)
        tokens_path = self.folder / f"tokens-{tokens_key}.bin"
        splits = self._load(load_tokens, tokens_path)
        if splits is None:
            log.info("encoding %d documents", len(corpus.documents))
            save_tokens(tokens_path, tokenizer, {"train": train, "val": val})
            splits = load_tokens(tokens_path)
        stats = _stats(corpus, tokenizer, splits)
        record = {"tokenizer": tokenizer_path.name, "tokens": tokens_path.name, "stats": stats}
        if config.data.languages:
            named = {"train": train, "val": val}
            record["languages"] = {name: [*map(language_of, documents)] for name, documents in named.items()}
        sealed = {"sha256": _seal(record), "record": record}
        write_text(self.folder / f"prepared-{key}.json", json.dumps(sealed, indent=1))
        return _prepared(tokenizer, splits, record)

    def _tokenizer(self, train: Sequence[Document], vocab_size: int) -> tuple[Path, Tokenizer]:
        path = self.folder / f"tokenizer-{_key(digest_of(train), vocab_size, bpe.VERSION)}.json"
        tokenizer = self._load(bpe.load_cached, path)
        if tokenizer is None:
            log.info("training a tokenizer of %d tokens", vocab_size)
            sample = at_most(train, TOKENIZER_SAMPLE_BYTES)
            tokenizer = train_tokenizer((document.read() for document in sample), vocab_size)
            bpe.save_cached(tokenizer, path)
        return path, tokenizer

    @staticmethod
    def _load(load: Callable[[Path], T], path: Path) -> T | None:
        """None where there is nothing, or nothing sound: what is damaged is named, then made again."""
        try:
            return load(path)
        except FileNotFoundError:
            return None
        except DamagedFile as error:
            warnings.warn(
                f"cache file {path} is damaged ({error}); making it again", CacheWarning, stacklevel=2
            )
            return None


@dataclasses.dataclass(frozen=True)
class Split:
    tokens: np.ndarray
    num_bytes: int
    ends: np.ndarray  # [documents] int64, of each the token after its last

    @property
    def num_documents(self) -> int:
        return len(self.ends)


def save_tokens(path: Path, tokenizer: Tokenizer, splits: dict[str, Sequence[Document]]) -> None:
    """Write all splits one after the other into `path`, then the sidecar that says what lies where."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    sha256 = hashlib.sha256()
    sidecar: dict[str, Any] = {"version": VERSION, "dtype": dtype.name, "splits": {}}
    with atomic_file(path) as file:
        for name, documents in splits.items():
            lengths: list[int] = []
            for group in _groups(documents, ENCODE_BATCH):
                encoded = tokenizer.encode_batch([document.read() for document in group])
                ids = [np.array([*ids, tokenizer.eos_id], dtype=dtype) for ids in encoded]
                content = np.concatenate(ids)
                file.write(content.data)
                sha256.update(content.data)
                lengths += map(len, ids)
            num_bytes = sum(document.size for document in documents)
            sidecar["splits"][name] = {"bytes": num_bytes, "document_tokens": lengths}
    sidecar["sha256"] = sha256.hexdigest()
    write_text(_sidecar_path(path), json.dumps(sidecar, indent=1))


def load_tokens(path: Path) -> dict[str, Split]:
    """Raises FileNotFoundError if either file is missing, DamagedFile if they do not belong together."""
    try:
        sidecar = json.loads(_sidecar_path(path).read_bytes())
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[sidecar["dtype"]])
        sizes = {
            name: Split(np.empty(0), s["bytes"], np.cumsum(s["document_tokens"], dtype=np.int64))
            for name, s in sidecar["splits"].items()
        }
        counts = {name: int(s.ends[-1]) for name, s in sizes.items()}
        sha256 = sidecar["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise DamagedFile(
            f"its sidecar {_sidecar_path(path).name} is not the JSON that was written"
        ) from None
    found, wanted = path.stat().st_size, sum(counts.values()) * dtype.itemsize
    if found != wanted:
        raise DamagedFile(f"{found} bytes instead of {wanted}")
    if sha256_file(path) != sha256:
        raise DamagedFile("sha256 differs")
    tokens = np.memmap(path, dtype=dtype, mode="r")
    ends = itertools.accumulate(counts.values())
    return {
        name: dataclasses.replace(sizes[name], tokens=tokens[end - counts[name] : end])
        for name, end in zip(counts, ends, strict=True)
    }


def _sidecar_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _load_record(path: Path) -> dict[str, Any]:
    try:
        sealed = json.loads(path.read_bytes())
        sound = _seal(sealed["record"]) == sealed["sha256"]
    except (ValueError, KeyError, TypeError):
        raise DamagedFile("not the JSON that was written") from None
    if not sound:
        raise DamagedFile("sha256 differs")
    return sealed["record"]


def _seal(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _prepared(tokenizer: Tokenizer, splits: dict[str, Split], record: dict[str, Any]) -> PreparedData:
    by_split = record.get("languages", {})
    names = tuple(sorted({language for of_documents in by_split.values() for language in of_documents}))

    def dataset(name: str) -> TokenDataset:
        part, languages = splits[name], None
        if names:
            index = np.array([names.index(language) for language in by_split[name]], dtype=np.int64)
            languages = Languages(names, index, part.ends)
        return TokenDataset(name, part.tokens, part.num_bytes, tokenizer.token_bytes, languages)

    return PreparedData(tokenizer, dataset("train"), dataset("val"), record["stats"])


def _stats(corpus: Corpus, tokenizer: Tokenizer, splits: dict[str, Split]) -> dict[str, Any]:
    stats: dict[str, Any] = {
        "files": corpus.files,
        "undecodable": corpus.undecodable,
        "unreadable": corpus.unreadable,
        "duplicates": corpus.duplicates,
        "corpus_digest": corpus.digest,
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
    }
    for name, part in splits.items():
        stats[f"{name}_documents"] = part.num_documents
        stats[f"{name}_bytes"] = part.num_bytes
        stats[f"{name}_tokens"] = len(part.tokens)
        stats[f"{name}_bytes_per_token"] = part.num_bytes / len(part.tokens)
    return stats


def _fingerprint(path: Path) -> tuple[str, int, int, int]:
    """What tells a file changed without reading it; ctime catches a rewrite that sets the old mtime again."""
    stat = path.stat()
    return str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _key(*parts: Any) -> str:
    return hashlib.sha256(repr((VERSION, bpe.VERSION, MAX_DOCUMENT_BYTES, parts)).encode()).hexdigest()[:16]


def _groups(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
