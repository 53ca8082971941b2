"""Languages of a corpus: of each token the one of its document, and every language in both splits."""

import gzip
import hashlib
import json
import os
import stat

import numpy as np
import pytest
import torch
from language_texts import LETTERS, write_texts
from sigma_train import guide
from sigma_train.by_language import batch_languages, batches_of_language, evaluate_by_language, languages_of
from sigma_train.config import Config
from sigma_train.corpus import CorpusError
from sigma_train.dataset import PreparedData, TokenDataset, prepare
from sigma_train.errors import Failure, WrongInput
from sigma_train.evaluate import evaluate
from sigma_train.guide import CorpusWarning, decoded, prepare_guide, translated, untranslated
from sigma_train.languages import Languages
from sigma_train.model import LanguageModel


def config(tmp_path, **data) -> Config:
    folder = tmp_path / "text"
    write_texts(folder)
    (folder / "README.md").write_text("no language")
    return Config.from_dict(
        {
            "data": {"paths": [str(folder)], "cache_dir": str(tmp_path / "cache"), "languages": True, **data},
            "model": {
                "vocab_size": 300, "hidden_size": 8, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8,
                "intermediate_size": 8, "num_experts": 4, "num_layers": 1, "max_seq_len": 32,
            },
            "train": {"seq_len": 32, "batch_size": 4, "threads": 1},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Config:
    """Of text that no test changes: its tokens are made once."""
    return config(tmp_path_factory.mktemp("languages"))


def languages_by_letters(data: PreparedData, tokens: np.ndarray) -> set[str]:
    text = set(data.tokenizer.decode(tokens.tolist()).replace("<|endoftext|>", ""))
    return {name for name, letters in LETTERS.items() if text & set(letters)}


def test_every_language_is_in_both_splits_and_every_token_knows_its_own(tmp_path):
    """Defends: languages in another order than documents, an end off by one, README.md taken for a language."""
    settings = config(tmp_path)
    for data in (prepare(settings), prepare(settings)):  # made, and from the cache
        for split in (data.train, data.val):
            assert languages_of(split).names == ("aa", "bb", "cc")
            of_tokens = split.languages.at(np.arange(split.num_tokens))
            for number, name in enumerate(languages_of(split).names):
                assert languages_by_letters(data, split.tokens[of_tokens == number]) == {name}


def test_batches_of_a_language_are_all_its_windows_and_no_other(settings):
    """Defends: a window over the end of a document, the last target forgotten, the limit counted in windows."""
    data = prepare(settings)
    starts = []
    for name in languages_of(data.train).names:
        for inputs, targets in batches_of_language(data.train, name, 4, 32):
            for row, target in zip(inputs.numpy(), targets.numpy(), strict=True):
                assert languages_by_letters(data, np.append(row, target[-1])) == {name}
            starts.append(len(inputs))
    of_windows = data.train.languages.of_windows(np.arange(data.train.num_windows(32)), 32)
    assert sum(starts) == (of_windows >= 0).sum()
    assert 0 < (of_windows < 0).sum() <= len(data.train.languages.ends)
    assert len(list(batches_of_language(data.train, "bb", 4, 32, limit=3))) == 3


def test_the_languages_of_a_batch_are_those_of_its_targets():
    """Tokens that say their own position.  Defends: languages of inputs, of another step, of another rank's rows."""
    languages = Languages(("x", "y"), np.arange(90) % 2, np.arange(10, 910, 10))
    tokens = np.arange(900, dtype=np.uint16)
    data = TokenDataset("train", tokens, 900, np.ones(900, dtype=np.int64), languages)
    for step, rank in ((0, 0), (5, 1)):
        _, targets = data.batch(step, 3, 16, seed=1, rank=rank, world_size=2)
        ids = batch_languages(data, step, 3, 16, seed=1, rank=rank, world_size=2)
        assert torch.equal(ids, targets // 10 % 2)


def test_languages_of_known_documents():
    """Documents of 3, 2 and 4 tokens in languages 1, 1 and 0; windows of 2 tokens and the target after them."""
    languages = Languages(("x", "y"), np.array([1, 1, 0]), np.array([3, 5, 9]))
    assert languages.at(np.arange(9)).tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert languages.of_windows(np.arange(4), 2).tolist() == [1, 1, -1, 0]  # 0-2, 2-4, 4-6, 6-8
    assert languages.of_windows(np.arange(2), 4).tolist() == [1, -1]  # 0-4, 4-8
    assert languages.of_windows(np.array([0]), 5).tolist() == [-1]  # the last target alone is of another


def test_evaluation_by_language_adds_up_to_the_whole(settings):
    """Over windows of one language each, weighed by bytes.  Defends: bytes of the wrong tokens, a limit ignored."""
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"batch_size": 64})})
    data, model = prepare(settings).val, LanguageModel(settings)
    found = evaluate_by_language(model, data, settings)
    assert list(found) == ["aa", "bb", "cc"]
    num_bytes = {
        name: sum(data.count_bytes(t) for _, t in batches_of_language(data, name, 64, 32)) for name in found
    }

    class Pure(TokenDataset):
        def eval_batches(self, batch_size, seq_len, limit=None):
            for name in found:
                yield from batches_of_language(self, name, batch_size, seq_len)

    whole = evaluate(model, Pure(*(getattr(data, f) for f in data.__dataclass_fields__)), settings)
    mean = sum(found[name] * num_bytes[name] for name in found) / sum(num_bytes.values())
    assert whole == pytest.approx(mean, rel=1e-6)
    first = next(iter(batches_of_language(data, "bb", 64, 32)))
    limited = evaluate_by_language(model, data, settings, limit=1)
    assert limited["bb"] != found["bb"]
    assert first[0].shape == (64, 32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"languages": False}, "data.languages must be true"),
        ({"paths": "README.md"}, r"data.languages wants files LANG.txt, found none in 1 files"),
    ],
)
def test_wrong_use_is_named(settings, change, message):
    if "paths" in change:
        change = {"paths": (f"{settings.data.paths[0]}/{change['paths']}",)}
    settings = settings.model_copy(update={"data": settings.data.model_copy(update=change)})
    with pytest.raises(CorpusError, match=message):
        list(batches_of_language(prepare(settings).val, "aa", 4, 32))


