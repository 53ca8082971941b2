"""Text of which a known part is noise: the noise is where the masks say, and each token is of the kind it is."""

import numpy as np
import pytest
from sigma_experiments.noisy_text import (
    BESIDE_NOISE,
    CLEAN,
    END,
    NOISE,
    Texts,
    clean_pieces,
    with_noise,
    write_texts,
)
from sigma_train.config import load_config
from sigma_train.corpus import find_files, read_corpus, split
from sigma_train.dataset import prepare
from sigma_train.errors import WrongInput


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Texts:
    return write_texts(tmp_path_factory.mktemp("texts"), 200_000)


def test_noise_is_where_the_mask_says():
    text = "def f(x):\n    return x\n" * 400
    noisy, mask = with_noise(text, np.random.default_rng(0))
    assert all(a == b for a, b, is_drawn in zip(text, noisy, mask, strict=True) if not is_drawn)
    changed = np.mean([a != b for a, b, is_drawn in zip(text, noisy, mask, strict=True) if is_drawn])
    assert changed > 0.95, "a drawn character is seldom the one that stood there"
    assert 0.28 < mask.mean() < 0.32
    assert noisy.isascii()


def test_parts_share_no_document_and_stay(texts, tmp_path):
    """Defends: a teacher, or a test, that knows the students' text; other text the second time."""
    parts = [
        {p.read_text() for p in place.iterdir()} for place in (texts.teacher, texts.student, texts.held_out)
    ]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    sizes = [sum(map(len, part)) for part in parts]
    assert sizes == pytest.approx([200_000, 200_000, 20_000], abs=4096)
    assert 0.1 < len(texts.masks) / len(parts[1]) < 0.5
    clean = set(clean_pieces())
    assert parts[0] | parts[2] <= clean
    assert len(parts[1] - clean) == len(texts.masks)
    again = write_texts(tmp_path, 200_000)
    assert {p.name for p in again.student.iterdir()} == {p.name for p in texts.student.iterdir()}
    assert again.masks.keys() == texts.masks.keys()
    assert all((again.masks[name] == mask).all() for name, mask in texts.masks.items())


def test_text_of_another_size_is_not_mixed_in(tmp_path):
    """Defends: text that is held out in the one and learned from in the other."""
    write_texts(tmp_path, 40_000)
    files = set(tmp_path.rglob("*.txt"))
    for size in (8_000, 80_000):
        with pytest.raises(WrongInput, match=r"holds other text, .*; remove it or name another --out"):
            write_texts(tmp_path, size)
    files.pop().unlink()
    write_texts(tmp_path, 40_000)
    assert len({*tmp_path.rglob("*.txt")}) == len(files) + 1


def test_kinds_of_tokens(texts, tmp_path):
    """By the definition, token by token."""
    paths = {"data": {"paths": [str(texts.student)], "cache_dir": str(tmp_path)}}
    config = load_config("smoke", None, ["model.vocab_size=400"], paths)
    data = prepare(config)
    kinds = texts.kinds(data.train, config.data)
    documents, _ = split(read_corpus(find_files(config.data.paths)).documents, config.data.val_fraction)
    want, token = [], 0
    for document in documents:
        mask, at = texts.masks.get(document.path.name), 0
        while at < document.size:
            until = at + int(data.train.token_bytes[data.train.tokens[token]])
            want.append(CLEAN if mask is None else NOISE if mask[at:until].any() else BESIDE_NOISE)
            at, token = until, token + 1
        want.append(END)
        token += 1
    assert kinds.tolist() == want
    assert all((kinds == kind).any() for kind in range(4))


def test_held_out_text_is_whole(texts, tmp_path):
    paths = {"data": {"paths": [str(texts.student)], "cache_dir": str(tmp_path)}}
    tokenizer = prepare(load_config("smoke", None, ["model.vocab_size=400"], paths)).tokenizer
    found = texts.clean(tokenizer)
    assert found.num_bytes == sum(p.stat().st_size for p in texts.held_out.iterdir())
    assert found.token_bytes[found.tokens].sum() == found.num_bytes
    assert (found.tokens == tokenizer.eos_id).sum() == len(list(texts.held_out.iterdir()))
