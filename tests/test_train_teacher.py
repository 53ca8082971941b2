"""`sigma teacher cache`: each teacher token's loss with enough before it, where it stands, and of what it is."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from sigma_train.alignment import chunk_align
from sigma_train.checkpoint import save_checkpoint
from sigma_train.config import load_config
from sigma_train.context_windows import windows
from sigma_train.corpus import find_files, read_corpus, split
from sigma_train.dataset import PreparedData, prepare
from sigma_train.errors import WrongInput
from sigma_train.export import export_to_transformers
from sigma_train.laid_over import Aligned
from sigma_train.mined_align import mined_align
from sigma_train.model import LanguageModel
from sigma_train.reading import Reading, read_texts
from sigma_train.spans import spans_of_lengths
from sigma_train.teacher import RunTeacher, TransformersTeacher, open_teacher
from sigma_train.teacher_cache import cache_losses, reading_of
from sigma_train.teacher_file import read_losses, text_of
from sigma_train.tokenizer import train_tokenizer
from support import sigma

TEXT = "für alle Fälle 東京 e\u0301 🙂🙂\n\ndef f(x):\n    return x * 2\n"
TINY = ["model.hidden_size=16", "model.head_dim=8", "model.num_experts=4", "model.intermediate_size=8"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of thirty documents, long and short, of all kinds of characters."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        lines = f"x = {i}\n" * (i % 7)
        (folder / f"{i}.txt").write_text(f"{i * i} {TEXT[i:]}{lines}  {i}\n" * (1 + i % 3))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of another vocabulary, untrained."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    config = load_config(
        "smoke", None, [*TINY, "model.vocab_size=400", "model.max_seq_len=64", "train.seq_len=64"]
    )
    torch.manual_seed(0)
    model = LanguageModel(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    save_checkpoint(folder / "checkpoints", 1, model.state_dict(), {}, {}, keep=1)
    (folder / "config.toml").write_text(config.to_toml())
    train_tokenizer([TEXT * 4, "return x\n" * 9], 400).save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_to_transformers(run, folder)
    return folder


def data_of(corpus, tmp_path, *more: str) -> PreparedData:
    return prepare(config_of(corpus, tmp_path, *more))


def config_of(corpus, tmp_path, *more: str):
    own = ["model.vocab_size=300", "model.max_seq_len=16", "train.seq_len=16", "data.val_fraction=0.2"]
    paths = {"data": {"paths": [str(corpus)], "cache_dir": str(tmp_path / "cache")}}
    return load_config("smoke", None, [*TINY, *own, *more], paths)


def cached(teacher, config, out, *, context=None, overlap=None, dtype="f32"):
    return cache_losses(teacher, config.data, out, context, overlap, 256, dtype, Console(quiet=True))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 60), st.integers(1, 12), st.data())
def test_each_token_is_predicted_once_with_enough_before_it(tokens, context, data):
    """Defends: a window's first tokens taken with nothing before them, one token twice, one left out."""
    overlap = data.draw(st.integers(0, context - 1))
    found = []
    for w in windows(tokens, context, overlap):
        assert 0 <= w.begin < w.end < tokens
        assert w.end - w.begin <= context
        for token in range(w.first, w.end + 1):
            assert token - w.begin >= min(token, overlap + 1)
            found.append(token)
    assert found == list(range(1, tokens))


def test_losses_are_those_of_one_forward(run):
    """Defends: a loss that is off by a token; a text cut off; rows filled up that change what is beside them."""
    teacher = RunTeacher(run)
    texts = ["def f(x):\n", TEXT, "", "x"]
    encoded = [ids for ids, _ in teacher.encode(texts)]
    got = [each.loss for each in read_texts(teacher, encoded, Reading(64, 0, 128))]
    assert [len(nats) for nats in got] == [len(ids) for ids in encoded]
    for ids, nats in zip(encoded, got, strict=True):
        if not ids:
            continue
        whole = torch.tensor([*teacher.prefix, *ids])
        with torch.no_grad():
            want = F.cross_entropy(teacher.model(whole[None, :-1])[0], whole[1:], reduction="none")
        torch.testing.assert_close(torch.from_numpy(nats), want, rtol=1e-4, atol=1e-5)