def test_chance_leaves_no_language_without_training_text(tmp_path):
    data = prepare(config(tmp_path, val_fraction=0.99))
    for side in (data.train, data.val):
        assert set(side.languages.of_windows(np.arange(side.num_windows(32)), 32)) >= {0, 1, 2}


def test_a_language_of_one_document_is_named(tmp_path):
    settings = config(tmp_path)
    (tmp_path / "text" / "dd.txt").write_text("short\n" * 99)
    with pytest.raises(CorpusError, match=r"1 documents cannot be split .*\(language dd\)"):
        prepare(settings)


@pytest.mark.parametrize("content", [b"", "é".encode("latin-1") * 99, b"nul\0"])
def test_a_language_without_text_is_named(tmp_path, content):
    """Defends: a language that is not there without a word, as other text that cannot be read is left out."""
    settings = config(tmp_path)
    (tmp_path / "text" / "dd.txt").write_bytes(content)
    with pytest.raises(CorpusError, match="no text is left of dd; the file is empty, not UTF-8"):
        prepare(settings)


def test_a_language_that_is_not_there_is_named(settings):
    data = prepare(settings).val
    with pytest.raises(CorpusError, match="the language must be one of aa, bb, cc, found 'dd'"):
        list(batches_of_language(data, "dd", 4, 32))


def test_documents_that_are_not_all_of_the_tokens_are_damage(tmp_path):
    """Defends: ends of documents taken on trust."""
    settings = config(tmp_path)
    want = prepare(settings).val.languages.ends
    (sidecar,) = (tmp_path / "cache").glob("tokens-*.json")
    content = json.loads(sidecar.read_text())
    content["splits"]["val"]["document_tokens"][0] -= 1
    sidecar.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="damaged"):
        assert np.array_equal(prepare(settings).val.languages.ends, want)


# The guide itself, from a package that these tests make: `apt-get` and `dpkg-deb` are scripts.

TEXTS = {
    "en": "Short.\n\nThis paragraph is one that somebody should have translated by now.\n",
    "de": "Kurz.\n\nDieser Absatz ist längst in die deutsche Sprache übersetzt worden.\n",
    "ru": "Кратко.\n\nThis paragraph is one that somebody\nshould have translated by now.\n\n"
    "Этот абзац переведён на русский язык полностью.\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Programs in PATH that give TEXTS, Russian in KOI8-R as in the true package, and say the version 1.0."""
    content = tmp_path / "package"
    for language, text in TEXTS.items():
        path = content / f"usr/share/doc/{guide.PACKAGE}/{language}/install.{language}.txt.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(text.encode(guide.NOT_UTF8.get(language, "utf-8"))))
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "apt-get": f"touch {guide.PACKAGE}_1.0_all.deb",
        "dpkg-deb": f'case $1 in --field) echo 1.0;; *) cp -r {content} "$3";; esac',
    }
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    known = {
        n: hashlib.sha256(t.encode(guide.NOT_UTF8.get(n, "utf-8"))).hexdigest() for n, t in TEXTS.items()
    }
    monkeypatch.setattr(guide, "SHA256", known)
    return programs


