"""Text from a trained model."""

from pathlib import Path

import torch

from sigma_train.checkpoint import CheckpointError, latest_checkpoint, load_weights
from sigma_train.config import Config, load_config
from sigma_train.errors import WrongInput
from sigma_train.model import LanguageModel
from sigma_train.ranks import Ranks, hold_shards
from sigma_train.tokenizer import Tokenizer, read_tokenizer


def load_run(run: Path) -> tuple[Config, LanguageModel, Tokenizer]:
    """The newest model of a run's folder.

    Raises: CheckpointError if there is none or it does not fit config.toml; WrongInput if the tokenizer does not.
    """
    latest = latest_checkpoint(run / "checkpoints") if (run / "checkpoints").is_dir() else None
    if latest is None:
        raise CheckpointError(f"{run} holds no sound checkpoint")
    return load_model(run, latest)


def load_model(run: Path, checkpoint: Path) -> tuple[Config, LanguageModel, Tokenizer]:
    """The model of one checkpoint of a run.  Raises: as `load_run`."""
    config = load_config(None, run / "config.toml", [])
    tokenizer = read_tokenizer(run / "tokenizer.json")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise WrongInput(
            f"{run / 'tokenizer.json'} has {tokenizer.vocab_size} tokens, more than model.vocab_size = "
            f"{config.model.vocab_size}"
        )
    model = LanguageModel(config)
    load_weights(model, checkpoint)
    return config, model, tokenizer


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int = 120,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> str:
    """prompt and what the model adds to it; temperature 0 takes the likeliest token each time."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    context = model.cos.shape[0]
    for _ in range(max_tokens):
        logits = model(torch.tensor([ids[-context:]]))[0, -1]
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            best = logits.topk(min(top_k, logits.shape[0]))
            below = (best.values - best.values[0]).double()  # 0 / temperature is 0 however small it is
            choice = torch.multinomial((below / temperature).softmax(-1), 1, generator=generator)
            ids.append(int(best.indices[choice]))
        ids[-1] = ranks.first(ids[-1])  # all end after the same token
        if ids[-1] == tokenizer.eos_id:
            break
    hold_shards(model, ranks)
    return tokenizer.decode(ids)
