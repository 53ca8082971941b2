"""Data of the trainer: every window once an epoch, shards disjoint, any text back again, damage named."""

import os

import forked
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sigma_train.config import Config
from sigma_train.corpus import CorpusError
from sigma_train.dataset import CacheWarning, TokenDataset, prepare, sample_windows
from sigma_train.errors import WrongInput
from sigma_train.tokenizer import train_tokenizer


def dataset(tokens: int) -> TokenDataset:
    return TokenDataset("train", np.arange(tokens, dtype=np.uint16), tokens, np.ones(1 << 16, dtype=np.int64))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(0, 5), st.integers(1, 9))
def test_an_epoch_visits_every_window_once(windows, seed, batch):
    samples = np.concatenate(
        [sample_windows(first, batch, windows, seed) for first in range(0, 2 * windows, batch)]
    )
    assert sorted(samples[:windows]) == list(range(windows))
    assert sorted(samples[windows : 2 * windows]) == list(range(windows))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(1, 4), st.integers(1, 4))
def test_ranks_share_the_global_batch(step, batch_size, world_size):
    data = dataset(2000)
    parts = [data.batch(step, batch_size, 16, 3, rank, world_size)[0] for rank in range(world_size)]
    whole, targets = data.batch(step, batch_size * world_size, 16, 3)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole + 1, targets)


def test_epochs_and_seeds_differ():
    first, second = sample_windows(0, 500, 500, 0), sample_windows(500, 500, 500, 0)
    assert (first != second).mean() > 0.9
    assert (first != sample_windows(0, 500, 500, 1)).mean() > 0.9


TOKENIZER = train_tokenizer(["def f(x):\n    return x\n" * 20, "für alle Fälle 東京 🙂"] * 3, 300)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.token_bytes[TOKENIZER.encode(text)].sum() == len(text.encode())


def corpus(tmp_path, text: str = "") -> Config:
    folder = tmp_path / "text"
    folder.mkdir(exist_ok=True)
    for i in range(40):
        (folder / f"{i}.txt").write_text(
            text or f"document {i} says hello to the world, {i * i} times\n" * 20
        )
    return Config.from_dict(
        {
            "data": {"paths": [str(folder)], "cache_dir": str(tmp_path / "cache"), "val_fraction": 0.2},
            "model": {"vocab_size": 300, "max_seq_len": 16},
            "train": {"seq_len": 16},
        }
    )


def test_prepare_is_the_same_the_second_time_and_split_by_document(tmp_path):
    config = corpus(tmp_path)
    first, second = prepare(config), prepare(config)
    assert first.stats == second.stats
    assert np.array_equal(first.train.tokens, second.train.tokens)
    assert first.stats["train_documents"] + first.stats["val_documents"] == 40
    train, val = (
        set(documents(first.tokenizer.decode(part.tokens.tolist()))) for part in (first.train, first.val)
    )
    assert len(train) + len(val) == 40
    assert not train & val


def documents(text: str) -> list[str]:
    return text.split("<|endoftext|>")[:-1]


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_cache_is_named_and_made_again(tmp_path, damage):
    config = corpus(tmp_path)
    want = prepare(config).train.tokens.copy()
    (victim,) = (tmp_path / "cache").glob("tokens-*.bin")
    content = bytearray(victim.read_bytes())
    content[50] ^= 1
    victim.write_bytes(content[:-3] if damage == "truncate" else content)
    with pytest.warns(CacheWarning, match=r"tokens-.*is damaged .*making it again"):
        assert np.array_equal(prepare(config).train.tokens, want)


def test_two_processes_prepare_at_once(tmp_path):
    config = corpus(tmp_path)
    assert forked.serves({**os.environ, "OMP_NUM_THREADS": "2"})
    processes = [forked.CONTEXT.Process(target=prepare, args=(config,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert prepare(config).train.num_tokens > 100


def test_wrong_data_is_named(tmp_path):
    config = corpus(tmp_path, "tiny")  # forty times the same: one document
    with pytest.raises(CorpusError):
        prepare(config)
    (tmp_path / "file").write_text("")
    blocked = config.model_copy(
        update={"data": config.data.model_copy(update={"cache_dir": str(tmp_path / "file" / "x")})}
    )
    with pytest.raises(WrongInput, match=r"data.cache_dir, .*cannot write in .*Not a directory"):
        prepare(blocked)
