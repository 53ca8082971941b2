"""`sigma neurons` on a folder of transformers: what is counted, what is lost, and wrong input in one sentence."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from language_texts import write_texts
from matplotlib import pyplot as plt
from sigma_cli.commands import app
from sigma_neurons import page
from sigma_neurons.counting import ActivationCounter
from sigma_neurons.foreign import Foreign
from sigma_neurons.scores import lape
from sigma_train.checkpoint import save_checkpoint
from sigma_train.config import load_config
from sigma_train.corpus import find_files, read_corpus
from sigma_train.errors import WrongInput
from sigma_train.export import export_to_transformers
from sigma_train.languages import split_each
from sigma_train.model import LanguageModel
from sigma_train.tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

TINY = {
    "vocab_size": 300, "hidden_size": 16, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16,
    "intermediate_size": 16, "num_experts": 4, "top_k": 2, "num_layers": 2, "max_seq_len": 64,
}  # fmt: skip
SETTINGS = ["train.seq_len=32", "train.batch_size=4", "data.val_fraction=0.4"]
SEQ_LEN, BATCH = 32, 4


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory) -> Path:
    """A mixture of experts that was never trained, as transformers has it."""
    base = tmp_path_factory.mktemp("model")
    config = load_config(None, None, [], {"model": TINY, "train": {"seq_len": 64}})
    torch.manual_seed(0)
    model = LanguageModel(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    save_checkpoint(base / "run" / "checkpoints", 1, model.state_dict(), {}, {}, keep=1)
    (base / "run" / "config.toml").write_text(config.to_toml())
    train_tokenizer([path.read_text() for path in sorted(text.iterdir())], 300).save(
        base / "run" / "tokenizer.json"
    )
    export_to_transformers(base / "run", base / "out")
    return base / "out"


def opened(folder: Path, text: Path, *more: str) -> Foreign:
    ours = {"data": {"paths": [str(text)], "languages": True}}
    return Foreign(folder, load_config(None, None, [*SETTINGS, *more], ours))


def windows(documents, tokenizer, language: str, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[W, S + 1] tokens and where they are of the text, with transformers alone."""
    before = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids, is_text = [], []
    for document in documents:
        if document.path.stem == language:
            own = tokenizer(document.read(), add_special_tokens=False)["input_ids"]
            ids += [before, *own]
            is_text += [False, *[True] * len(own)]
    number = min((len(ids) - 1) // SEQ_LEN, limit * BATCH)
    rows = [slice(i * SEQ_LEN, i * SEQ_LEN + SEQ_LEN + 1) for i in range(number)]
    return torch.tensor([ids[row] for row in rows]), torch.tensor([is_text[row] for row in rows])


def test_counts_are_those_of_the_documents(folder, text):
    """Of each language as many windows, inputs alone; the model's own implementation of its experts."""
    got = opened(folder, text).count("train", 3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    files = find_files([str(text)])
    documents = split_each(files, read_corpus(files).documents, 0.4)[0]
    of_language = {name: windows(documents, tokenizer, name, 3)[0] for name in ("aa", "bb", "cc")}
    least = min(map(len, of_language.values()))
    assert least == 3 * BATCH
    with torch.no_grad(), ActivationCounter(model, list(of_language)) as counter:
        for name, rows in of_language.items():
            with counter.batch(name, rows[:least, :-1]):
                model(rows[:least, :-1])
    assert got.tokens.tolist() == [least * SEQ_LEN] * 3
    assert torch.equal(got.joint(), counter.stats.joint())
    assert got.joint().amax() > 0.2


def test_losses_are_of_the_text_alone(folder, tmp_path):
    """Bits per byte without the tokens that begin documents, which no text has; characters of several tokens once.

    Defends: a first token that is predicted, a byte that is counted for each token that has a part of it.
    """
    for name, line in (("aa", "東京 für e\u0301 🙂"), ("bb", "for all")):
        for part in range(4):  # a document each
            (tmp_path / str(part)).mkdir(exist_ok=True)
            lines = (f"{i} {line}\n" for i in range(2000 * part, 2000 * (part + 1)))
            (tmp_path / str(part) / f"{name}.txt").write_text("".join(lines))
    got = opened(folder, tmp_path, "data.val_fraction=0.5", "train.batch_size=64").losses(10**6)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    files = find_files([str(tmp_path)])
    documents = split_each(files, read_corpus(files).documents, 0.5)[1]
    lengths = torch.tensor([len(tokenizer.decode([token])) for token in range(len(tokenizer))])
    for name in ("aa", "bb"):
        rows, is_text = windows(documents, tokenizer, name, 10**6)
        counts, nats = is_text[:, 1:], []
        assert not counts.all()
        for part in rows.split(64):
            with torch.no_grad():
                logits = model(part[:, :-1]).logits.transpose(1, 2)
                nats.append(F.cross_entropy(logits, part[:, 1:], reduction="none"))
        total = torch.cat(nats)[counts].double().sum().item()
        if name == "bb":  # characters of one byte: a token has as many as it is read as
            whole = lengths[rows[:, 1:][counts]].sum().item()
            assert got[name] == pytest.approx(total / math.log(2) / whole, rel=1e-5)
            continue
        # Of a character that a window begins or ends within one side has all bytes: some 6 of each window's hundreds.
        own = [d for d in documents if d.path.stem == name]
        whole = sum(d.size for d in own) * counts.sum().item() / sum(tokens_of(d, tokenizer) for d in own)
        assert got[name] == pytest.approx(total / math.log(2) / whole, rel=2e-2)


def tokens_of(document, tokenizer) -> int:
    return len(tokenizer(document.read(), add_special_tokens=False)["input_ids"])


def test_a_model_that_overflows_is_told(folder, text, monkeypatch):
    """Defends: neurons of NaN, which are never active, and a matrix of NaN after all the work."""
    foreign = opened(folder, text)
    foreign.model.lm_head.weight.data[5] = float("nan")
    for measure in (lambda: foreign.count("train", 1), lambda: foreign.losses(1)):
        with pytest.raises(WrongInput, match=r"must be finite numbers, found nan in torch\.float32"):
            measure()


def sigma(*args: object) -> str:
    result = CliRunner().invoke(
        app, ["neurons", *map(str, args)], catch_exceptions=False, standalone_mode=False
    )
    return result.output


def own(text: Path) -> list[str]:
    return ["--data", str(text), *(part for setting in SETTINGS for part in ("--set", setting))]


@pytest.fixture
def without_pictures(monkeypatch) -> None:
    """Which test_neurons_cli.py looks at: to draw them takes longer than all else."""
    monkeypatch.setattr(page, "png", lambda figure: plt.close(figure) or b"")


def test_identify_ablate_and_report(folder, text, tmp_path, without_pictures):
    out = ["--out", tmp_path]
    sigma("identify", folder, *out, *own(text), "--batches", 2, "--top-rate", 0.2, "--tau", 0.3)
    told = json.loads((tmp_path / "neurons.json").read_text())
    assert told["languages"] == ["aa", "bb", "cc"]
    assert [site["experts"] for site in told["sites"]] == [4, 4]
    sigma("ablate", folder, *out, *own(text), "--batches", 1, "--controls", 1)
    assert any(json.loads((tmp_path / "ablation.json").read_text())["sets"]["specific"]["neurons"].values())
    sigma("report", folder, *out)
    assert f"{folder}: 128 neurons" in (tmp_path / "report.html").read_text()
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        & {path.name for path in folder.iterdir()}
    )


@pytest.mark.parametrize(("args", "words"), [
    (["identify", "{folder}", "--data", "{text}"], "--out must be given for a model of transformers"),
    (["report", "{folder}"], "--out must be given for a model of transformers"),
    (["identify", "{folder}", "--out", "{out}"], "--data must name files LANG.txt for .*, a model of transformers"),
    (["identify", "{folder}/../run", "--data", "{text}"],
     "--data and --set are for a model of transformers, .* is a run and has its own text"),
    (["identify", "{folder}/nosuch", "--data", "{text}"], "nosuch must be a run or a checkpoint"),
    (["identify", "{folder}", "--out", "{out}", "--data", "{text}", "--set", "train.dtype=bf16"],
     "--set must be of data.val_fraction, .*, found train.dtype"),
    (["identify", "{folder}", "--out", "{out}", "--data", "{text}", "--set", "train.seq_len=65"],
     "train.seq_len must be at most 64, what .* can read, found 65"),
    (["identify", "{folder}", "--out", "{out}", "--data", "{text}/aa.txt",
      "--set", "train.seq_len=64"], "at least 2 languages, found aa alone"),
])  # fmt: skip
def test_wrong_input_is_told(folder, text, tmp_path, args, words):
    with pytest.raises(WrongInput, match=words) as refused:
        sigma(*(arg.format(folder=folder, text=text, out=tmp_path / "out") for arg in args))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_lape_from_counting_to_the_page(folder, text, tmp_path, without_pictures):
    """Defends: neurons of the finer score taken out for those of LAPE, or told with a lambda."""
    out = ["--out", tmp_path]
    said = sigma("identify", folder, *out, *own(text), "--batches", 2, "--top-rate", 0.1, "--score", "lape")
    told = json.loads((tmp_path / "neurons.json").read_text())
    want = lape(opened(folder, text).count("train", 2).joint(), 0.1)
    assert (told["score"], told["lambda"], told["totals"]["general"]) == ("lape", None, 0)
    for k, name in enumerate(told["languages"]):
        assert told["named"][name] == want[:, k].view(2, 4, 16).nonzero().tolist()
    assert want.any(0).all()
    assert "H (LAPE)" in said
    sigma("ablate", folder, *out, *own(text), "--batches", 1, "--controls", 1)
    sets = json.loads((tmp_path / "ablation.json").read_text())["sets"]
    last = list(sets.values())[-1]  # one that is the same as the one before is left out
    assert list(last["neurons"].values()) == want.sum(0).tolist()
    assert "with general" not in sets
    sigma("report", folder, *out)
    assert "of lowest H (LAPE)" in (tmp_path / "report.html").read_text()


def test_another_text_is_refused(folder, text, tmp_path):
    """Defends: neurons of one text taken out on another, with figures that look as any."""
    out = ["--out", tmp_path]
    sigma("identify", folder, *out, *own(text), "--batches", 1)
    (tmp_path / "text").mkdir()
    for path in text.iterdir():
        (tmp_path / "text" / path.name).write_text(path.read_text() + "more\n")
    with pytest.raises(WrongInput, match="is of another text, of other languages or cut otherwise"):
        sigma("ablate", folder, *out, *own(tmp_path / "text"))
    renamed = tmp_path / "renamed"
    shutil.copytree(text, renamed)
    (renamed / "aa.txt").rename(renamed / "swap")
    (renamed / "bb.txt").rename(renamed / "aa.txt")
    (renamed / "swap").rename(renamed / "bb.txt")
    with pytest.raises(WrongInput, match="is of another text, of other languages or cut otherwise"):
        sigma("ablate", folder, *out, *own(renamed))
