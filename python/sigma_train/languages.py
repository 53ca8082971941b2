"""The languages of a corpus of files LANG.txt: those of its documents, and in a split those of its tokens.

With data.languages the stem of a file is the language of its text, files of another ending are left out, and each
language has documents in both splits.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sigma_train.config import DataConfig
from sigma_train.corpus import Corpus, CorpusError, Document, find_files, read_corpus, split

ENDING = ".txt"


@dataclasses.dataclass(frozen=True)
class Languages:
    """names, sorted; of each document of a split its language, an index into names, and the token after its last."""

    names: tuple[str, ...]
    of_document: np.ndarray  # [D] int64
    ends: np.ndarray  # [D] int64, rising

    @property
    def digest(self) -> str:
        """sha256 of which documents are of which language, where the corpus's own is of their text alone."""
        found = hashlib.sha256(json.dumps(self.names).encode())
        for x in (self.of_document, self.ends):
            found.update(x.astype("<i8").tobytes())
        return found.hexdigest()

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The language of the token at each position, int64; an end of text has that of the document it ends."""
        return self.of_document[self._document(positions)]

    def of_windows(self, windows: np.ndarray, seq_len: int) -> np.ndarray:
        """The language of each window, int64; -1 where its seq_len + 1 tokens are not all of one."""
        run = np.cumsum(
            np.diff(self.of_document, prepend=self.of_document[:1]) != 0
        )  # of documents in one language
        first, last = (self._document(windows * seq_len + n) for n in (0, seq_len))
        return np.where(run[first] == run[last], self.of_document[first], -1)

    def _document(self, positions: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, positions, side="right")


def files_of(data: DataConfig) -> list[Path]:
    """The files of data.paths, with data.languages those that are LANG.txt."""
    files = find_files(data.paths)
    return language_files(files) if data.languages else files


def splits_of(files: Sequence[Path], data: DataConfig) -> tuple[Corpus, list[Document], list[Document]]:
    """The corpus, and its documents for training and for validation."""
    corpus = read_corpus(files, data.max_bytes)
    cut = functools.partial(split_each, files) if data.languages else split
    return corpus, *cut(corpus.documents, data.val_fraction)


def language_files(files: Sequence[Path]) -> list[Path]:
    """Raises: CorpusError if none of them is LANG.txt."""
    found = [path for path in files if path.suffix == ENDING]
    if not found:
        raise CorpusError(
            f"data.languages wants files LANG{ENDING}, found none in {len(files)} files of data.paths"
        )
    return found


def language_of(document: Document) -> str:
    return document.path.stem


def split_each(
    files: Sequence[Path], documents: Sequence[Document], val_fraction: float
) -> tuple[list[Document], list[Document]]:
    """`split` of each language by itself, so that each is in both.

    Raises: CorpusError naming a language of a single document, or a file that gave none.
    """
    by_language: dict[str, list[Document]] = {path.stem: [] for path in files}
    for document in documents:
        by_language[language_of(document)].append(document)
    if missing := [language for language, own in by_language.items() if not own]:
        raise CorpusError(
            f"data.languages: no text is left of {', '.join(missing)}; the file is empty, not UTF-8, all found in "
            "another language or beyond data.max_bytes"
        )
    val: set[str] = set()
    for language, own in by_language.items():
        try:
            val |= {document.sha256 for document in split(own, val_fraction)[1]}
        except CorpusError as error:
            raise CorpusError(f"{error} (language {language})") from None
    return [d for d in documents if d.sha256 not in val], [d for d in documents if d.sha256 in val]
