"""Text from files, folders and globs, as documents in an order and a split that depend on content alone."""

import dataclasses
import functools
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sigma_train.errors import WrongInput

MAX_DOCUMENT_BYTES = (
    1 << 16
)  # a longer file is cut at line ends, so that one book still has two sides to split


class CorpusError(WrongInput):
    """No usable text, in one sentence."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A file, or a piece of a long one; the text stays on disk until it is read."""

    path: Path
    start: int
    size: int
    sha256: str

    def read(self) -> str:
        """The text; raises CorpusError if the file is no longer what was listed."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                content = file.read(self.size)
        except OSError as error:
            raise CorpusError(f"data: cannot read {self.path} a second time: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise CorpusError(f"data: {self.path} changed while it was being read; start again")
        return content.decode()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in order of their sha256, so that neither names nor folders matter."""

    documents: tuple[Document, ...]
    files: int  # that gave text
    undecodable: int  # files skipped: not UTF-8, or with a NUL byte
    unreadable: int  # files skipped: the system refused
    duplicates: int  # documents dropped: same bytes as another

    @functools.cached_property
    def digest(self) -> str:
        return digest_of(self.documents)

    @property
    def num_bytes(self) -> int:
        return sum(document.size for document in self.documents)


def digest_of(documents: Iterable[Document]) -> str:
    return hashlib.sha256(b"".join(bytes.fromhex(document.sha256) for document in documents)).hexdigest()


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that `paths` name, sorted; no path: the default corpus.  Hidden entries of folders are left out."""
    if not paths:
        return _standard_library()
    found: set[Path] = set()
    for path in paths:
        files = set(_expand(path))
        if not files:
            raise CorpusError(f"data.paths: no file matches {path!r}")
        found |= files
    return sorted(found)


def read_corpus(files: Sequence[Path], max_bytes: int | None = None) -> Corpus:
    """List the distinct documents of `files`, at most `max_bytes` of them in all.

    Raises: CorpusError if nothing is left.
    """
    by_sha256: dict[str, Document] = {}
    used = undecodable = unreadable = duplicates = 0
    for path in files:
        try:
            documents = list(_documents(path))
        except UnicodeDecodeError:
            undecodable += 1
            continue
        except OSError:
            unreadable += 1
            continue
        used += bool(documents)
        for document in documents:
            duplicates += document.sha256 in by_sha256
            by_sha256.setdefault(document.sha256, document)
    if not by_sha256:
        raise CorpusError(
            f"data: no text in {len(files)} files ({undecodable} not UTF-8, {unreadable} unreadable, "
            f"{len(files) - undecodable - unreadable} empty)"
        )
    ordered = [by_sha256[sha256] for sha256 in sorted(by_sha256)]
    kept = list(at_most(ordered, max_bytes))
    if not kept:
        raise CorpusError(
            f"data.max_bytes = {max_bytes} is less than the first document's {ordered[0].size} bytes"
        )
    return Corpus(tuple(kept), used, undecodable, unreadable, duplicates)


def split(documents: Sequence[Document], val_fraction: float) -> tuple[list[Document], list[Document]]:
    """(train, validation), each document by its own content: adding files moves none to the other side.

    Should chance leave a side empty (a handful of documents), the likeliest document goes there.
    """
    val = {d.sha256 for d in documents if _side(d) < val_fraction}
    if not val and len(documents) > 1:
        val = {min(documents, key=_side).sha256}
    elif 1 < len(val) == len(documents):
        val.remove(max(documents, key=_side).sha256)
    train = [d for d in documents if d.sha256 not in val]
    if not train or not val:
        raise CorpusError(
            f"data: {len(documents)} documents cannot be split into training and validation; "
            f"add text, {MAX_DOCUMENT_BYTES} bytes or more make two documents"
        )
    return train, [d for d in documents if d.sha256 in val]


def at_most(documents: Sequence[Document], max_bytes: int | None) -> Iterator[Document]:
    """The first documents, as many as fit into `max_bytes`; None: all."""
    total = 0
    for document in documents:
        total += document.size
        if max_bytes is not None and total > max_bytes:
            return
        yield document


def _side(document: Document) -> float:
    """Uniform in [0, 1), from the end of the digest: its start gives the order, and `max_bytes` keeps low starts."""
    return int(document.sha256[-13:], 16) / 16**13  # 52 bits, exact in a float and so never 1


def _standard_library() -> list[Path]:
    """Python's own library without its tests, which are three fifths of it and mostly tables and broken code."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise CorpusError(f"data: this Python has no library source in {root}; name some text in data.paths")
    return sorted(files)


def _expand(path: str) -> Iterator[Path]:
    path = os.path.expanduser(path)
    # A name that exists is itself, brackets and all; only another is a pattern.
    matches = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    for match in map(Path, matches):
        if match.is_dir():
            for folder, folders, names in os.walk(match):
                folders[:] = [name for name in folders if not name.startswith(".")]
                files = [Path(folder, name) for name in names if not name.startswith(".")]
                yield from (file.absolute() for file in files if file.is_file())
        elif match.is_file():  # not a pipe or a device: reading one might never end
            yield match.absolute()


def _documents(path: Path) -> Iterator[Document]:
    start = 0
    for piece in _pieces(path):
        if b"\0" in piece:
            raise UnicodeDecodeError("utf-8", piece[:64], 0, 1, "binary")
        piece.decode()
        yield Document(path, start, len(piece), hashlib.sha256(piece).hexdigest())
        start += len(piece)


def _pieces(path: Path) -> Iterator[bytes]:
    """The file in pieces of at most MAX_DOCUMENT_BYTES that end with a line, or with a character in a longer line."""
    with open(path, "rb") as file:
        rest = b""
        while rest := rest + file.read(MAX_DOCUMENT_BYTES + 1 - len(rest)):
            if len(rest) <= MAX_DOCUMENT_BYTES:
                yield rest
                return
            cut = rest.rfind(b"\n", 0, MAX_DOCUMENT_BYTES) + 1
            if not cut:
                cut = MAX_DOCUMENT_BYTES
                while cut > MAX_DOCUMENT_BYTES - 3 and rest[cut] & 0xC0 == 0x80:  # inside a character
                    cut -= 1
            yield rest[:cut]
            rest = rest[cut:]