def test_a_long_text_is_read_with_context(run):
    teacher = RunTeacher(run)
    ((ids, _),) = teacher.encode([TEXT * 3])
    got = read_texts(teacher, [ids], Reading(16, 8, 64))[0].loss
    sequence = torch.tensor([*teacher.prefix, *ids])
    for w in windows(len(sequence), 16, 8):
        with torch.no_grad():
            logits = teacher.model(sequence[None, w.begin : w.end])[0]
        for token in range(w.first, w.end + 1):
            want = F.cross_entropy(logits[token - w.begin - 1], sequence[token]).item()
            assert got[token - 1] == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_without_a_prefix_the_first_token_has_no_loss(run):
    teacher = RunTeacher(run)
    teacher.prefix = []
    encoded = [ids for ids, _ in teacher.encode([TEXT, "a"])]
    got = read_texts(teacher, encoded, Reading(64, 0, 128, top=2))
    assert [np.isnan(each.loss).sum() for each in got] == [1, 1]
    assert np.isnan(got[0].loss[0])
    assert (got[0].top[0] == 0).all()
    assert (got[0].top[1:] > 0).all()


def test_highest_probabilities_are_of_what_was_expected_there(run):
    """Defends: those of the token after, of another window, of a row that is filled up, in no order."""
    teacher = RunTeacher(run)
    encoded = [ids for ids, _ in teacher.encode([TEXT * 3, "def"])]
    for overlap in (0, 4):
        for ids, read in zip(
            encoded, read_texts(teacher, encoded, Reading(16, overlap, 64, top=5)), strict=True
        ):
            whole = torch.tensor([*teacher.prefix, *ids])
            for w in windows(len(whole), 16, overlap):
                with torch.no_grad():
                    logits = teacher.model(whole[None, w.begin : w.end])[0]
                want = logits.softmax(-1).sort(descending=True).values[:, :5]
                got = torch.from_numpy(read.top[w.first - 1 : w.end]).float()
                torch.testing.assert_close(got, want[w.first - w.begin - 1 :], rtol=2e-3, atol=1e-6)


def test_a_run_and_its_export_are_one_teacher(run, exported, corpus, tmp_path):
    """Ours by the lengths of its tokens, theirs by offsets of characters: where tokens stand, and what they lose."""
    config = config_of(corpus, tmp_path)
    found = []
    for folder, kind in ((run, RunTeacher), (exported, TransformersTeacher)):
        teacher = open_teacher(folder)
        assert isinstance(teacher, kind)
        assert teacher.prefix[0] not in teacher.encode(["<|endoftext|>"])[0][0], "a text that closes itself"
        cached(teacher, config, tmp_path / kind.__name__)
        found.append(read_losses(tmp_path / kind.__name__, "test"))
    ours, theirs = found
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-3, atol=1e-4)
    # A character of several tokens is all of theirs, by its offsets.
    assert (theirs.begins <= ours.begins).all()
    assert (theirs.ends >= ours.ends).all()
    assert (theirs.begins == ours.begins).float().mean() > 0.8


def test_spans_of_the_split_hold_its_text(run, corpus, tmp_path):
    """Defends: documents in another order, an end of text that has bytes, a split other than the trainer's."""
    config = config_of(corpus, tmp_path)
    data = prepare(config)
    documents, _ = split(read_corpus(find_files(config.data.paths)).documents, config.data.val_fraction)
    text = b"".join(document.read().encode() for document in documents)
    lengths = data.train.token_bytes[data.train.tokens]
    for token, (begin, end) in zip(data.train.tokens, spans_of_lengths(lengths), strict=True):
        piece = data.tokenizer._tokenizer.id_to_token(int(token))
        if token == data.tokenizer.eos_id:
            assert begin == end
        else:
            assert text[begin:end] == decoded(piece)
    assert spans_of_lengths(lengths)[-1, 1] == len(text) == data.train.num_bytes
    teacher = RunTeacher(run)
    cached(teacher, config, tmp_path / "losses")
    found = read_losses(tmp_path / "losses", "test")
    ids = [token for document in documents for token in teacher.encode([document.read()])[0][0]]
    assert len(ids) == len(found.loss)
    for token, begin, end in zip(ids, found.begins.tolist(), found.ends.tolist(), strict=True):
        assert text[begin:end] == decoded(teacher._tokenizer._tokenizer.id_to_token(token))


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


