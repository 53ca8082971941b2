"""Texts in languages that share no letter, for tests."""

from pathlib import Path

import numpy as np

LETTERS = {"aa": "abcdef", "bb": "ghijkl", "cc": "mnopqr"}


def write_texts(folder: Path) -> None:
    """LANG.txt of each: 72 kB in lines of five letters, two documents."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for name, letters in LETTERS.items():
        words = rng.choice(np.frombuffer(letters.encode(), np.uint8), (12_000, 6))
        words[:, -1] = ord("\n")
        (folder / f"{name}.txt").write_bytes(words.tobytes())
