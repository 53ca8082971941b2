"""Four languages made of one text: the same meaning, and it is known which text is whose.

    pivot      the text in lower case
    rot13      each letter the thirteenth after it: the pivot's own letters
    cyrillic   letters of an alphabet of its own
    reversed   another alphabet, and the words of each line in reverse order

The languages share what is no letter.
"""

import string
from pathlib import Path

from sigma_train.corpus import find_files, read_corpus
from sigma_train.files import write_text

ROT13 = str.maketrans(string.ascii_lowercase, string.ascii_lowercase[13:] + string.ascii_lowercase[:13])
CYRILLIC = str.maketrans(string.ascii_lowercase, "".join(chr(0x430 + i) for i in range(26)))
ARMENIAN = str.maketrans(string.ascii_lowercase, "".join(chr(0x561 + i) for i in range(26)))
LANGUAGES = ("cyrillic", "pivot", "reversed", "rot13")  # in order, as a split has them
SHARES = {"pivot": 0.6, "rot13": 0.2, "cyrillic": 0.1, "reversed": 0.1}  # of the characters


def translate(text: str, language: str) -> str:
    text = text.lower()
    if language == "reversed":
        text = "\n".join(" ".join(reversed(line.split(" "))) for line in text.split("\n"))
    return text.translate({"pivot": {}, "rot13": ROT13, "cyrillic": CYRILLIC, "reversed": ARMENIAN}[language])


def write_texts(folder: Path, characters: int) -> None:
    """LANG.txt of each, all from the beginning of one text: what one says the others say too, as far as they go.

    What stands there already is kept, so that the second start finds its tokens in the cache.
    """
    text = ""
    for document in read_corpus(find_files(()), 8 * characters).documents:
        text += document.read()
        if len(text) >= characters:
            break
    folder.mkdir(parents=True, exist_ok=True)
    for language, share in SHARES.items():
        path = folder / f"{language}.txt"
        content = translate(text[: round(share * characters)], language)
        if not path.exists() or path.read_text() != content:
            write_text(path, content)
