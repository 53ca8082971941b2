"""Of `guide-languages`: what stands side by side, how it becomes windows, and the arithmetic of its page."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sigma_experiments import guide_page, guide_texts
from sigma_experiments.going_on import go_on
from sigma_experiments.guide_found import claims, distances, move, parts_of
from sigma_experiments.guide_languages import spread_windows
from sigma_experiments.invented import ARMENIAN, CYRILLIC
from sigma_neurons.identified import identify
from sigma_neurons.measured import Run
from sigma_neurons.sites import Site
from sigma_neurons.stats import ActivationStats
from sigma_train import guide
from sigma_train.config import DataConfig
from sigma_train.dataset import TokenDataset
from sigma_train.errors import Failure, WrongInput, verdict
from sigma_train.languages import Languages, files_of, language_of, splits_of

SMALL = ["data.max_bytes=200000", "train.batch_size=4", "train.steps=4", "train.threads=1"]
LONG = "a paragraph of more than thirty letters, number {}"
LANG = "ein Absatz von mehr als dreißig Buchstaben, Nummer {}"


def book(title: str, sentence: str, sections: dict[str, int]) -> str:
    """Paragraphs numbered through in each section, before them one that is in none."""
    parts = [sentence.format("0")]
    for number, count in sections.items():
        parts += [
            f"{number}.\N{NO-BREAK SPACE}{title}",
            *(sentence.format(f"{number}/{i}") for i in range(count)),
        ]
    return "\n\n".join(parts)


def test_paragraphs_of_one_place_stand_side_by_side():
    """Defends: paragraphs of a section that was cut beside others' that say something else; headings as text."""
    english = book("Title", LONG, {"1.1": 2, "1.2": 3, "2.1.1": 1, "3.1": 1})
    german = book("Titel", LANG, {"1.1": 2, "1.2": 2, "2.1.1": 1, "4.1": 1})
    want = [(LANG.format(p), LONG.format(p)) for p in ("1.1/0", "1.1/1", "2.1.1/0")]
    assert guide_texts.side_by_side(german, english) == want
    assert guide_texts.agreement(want) == 1
    away = guide_texts.strangers(want)
    assert [own for own, _ in away] == [own for own, _ in want]
    assert sorted(other for _, other in away) == sorted(other for _, other in want)
    assert guide_texts.agreement(away) == 0


def test_what_says_nothing_in_another_language_is_no_pair():
    """Defends: paragraphs that nobody has translated, commands and names taken for translations."""
    english = "1.1. One\n\n" + LONG.format(1) + "\n\n# apt update\n\n" + LONG.format(2)
    german = "1.1. Eins\n\n" + LONG.format(1).replace(" ", "\n") + "\n\n# apt\n\n" + LANG.format(2)
    assert guide_texts.side_by_side(german, english) == [(LANG.format(2), LONG.format(2))]


def test_pairs_are_of_the_training_split(tmp_path):
    """Defends: validation text that is learned from after all."""
    texts = guide_texts.made_up()
    paths = guide_texts.write_versions(tmp_path, texts)
    data = DataConfig(paths=tuple(paths), languages=True, val_fraction=0.3)
    pairs = guide_texts.pairs_of_training(texts, data)
    assert pairs.keys() == {"xa", "xb"}
    _, train, val = splits_of(files_of(data), data)
    text = {side: dict.fromkeys(texts, "") for side in ("train", "val")}
    for side, documents in (("train", train), ("val", val)):
        for document in documents:
            text[side][language_of(document)] += document.read() + "\n\n"
    for name, own in pairs.items():
        assert 100 < len(own) < len(guide_texts.side_by_side(texts[name], texts["en"]))
        for paragraph, english in own[::50]:
            assert paragraph in text["train"][name]
            assert english in text["train"]["en"]
            assert english.translate({"xa": CYRILLIC, "xb": ARMENIAN}[name]) == paragraph
    stamps = [Path(path).stat().st_mtime_ns for path in paths]
    assert [Path(p).stat().st_mtime_ns for p in guide_texts.write_versions(tmp_path, texts)] == stamps


def test_windows_hold_whole_documents():
    """Defends: a paragraph in one window and what it says in English in the next."""
    documents = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11]]
    blocks = [[1, 2, 3, 0, 0], [4, 5, 6, 0, 0], [7, 8, 9, 10, 11], [0]]
    assert guide_texts.packed(documents[:1], 3, 0).tolist() == [1, 2, 3, 0]
    assert guide_texts.packed([[1, 2, 3], [4, 5, 6], *documents[3:]], 5, 0).tolist() == [
        token for block in ([1, 2, 3, 0, 0], [4, 5, 6, 0, 0], *blocks[2:]) for token in block
    ]
    assert guide_texts.packed(documents, 6, 0).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 0]


def test_windows_are_of_all_the_text():
    """Defends: chapters that are counted on in one language and not in another, taken for its neurons."""
    languages = Languages(("a", "b"), np.array([0, 1]), np.array([80, 201]))
    data = TokenDataset("train", np.arange(201), 201, np.ones(201, np.int64), languages)
    settings = SimpleNamespace(train=SimpleNamespace(batch_size=2, seq_len=4))
    run = SimpleNamespace(config=settings, data=SimpleNamespace(train=data), languages=("a", "b"))
    found = [(name, tokens[:, 0].tolist()) for name, tokens in spread_windows(run, 3)]
    assert found == [
        ("a", [0, 12]), ("a", [24, 36]), ("a", [48, 60]), ("b", [80, 100]), ("b", [120, 140]), ("b", [160, 180]),
    ]  # fmt: skip
    assert sum(len(tokens) for name, tokens in spread_windows(run, 100) if name == "b") == 19  # as a has


