"""Where the targets of a batch stand in the text: what the tokenizer's own offsets and the text itself say."""

import numpy as np
import pytest
import torch
from sigma_train import batch_spans as module
from sigma_train.batch_spans import SplitSpans, batch_spans
from sigma_train.dataset import TokenDataset
from sigma_train.tokenizer import Tokenizer, train_tokenizer
from tokenizers import Tokenizer as Fast

DOCUMENTS = [
    "hello there\n",
    "für alle Fälle 東京 e\u0301 🙂👩\u200d🙂\n",
    "東京へ行く、für immer 🙂\xad\xa0",
] * 9
SEQ_LEN = 16


def split_of(tokenizer: Tokenizer) -> tuple[TokenDataset, np.ndarray]:
    """And [tokens, 2]: the characters of each, by the offsets of the library."""
    fast, tokens, offsets, at = Fast.from_str(tokenizer._serialized), [], [], 0
    for document in DOCUMENTS:
        encoding = fast.encode(document, add_special_tokens=False)
        tokens += [*encoding.ids, tokenizer.eos_id]
        offsets += [(at + begin, at + end) for begin, end in encoding.offsets]
        at += len(document)
        offsets.append((at, at))
    ids = np.array(tokens, dtype=np.uint16)
    size = len("".join(DOCUMENTS).encode())
    return TokenDataset("train", ids, size, tokenizer.token_bytes), np.array(offsets)


@pytest.mark.parametrize("vocab_size", [257, 290])
@pytest.mark.parametrize("stride", [7, 1 << 12])
def test_spans_are_those_of_the_text(monkeypatch, vocab_size, stride):
    """Of every target of an epoch, on two ranks; bytes alone, and merges that end within characters.

    Defends: spans of inputs, of another rank, characters that are bytes, a sum that begins one token late.
    """
    monkeypatch.setattr(module, "STRIDE", stride)
    monkeypatch.setattr(module, "CHUNK", 3)
    tokenizer = train_tokenizer(DOCUMENTS, vocab_size)
    data, offsets = split_of(tokenizer)
    text = "".join(DOCUMENTS)
    split, content, seen = SplitSpans(data, tokenizer), text.encode(), 0
    for step in range(data.num_windows(SEQ_LEN) // 4):
        for rank in range(2):
            _, targets = data.batch(step, 2, SEQ_LEN, 3, rank, 2)
            of_bytes, characters = batch_spans(split, step, 2, SEQ_LEN, 3, rank, 2)
            places = data.target_places(step, 2, SEQ_LEN, 3, rank, 2)
            assert torch.equal(characters, torch.from_numpy(offsets)[places])
            for token, (begin, end) in zip(
                targets.flatten().tolist(), of_bytes.flatten(0, 1).tolist(), strict=True
            ):
                told = tokenizer.decode([token]) if token != tokenizer.eos_id else ""
                assert content[begin:end].decode(errors="replace") == told
                seen += 1
    assert seen > 200
    assert (of_bytes[..., 1] > characters[..., 1]).any()


def test_another_tokenizer_is_refused():
    data, _ = split_of(train_tokenizer(DOCUMENTS, 290))
    with pytest.raises(ValueError, match="SplitSpans: tokenizer must be that of the split"):
        SplitSpans(data, train_tokenizer(DOCUMENTS, 280))