def decoded(piece: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for."""
    return bytes(BYTES[character] for character in piece)


@pytest.mark.parametrize("how", ["max", "mean", "bytes"])
def test_targets_are_those_of_the_covering_tokens(run, corpus, tmp_path, how, monkeypatch):
    """By the definition, token by token; in blocks, whose edges fall anywhere."""
    monkeypatch.setattr("sigma_train.laid_over.BLOCK", 37)
    config = config_of(corpus, tmp_path)
    data = prepare(config)
    cached(RunTeacher(run), config, tmp_path / "losses")
    found = read_losses(tmp_path / "losses", "test")
    got = found.targets(data.train, how)
    spans = spans_of_lengths(data.train.token_bytes[data.train.tokens])
    begins, ends = found.begins.numpy(), found.ends.numpy()
    for (a, b), value in zip(spans, got.tolist(), strict=True):
        covers = (np.maximum(a, begins) < np.minimum(b, ends)) & (a < b)
        over, want = found.loss[torch.from_numpy(covers)].float(), float("nan")
        if len(over):
            share = (b - a) / (ends[covers].max() - begins[covers].min())
            want = {"max": over.max(), "mean": over.mean(), "bytes": over.sum() * share}[how].item()
        assert value == pytest.approx(want, rel=1e-5, nan_ok=True)
    assert torch.equal(got.isnan(), torch.from_numpy(data.train.tokens == data.tokenizer.eos_id))


@pytest.mark.parametrize("kind", ["index", "chunk", "edit"])
def test_targets_of_what_it_is_compared_with(run, corpus, tmp_path, kind, monkeypatch):
    """Piece by piece, as the definitions have it; an end of a document is in none.

    Defends: a piece that begins in another document, teacher tokens of the piece before.
    """
    monkeypatch.setattr("sigma_train.laid_over.PIECE", 60)
    config = config_of(corpus, tmp_path)
    data = prepare(config)
    cached(RunTeacher(run), config, tmp_path / "losses")
    found = read_losses(tmp_path / "losses", "test")
    aligned = Aligned(kind, 4, data.tokenizer.pieces)
    got, partners = found.targets(data.train, "max", aligned), found.partners(data.train, aligned)
    documents, _ = split(read_corpus(find_files(config.data.paths)).documents, config.data.val_fraction)
    token, num_pieces = 0, 0
    text = b"".join(document.read().encode() for document in documents)
    begins = [0, *np.cumsum([document.size for document in documents]).tolist()]
    spans = spans_of_lengths(data.train.token_bytes[data.train.tokens])
    for begin, end in itertools.pairwise(begins):
        mine = [i for i, (a, b) in enumerate(spans) if begin <= a < b <= end]
        for first in range(0, len(mine), 60):
            piece = mine[first : first + 60]
            num_pieces += 1
            bounds = spans[piece[0], 0], spans[piece[-1], 1]
            theirs = [j for j, a in enumerate(found.begins.tolist()) if bounds[0] <= a < bounds[1]]
            if kind == "index":
                want = [[i, i] if i < len(theirs) else [-1, -1] for i in range(len(piece))]
            elif kind == "chunk":
                want = chunk_align(len(piece), len(theirs), min(4, len(piece), len(theirs))).tolist()
            else:
                pairs = zip(found.begins.tolist(), found.ends.tolist(), strict=True)
                of_teacher = list(pairs)
                want = mined_align(
                    [text[a:b].decode("latin-1") for a, b in spans[piece].tolist()],
                    [
                        text[a : min(b, bounds[1])].decode("latin-1")
                        for a, b in (of_teacher[j] for j in theirs)
                    ],
                ).tolist()
            for i, (a, b) in zip(piece, want, strict=True):
                if a == -1:
                    assert got[i].isnan()
                    assert partners[i] == -1
                else:
                    assert got[i] == found.loss[theirs[a] : theirs[b] + 1].max()
                    assert partners[i] == theirs[a]
                token += 1
    assert num_pieces > len(documents)
    is_end = torch.from_numpy(data.train.tokens == data.tokenizer.eos_id)
    assert (partners[is_end] == -1).all()
    assert token == (~is_end).sum()


def test_a_token_that_the_teacher_did_not_expect_has_no_partner(run, corpus, tmp_path):
    config = config_of(corpus, tmp_path)
    teacher = RunTeacher(run)
    teacher.prefix = []
    cached(teacher, config, tmp_path / "losses")
    found, data = read_losses(tmp_path / "losses", "test"), prepare(config)
    partners = found.partners(data.train)
    assert not found.loss[partners[partners >= 0]].isnan().any()
    assert (partners == -1).sum() > (data.train.tokens == data.tokenizer.eos_id).sum()


def test_languages_are_split_as_the_trainer_does(run, tmp_path):
    """Defends: losses of another split, or of files that are of no language, which no run can then use."""
    folder = tmp_path / "text"
    for i in range(6):
        (folder / str(i)).mkdir(parents=True)
        (folder / str(i) / "README.md").write_text(f"of no language {i}\n" * 9)
        for language in "abc":
            (folder / str(i) / f"{language}.txt").write_text(f"{language} {i} text\n" * 9)
    config = config_of(folder, tmp_path, "data.languages=true")
    cached(RunTeacher(run), config, tmp_path / "losses")
    data, found = prepare(config), read_losses(tmp_path / "losses", "test")
    assert found.record["text"] == text_of(
        data.stats["corpus_digest"], config.data, data.stats["train_bytes"]
    )
    assert found.targets(data.train, "max").isnan().sum() == data.train.languages.of_document.size


def test_losses_of_half_the_size(run, corpus, tmp_path):
    config = config_of(corpus, tmp_path)
    for dtype in ("f16", "f32"):
        told = cached(RunTeacher(run), config, tmp_path / dtype, dtype=dtype)
    half, full = (read_losses(tmp_path / dtype, "test") for dtype in ("f16", "f32"))
    assert half.loss.dtype == torch.float16
    torch.testing.assert_close(half.loss.float(), full.loss, rtol=1e-3, atol=1e-3)
    nats, size = full.loss.double().sum().item(), full.record["text"]["bytes"]
    assert f"{nats / np.log(2) / size:.4f} bits per byte" in told
    assert half.digest != full.digest


def test_the_same_again_is_there_already(run, corpus, tmp_path):
    """Defends: hours of a teacher for what is there; losses of another that are taken for these."""
    config, out = config_of(corpus, tmp_path), tmp_path / "losses"
    cached(RunTeacher(run), config, out)
    before = out.stat().st_mtime_ns
    assert cached(RunTeacher(run), config, out).endswith("is there already, of this text and teacher")
    other = RunTeacher(run)
    next(other.model.parameters()).data[0] += 1
    shorter = config_of(corpus, tmp_path, "data.max_bytes=2000")
    for teacher, of, more, told in (
        (other, config, {}, "teacher digest is"),
        (RunTeacher(run), shorter, {}, "text corpus_digest is"),
        (RunTeacher(run), config, {"context": 32}, "reading context is 64 there and 32 here"),
        (RunTeacher(run), config, {"dtype": "f16"}, "reading dtype is f32 there and f16 here"),
    ):
        with pytest.raises(WrongInput, match=f"--out: .* holds other losses: {told}"):
            cached(teacher, of, out, **more)
    assert out.stat().st_mtime_ns == before


def test_a_file_that_is_none_is_refused(run, corpus, tmp_path):
    out = tmp_path / "losses"
    with pytest.raises(
        WrongInput, match=r"objective\.teacher: .* is missing; `sigma teacher cache` makes it"
    ):
        read_losses(out, "objective.teacher")
    out.write_bytes(b"nothing")
    with pytest.raises(WrongInput, match="is not a file of `sigma teacher cache`, or is damaged"):
        read_losses(out, "objective.teacher")
    save_file({"loss": torch.zeros(3)}, out)
    with pytest.raises(WrongInput, match="must be a file of `sigma teacher cache`, found another"):
        read_losses(out, "objective.teacher")
    cached(RunTeacher(run), config_of(corpus, tmp_path), tmp_path / "sound")
    content = bytearray((tmp_path / "sound").read_bytes())
    content[-5] ^= 1
    sound = (tmp_path / "sound").read_bytes()
    for damaged, told in (
        (content, "its sha256 differs"),
        (sound.replace(b"val_fraction", b"val_fractiom"), "its sha256 differs"),
        (sound.replace(b'{\\"version', b'[\\"version'), "Expecting"),
    ):
        assert damaged != sound
        out.write_bytes(damaged)
        with pytest.raises(WrongInput, match=f"is damaged: {told}"):
            read_losses(out, "objective.teacher")
    with pytest.raises(WrongInput, match=r"objective\.teacher: cannot read"):
        read_losses(tmp_path, "objective.teacher")


def test_a_folder_that_takes_no_file_is_told_first(run, corpus, tmp_path, monkeypatch):
    """Defends: hours of a teacher whose losses then have no place."""
    teacher = RunTeacher(run)
    monkeypatch.setattr(teacher, "encode", None)
    with pytest.raises(WrongInput, match=r"--out: cannot write in /proc: .*; name another folder"):
        cached(teacher, config_of(corpus, tmp_path), Path("/proc/losses"))


def test_a_write_that_fails_leaves_nothing(run, corpus, tmp_path, monkeypatch):
    """Defends: a file that is half there."""
    monkeypatch.setattr(
        "os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    config = config_of(corpus, tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space left"):
        cached(RunTeacher(run), config, tmp_path / "out" / "losses")
    assert not list((tmp_path / "out").iterdir())


def test_a_teacher_that_has_diverged_is_refused(run, corpus, tmp_path):
    """Defends: losses that are no number taken for tokens without context, all of which a run then learns from."""
    teacher = RunTeacher(run)
    next(teacher.model.parameters()).data[9] = torch.nan
    with pytest.raises(WrongInput, match="--teacher: its loss of a token must be a finite number, found nan"):
        cached(teacher, config_of(corpus, tmp_path), tmp_path / "losses")
    assert not (tmp_path / "losses").exists()


def test_the_command(run, corpus, tmp_path, cache):
    args = [
        "teacher",
        "cache",
        "--teacher",
        str(run),
        "--data",
        str(corpus),
        "--set",
        "data.val_fraction=0.2",
    ]
    out = tmp_path / "more" / "losses"
    result = sigma(*args, "--out", str(out), env=cache)
    assert result.returncode == 0, result.stderr
    assert "tokens a second" in result.stdout
    record = json.loads(load_metadata(out)["sigma_teacher"])
    assert record["reading"] == {"context": 64, "overlap": 16, "dtype": "f16", "top": 0}
    assert set(load_file(out)) == {"loss", "begins", "ends", "top"}


def test_a_folder_of_neither_kind_is_refused(corpus):
    with pytest.raises(
        WrongInput, match="must be a run, which has checkpoints/, or a folder of transformers"
    ):
        open_teacher(corpus)


def test_a_reading_that_cannot_be_is_refused(run):
    teacher = RunTeacher(run)
    assert reading_of(teacher, None, None, 100) == Reading(64, 16, 100)
    for context, overlap, told in (
        (65, None, "--context must be at most 64, what the teacher can read, found 65"),
        (8, 8, "--overlap must be less than the context of 8 tokens, found 8"),
    ):
        with pytest.raises(WrongInput, match=told):
            reading_of(teacher, context, overlap, 100)
    assert reading_of(teacher, None, None, 100, 400).top == 400
    with pytest.raises(WrongInput, match="--top must be at most 400, the teacher's vocabulary, found 401"):
        reading_of(teacher, None, None, 100, 401)


def load_metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()