@pytest.mark.parametrize(
    "error", [Failure("apt-get is not there: it is a package"), WrongInput("the guide is another")]
)
def test_a_guide_that_is_not_to_be_had(tmp_path, monkeypatch, error):
    """Defends: a traceback, or a training of nothing, where there is no network."""

    def nothing(_: Path) -> None:
        raise error

    monkeypatch.setattr(guide_texts, "prepare_guide", nothing)
    with pytest.raises(WrongInput) as raised:
        guide_texts.versions(tmp_path / "guide")
    code, told = verdict(raised.value)
    assert code == 2
    assert told == (
        f"guide-languages: `sigma data prepare installation-guide --out {tmp_path / 'guide'}` is needed, and fails: "
        f"{error}"
    )


def test_a_guide_that_is_there_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(guide_texts, "prepare_guide", lambda _: pytest.fail("fetched again"))
    for name in ("en", "de", "fr"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert guide_texts.versions(tmp_path) == {"de": "de", "en": "en", "fr": "fr"}
    (tmp_path / "en.txt").unlink()
    with pytest.raises(
        WrongInput, match=r"must have en\.txt and two languages or more beside it, found de, fr"
    ):
        guide_texts.versions(tmp_path)
    assert guide.PIVOT == "en"


def test_what_goes_on_learns_as_sigma_train_does(make_trainer):
    """Defends: other steps than those of a training; pairs that are not learned from, or left in the run's own text."""
    trainer = make_trainer("a", "optim.lr=1e-3")
    run = Run(Path(), 0, trainer.config, copy.deepcopy(trainer.model), trainer.data)
    other = dataclasses.replace(run, model=copy.deepcopy(trainer.model))
    trainer.run()
    go_on(run, {})
    assert not run.model.training
    for name, weight in trainer.model.named_parameters():
        assert torch.equal(weight, run.model.get_parameter(name)), name
    text = guide_texts.paired(
        {"de": [("ein Absatz", "a paragraph")] * 40}, trainer.data, trainer.config.train.seq_len
    )
    before = loss(other, text)
    go_on(other, {"optim": {"lr": 3e-3}, "train": {"steps": 6}}, text)
    assert loss(other, text) < before - 1 < loss(run, text)
    assert other.data.train.split == "train"


@torch.no_grad()
def loss(run: Run, text: TokenDataset) -> float:
    inputs, targets = text.windows(np.arange(2), run.config.train.seq_len)
    return float(torch.nn.functional.cross_entropy(run.model(inputs).flatten(0, 1), targets.flatten()))


def test_stages_by_layer():
    """Of six layers the last alone; a claim holds by a part's mean."""
    assert parts_of(6) == [[0, 1], [2, 3], [4], [5]]
    assert parts_of(4) == [[0], [1], [2], [3]]
    published = np.array([[9, 5, 3], [4, 2, 5], [0, 1, 8], [1, 0, 8], [4, 4, 1], [1, 5, 12]])
    assert claims(published) == (True, True, True, True)
    assert claims(published[::-1]) == (True, True, False, False)
    flat = np.ones((6, 3), int)
    assert claims(flat) == (False, False, False, False)
    assert claims(np.array([[5, 0, 3], [0, 3, 3], [2, 2, 3], [2, 2, 3], [4, 1, 2], [0, 0, 4]])) == (
        False, True, True, True,
    )  # fmt: skip


def test_routing_apart():
    """[L, E, K]: languages that share no expert are 1 apart, one is 0 from itself."""
    shares = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]])
    assert distances(shares, shares).tolist() == [[[0, 1, 0.5], [1, 0, 0.5], [0.5, 0.5, 0]]]


def test_the_other_language_that_loses_most():
    assert guide_page._most_of_others(("a", "b", "c"), np.array([0.3, 0.1, 0.2]), 0) == "c +0.2000"
    assert guide_page._most_of_others(("a", "b", "c"), np.array([0.0, -0.1, -0.2]), 0) == "b -0.1000"
    assert guide_page._most_of_others(("a", "b", "c"), np.zeros(3), 1) == ""


def found(p: list[list[int]]) -> object:
    """Identified by counts of 100 tokens, of two languages and neurons [N, K]."""
    fired = torch.tensor(p).t()[:, None]  # [K, 1, N]
    site = Site("layer", 0, 1, len(p), "ours")
    stats = ActivationStats(
        ("a", "b"), (site,), torch.tensor([100, 100]), (torch.full((2, 1), 100),), (fired,)
    )
    return identify(stats, top_rate=0.5, lam=0.0, tau=0.5)


def test_what_moved():
    """Defends: shares both ways taken for one, a neuron kept by another language, a loss told as a gain."""
    before = found([[90, 0], [0, 90], [90, 10], [10, 10], [60, 60], [60, 60], [0, 80]])
    after = found([[90, 0], [90, 0], [10, 10], [10, 10], [60, 60], [10, 60], [0, 70]])
    assert before.kinds.specific.nonzero().flatten().tolist() == [0, 1, 2, 6]
    assert after.kinds.specific.nonzero().flatten().tolist() == [0, 1, 5, 6]
    assert move(before, after) == pytest.approx([50, 50, 0, 0, -1])
    fewer = dataclasses.replace(after, kinds=dataclasses.replace(after.kinds, selected=torch.arange(7) < 1))
    assert move(before, fewer) == pytest.approx([25, 100, -3, 0, -1])
    assert move(fewer, before) == pytest.approx([100, 25, 3, 0, 1])
