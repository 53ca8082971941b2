"""Versions of a book for `guide-languages`, and the paragraphs of two of them that say the same."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sigma_train.config import DataConfig
from sigma_train.dataset import PreparedData, TokenDataset
from sigma_train.errors import Failure, WrongInput
from sigma_train.files import write_text
from sigma_train.guide import LEAST_LETTERS, PIVOT, prepare_guide, translated
from sigma_train.languages import files_of, language_of, splits_of
from sigma_train.tokenizer import Tokenizer

from sigma_experiments.invented import ARMENIAN, CYRILLIC

Pair = tuple[str, str]  # a paragraph, and the English one
HEADING = re.compile(r"(\d+(?:\.\d+)+)\.\s+\S")  # of a section, alike in all versions: `5.1.2. Booting ...`
NAME = re.compile(r"[!-~]*[\d/][!-~]*")  # what nobody translates: paths, numbers
PARAGRAPHS = 4000  # of the made-up book, 200 kB or more in each version


def versions(folder: Path) -> dict[str, str]:
    """Debian's installation guide by language, fetched into `folder` if no text is there yet.

    Raises: WrongInput if the package manager does not give it, or it has no English version.
    """
    if not any(folder.glob("*.txt")):
        try:
            prepare_guide(folder)
        except (Failure, WrongInput) as error:
            raise WrongInput(
                f"guide-languages: `sigma data prepare installation-guide --out {folder}` is needed, and fails: {error}"
            ) from None
    found = {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}
    if PIVOT not in found or len(found) < 3:
        raise WrongInput(
            f"guide-languages: {folder} must have {PIVOT}.txt and two languages or more beside it, "
            f"found {', '.join(found)}"
        )
    return found


def made_up() -> dict[str, str]:
    """A book of drawn words, English in name alone, and two translations of it into other letters."""
    drawn = np.random.default_rng(0)
    words = ["".join(drawn.choice([*"abcdefghijklmnopqrstuvwxyz"], 5)) for _ in range(300)]
    parts = []
    for number in range(PARAGRAPHS):
        parts += [f"{number}.1. {words[number % 300]}"] if number % 3 == 0 else []
        parts.append(" ".join(drawn.choice(words, 8)))
    english = "\n\n".join(parts)
    return {PIVOT: english, "xa": english.translate(CYRILLIC), "xb": english.translate(ARMENIAN)}


def write_versions(folder: Path, texts: Mapping[str, str]) -> list[str]:
    """LANG.txt of each without what is English in the others; their names.  What stands there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for language, content in translated(texts).items():
        path = folder / f"{language}.txt"
        if not path.exists() or path.read_text() != content:
            write_text(path, content)
        paths.append(str(path))
    return paths


def side_by_side(text: str, english: str) -> list[Pair]:
    """Paragraphs at the same place of a section that both have in as many paragraphs; only those that say much.

    Left out are paragraphs of fewer than LEAST_LETTERS letters, and those that are the English ones.
    """
    own, other = _sections(text), _sections(english)
    pairs: list[Pair] = []
    for number, paragraphs in other.items():
        if len(own.get(number, ())) == len(paragraphs):
            pairs += zip(own[number], paragraphs, strict=True)
    return [pair for pair in pairs if min(map(_letters, pair)) >= LEAST_LETTERS and _differ(*pair)]


def agreement(pairs: Sequence[Pair]) -> float:
    """Of the words with a digit or a slash in the first of each pair, the share that the second has as well."""
    names, both = 0, 0
    for pair in pairs:
        one, other = ({word.strip(".,;:()") for word in NAME.findall(paragraph)} for paragraph in pair)
        names += len(one)
        both += len(one & other)
    return both / max(names, 1)


def strangers(pairs: Sequence[Pair]) -> list[Pair]:
    """The same paragraphs, each beside the one of another pair, half the book away."""
    away = len(pairs) // 2
    return [(own, pairs[(i + away) % len(pairs)][1]) for i, (own, _) in enumerate(pairs)]


def pairs_of_training(texts: Mapping[str, str], data: DataConfig) -> dict[str, list[Pair]]:
    """By language, those of which both paragraphs are in documents of the training split."""
    _, documents, _ = splits_of(files_of(data), data)
    seen: dict[str, set[str]] = {language: set() for language in texts}
    for document in documents:
        seen[language_of(document)].update(document.read().split("\n\n"))
    return {
        language: [
            (own, other)
            for own, other in side_by_side(text, texts[PIVOT])
            if own in seen[language] and other in seen[PIVOT]
        ]
        for language, text in texts.items()
        if language != PIVOT
    }


def fitting(pairs: Mapping[str, list[Pair]], tokenizer: Tokenizer, seq_len: int) -> dict[str, list[Pair]]:
    """Pairs of paragraphs of less than half a window each, so that any two are in one window."""

    def fits(paragraph: str) -> bool:
        return len(tokenizer.encode(paragraph)) < seq_len // 2 - 1

    return {language: [pair for pair in own if all(map(fits, pair))] for language, own in pairs.items()}


def paired(pairs: Mapping[str, list[Pair]], data: PreparedData, seq_len: int) -> TokenDataset:
    """A split of windows that hold whole pairs, in an order drawn once.  Raises: WrongInput if there is none."""
    written = [f"{own}\n\n{other}" for of_language in pairs.values() for own, other in of_language]
    if not written:
        raise WrongInput(
            "guide-languages: no paragraphs of two versions stand side by side in windows of "
            f"train.seq_len = {seq_len}; the text is not of one book"
        )
    order = np.random.default_rng(0).permutation(len(written))
    end = data.tokenizer.eos_id
    documents = data.tokenizer.encode_batch([written[i] for i in order])
    tokens = packed([[*ids, end] for ids in documents], seq_len, end)
    token_bytes = data.train.token_bytes
    return TokenDataset("pairs", tokens, int(token_bytes[tokens].sum()), token_bytes)


def packed(documents: Sequence[Sequence[int]], size: int, filler: int) -> np.ndarray:
    """Blocks of `size` tokens of whole documents, each filled up, and one token behind; none may be longer."""
    blocks: list[list[int]] = [[]]
    for document in documents:
        if len(blocks[-1]) + len(document) > size:
            blocks.append([])
        blocks[-1].extend(document)
    filled = np.full(len(blocks) * size + 1, filler, dtype=np.int64)
    for number, block in enumerate(blocks):
        filled[number * size : number * size + len(block)] = block
    return filled


def _sections(text: str) -> dict[str, list[str]]:
    """Paragraphs by the number of their section, headings left out."""
    found: dict[str, list[str]] = {}
    number = None
    for paragraph in text.split("\n\n"):
        if heading := HEADING.match(paragraph):
            number = heading[1]
            found.setdefault(number, [])
        elif number is not None:
            found[number].append(paragraph)
    return found


def _letters(paragraph: str) -> int:
    return sum(map(str.isalpha, paragraph))


def _differ(one: str, other: str) -> bool:
    return one.split() != other.split()
