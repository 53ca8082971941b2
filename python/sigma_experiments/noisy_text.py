"""Text of which a known part is noise: of three documents in ten, three characters in ten are drawn anew.

Python's standard library in pieces, in three parts: for a teacher, clean; for students, with the noise; held out,
clean.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sigma_train.config import DataConfig
from sigma_train.corpus import find_files, read_corpus
from sigma_train.dataset import TokenDataset
from sigma_train.errors import WrongInput
from sigma_train.files import write_text
from sigma_train.languages import files_of, splits_of
from sigma_train.spans import spans_of_lengths
from sigma_train.tokenizer import Tokenizer

PIECE = 4096  # bytes of a document at most, so that there are many
NOISY, REPLACED = 0.3, 0.3  # of the documents, of the characters of one
CLEAN, BESIDE_NOISE, NOISE, END = range(
    4
)  # kinds of tokens: of a clean document, of a noisy one, with a drawn character


@dataclass(frozen=True)
class Texts:
    """Folders of documents; masks: of each noisy document's bytes whether it was drawn, by the name of its file."""

    teacher: Path
    student: Path
    held_out: Path
    masks: dict[str, np.ndarray]

    def kinds(self, dataset: TokenDataset, data: DataConfig) -> np.ndarray:
        """[tokens] of the training split: which kind each is of."""
        _, documents, _ = splits_of(files_of(data), data)
        of_bytes = np.concatenate([self._of_document(d.path.name, d.start, d.size) for d in documents])
        begins, ends = spans_of_lengths(dataset.token_bytes[dataset.tokens]).T
        noise = np.concatenate([[0], np.cumsum(of_bytes == NOISE)])
        kinds = of_bytes[np.minimum(begins, len(of_bytes) - 1)]
        kinds[noise[ends] > noise[begins]] = NOISE
        kinds[begins == ends] = END
        return kinds

    def clean(self, tokenizer: Tokenizer) -> TokenDataset:
        """What was held out, as this tokenizer has it."""
        texts = [path.read_text() for path in sorted(self.held_out.iterdir())]
        ids = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
        tokens = np.concatenate([np.array(each, dtype=np.int64) for each in ids])
        return TokenDataset("held out", tokens, sum(map(len, texts)), tokenizer.token_bytes)

    def _of_document(self, name: str, start: int, size: int) -> np.ndarray:
        if name not in self.masks:
            return np.full(size, CLEAN, np.int8)
        return np.where(self.masks[name][start : start + size], NOISE, BESIDE_NOISE).astype(np.int8)


def write_texts(folder: Path, num_bytes: int) -> Texts:
    """A tenth of `num_bytes` held out, as many each for the others; what is there already stays.

    Raises: WrongInput if there is not so much text on this machine, or other text in the folder.
    """
    pieces = clean_pieces()
    parts = Texts(*(folder / name for name in ("teacher", "student", "held-out")), {})
    contents: dict[Path, dict[str, str]] = {}
    for place, size in (
        (parts.held_out, num_bytes // 10),
        (parts.teacher, num_bytes),
        (parts.student, num_bytes),
    ):
        of_place = contents[place] = {}
        while size > 0:
            text = next(pieces, None)
            if text is None:
                raise WrongInput(
                    f"this Python's library has less than {2.1 * num_bytes:.0f} bytes of ASCII text"
                )
            size -= len(text)
            digest = hashlib.sha256(text.encode()).digest()
            name = f"{digest.hex()[:16]}.txt"
            drawn = np.random.default_rng(list(digest))
            if place == parts.student and drawn.random() < NOISY:
                text, parts.masks[name] = with_noise(text, drawn)
            of_place[name] = text
    for place, texts in contents.items():  # of another size: what is held out here would be learned from
        place.mkdir(parents=True, exist_ok=True)
        if others := {path.name for path in place.glob("[!.]*")} - texts.keys():
            raise WrongInput(
                f"experiment: {place} holds other text, {min(others)}; remove it or name another --out"
            )
    for place, texts in contents.items():
        for name, text in texts.items():
            if not (place / name).exists():
                write_text(place / name, text)
    return parts


def clean_pieces() -> Iterator[str]:
    """Pieces of whole lines, in an order that depends on content alone; ASCII, where a character is a byte."""
    for document in read_corpus(find_files(())).documents:
        text = document.read()
        if not text.isascii():
            continue
        piece = ""
        for line in text.splitlines(keepends=True):
            if len(piece) + len(line) > PIECE and piece:
                yield piece
                piece = ""
            piece += line
        yield piece


def with_noise(text: str, drawn: np.random.Generator) -> tuple[str, np.ndarray]:
    """Some characters replaced by any that can be printed, and which."""
    content = np.frombuffer(text.encode(), dtype=np.uint8).copy()
    mask = drawn.random(len(content)) < REPLACED
    content[mask] = drawn.integers(33, 127, mask.sum())
    return content.tobytes().decode(), mask
