"""A model whose losses on a text guide another's training: a run of `sigma train`, or a folder of transformers.

Either says where its tokens stand in the bytes of the text, and what it expects next.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers
import torch
from torch import Tensor, nn

from sigma_train.errors import WrongInput
from sigma_train.generate import load_run
from sigma_train.model import precision
from sigma_train.spans import OffsetError, spans_of_lengths, spans_of_offsets

Encoded = tuple[list[int], np.ndarray]  # tokens of a text, and their byte spans in it


class Teacher(Protocol):
    """prefix: what stands before a text, at most one token; without one a text's first token has no loss."""

    prefix: list[int]
    context: int  # tokens that it can read at once
    vocabulary: int  # logits of a token
    model: nn.Module

    @property
    def digest(self) -> str: ...
    def encode(self, texts: Sequence[str]) -> list[Encoded]: ...
    def logits(self, tokens: Tensor) -> Tensor: ...


def open_teacher(folder: Path) -> Teacher:
    """Raises: WrongInput if the folder is neither kind, or cannot be used; CheckpointError for a damaged run."""
    if (folder / "checkpoints").is_dir():
        return RunTeacher(folder)
    if (folder / "config.json").is_file():
        return TransformersTeacher(folder)
    raise WrongInput(
        f"--teacher: {folder} must be a run, which has checkpoints/, or a folder of transformers, which has "
        "config.json; found neither"
    )


class RunTeacher:
    """The newest model of a run; before a text stands the end of another, as in its training."""

    def __init__(self, folder: Path) -> None:
        self._config, self.model, self._tokenizer = load_run(folder)
        self.prefix, self.context = [self._tokenizer.eos_id], self._config.model.max_seq_len
        self.vocabulary = self._config.model.vocab_size

    @cached_property
    def digest(self) -> str:
        settings = self._config.model.model_dump_json() + self._config.router.model_dump_json()
        return digest_of(self.model, f"{self._tokenizer.digest}{settings}")

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        lengths = self._tokenizer.token_bytes
        return [(ids, spans_of_lengths(lengths[ids])) for ids in self._tokenizer.encode_batch(texts)]

    def logits(self, tokens: Tensor) -> Tensor:
        with precision(self._config):
            return self.model(tokens)


class TransformersTeacher:
    """A causal language model and its fast tokenizer, from a folder on this machine; who: wants it, in errors."""

    def __init__(self, folder: Path, who: str = "--teacher") -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model, loaded = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype="auto", output_loading_info=True
            )
        except Exception as error:  # of transformers, tokenizers, pickle: no two damaged files raise the same
            told = " ".join(str(error).split())[:300]
            raise WrongInput(
                f"{who}: transformers cannot load {folder}: {type(error).__name__}, {told}"
            ) from None
        self.model.eval()
        if missing := sorted(loaded["missing_keys"]):  # which transformers has drawn at random
            raise WrongInput(f"{who}: {folder} must have all weights of its model, it lacks {missing[0]}")
        if not tokenizer.is_fast:
            raise WrongInput(f"{who}: {folder} must have a fast tokenizer, found {type(tokenizer).__name__}")
        self._who, self._folder = who, folder
        self._tokenizer = without_frame(tokenizer.backend_tokenizer)
        rows, found = self.model.get_input_embeddings().num_embeddings, self._tokenizer.get_vocab_size()
        if found > rows:
            raise WrongInput(f"{who}: the tokenizer of {folder} has {found} tokens, its model {rows}")
        before = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.prefix = [] if before is None else [before]
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2048
        self.vocabulary = self.model.get_output_embeddings().weight.shape[0]
        if not self._is_causal():
            raise WrongInput(
                f"{who}: the model of {folder} must be causal, it sees the token that it predicts"
            )

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Of an encoder transformers makes a language model as well, and only warns."""
        first, other = (self.logits(torch.tensor([[0, token]]))[0, 0].float() for token in (0, 1))
        rounding = 32 * torch.finfo(self.model.dtype).eps
        return not (first - other).abs().max() > rounding * first.abs().max()  # NaN is told where it is read

    @cached_property
    def digest(self) -> str:
        settings = self.model.config.to_dict()
        for key in ("_name_or_path", "transformers_version"):  # of the folder's name, and of who has read it
            settings.pop(key, None)
        told = json.dumps(settings, sort_keys=True, default=str)
        return digest_of(self.model, f"{self._tokenizer.to_str()}{told}{self.prefix}")

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Raises: WrongInput if the tokenizer's offsets cannot be laid over the text."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        try:
            return [
                (e.ids, spans_of_offsets(text, e.offsets)) for text, e in zip(texts, encodings, strict=True)
            ]
        except OffsetError as error:
            raise WrongInput(f"{self._who}: the tokenizer of {self._folder} {error}") from None

    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def without_frame(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same pieces, all of a text and nothing else.

    No special tokens around it or made of it, no cut, no padding, and offsets that are not trimmed.
    """
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    described |= {"post_processor": None, "truncation": None, "padding": None}
    bare = tokenizers.Tokenizer.from_str(json.dumps(described))
    bare.encode_special_tokens = True
    return bare


def digest_of(model: nn.Module, told: str) -> str:
    """sha256 of weights by name, and of tokenizer and settings as told: the same in whichever files they lie."""
    found = hashlib.sha256(told.encode())
    for name, x in model.state_dict().items():
        found.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        found.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