def test_the_guide_is_written_whole_with_its_licence(package, tmp_path):
    """Defends: Russian left in KOI8-R, a README that a corpus takes for text, an unfinished folder left behind."""
    shares = prepare_guide(tmp_path / "guide")
    assert {p.name for p in (tmp_path / "guide").iterdir()} == {"README.md", "en.txt", "de.txt", "ru.txt"}
    assert {name: (tmp_path / "guide" / f"{name}.txt").read_text() for name in TEXTS} == TEXTS
    assert "GNU General Public License, version 2" in (tmp_path / "guide" / "README.md").read_text()
    assert not list(tmp_path.glob(".tmp-*"))
    assert shares["en"] == 1
    assert shares["de"] == 0
    english, russian = (sum(map(str.isalpha, TEXTS["ru"].split("\n\n")[i])) for i in (1, 2))
    assert shares["ru"] == english / (english + russian)


def test_another_version_is_refused_or_told(package, tmp_path, monkeypatch):
    monkeypatch.setattr(guide, "SHA256", guide.SHA256 | {"de": "0" * 64, "xx": "1" * 64})
    with pytest.raises(WrongInput, match=r"version 1.0 here, .*20230508.* differs in de, xx; --any-version"):
        prepare_guide(tmp_path / "guide")
    assert not (tmp_path / "guide").exists()
    with pytest.warns(CorpusWarning, match="differs in de, xx"):
        prepare_guide(tmp_path / "guide", any_version=True)
    assert (tmp_path / "guide" / "de.txt").exists()


def test_another_version_may_be_in_another_encoding():
    """Defends: Russian in UTF-8 taken for KOI8-R, a traceback for what is neither."""
    for encoding in ("utf-8", "koi8-r"):
        assert decoded("ru", TEXTS["ru"].encode(encoding)) == TEXTS["ru"]
    with pytest.raises(Failure, match=r"install\.ja\.txt .* is not UTF-8"):
        decoded("ja", "手引き".encode("euc-jp"))


def test_another_version_may_have_its_texts_elsewhere(package, tmp_path):
    for path in (tmp_path / "package").rglob("*.gz"):
        path.unlink()
    with pytest.raises(Failure, match=r"1\.0 holds no install\.LANG\.txt\.gz"):
        prepare_guide(tmp_path / "guide", any_version=True)
    assert not (tmp_path / "guide").exists()


def test_a_full_folder_is_left_alone(package, tmp_path):
    (tmp_path / "guide").mkdir()
    prepare_guide(tmp_path / "guide")  # empty: taken
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "guide").iterdir())
    with pytest.raises(WrongInput, match="--out must be a new or an empty folder"):
        prepare_guide(tmp_path / "guide")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "guide").iterdir()) == before


def test_without_a_network_or_apt_one_sentence(package, tmp_path, monkeypatch):
    (package / "apt-get").write_text(
        "#!/bin/sh\necho 'W: odd' >&2; echo 'E: Failed to fetch' >&2; exit 100\n"
    )
    with pytest.raises(
        Failure, match=r"apt-get download of installation-guide-amd64 failed: E: Failed to fetch"
    ):
        prepare_guide(tmp_path / "guide")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Failure, match="apt-get is not there"):
        prepare_guide(tmp_path / "guide")
    assert not (tmp_path / "guide").exists()


def test_english_is_left_out_of_the_others():
    """Defends: a paragraph wrapped otherwise, short paragraphs lost, the English text emptied."""
    left = translated(TEXTS)
    assert left["en"] == TEXTS["en"]
    assert left["de"] == TEXTS["de"]
    assert left["ru"] == "Кратко.\n\nЭтот абзац переведён на русский язык полностью.\n"
    assert untranslated(left)["ru"] == 0


def test_the_true_package_has_19_pinned_texts():
    assert len(guide.SHA256) == 19
    assert all(len(digest) == 64 for digest in guide.SHA256.values())
