"""Text from a trained model."""

from pathlib import Path

import torch

from sigma_train.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from sigma_train.config import load_config
from sigma_train.model import LanguageModel
from sigma_train.tokenizer import Tokenizer


def load_run(run: Path) -> tuple[LanguageModel, Tokenizer]:
    """The newest model of a run's folder.  Raises: CheckpointError if there is none."""
    latest = latest_checkpoint(run / "checkpoints") if (run / "checkpoints").is_dir() else None
    if latest is None:
        raise CheckpointError(f"{run} holds no sound checkpoint")
    model = LanguageModel(load_config(None, run / "config.toml", []))
    model.load_state_dict(load_checkpoint(latest).model_state, strict=False)
    return model, Tokenizer((run / "tokenizer.json").read_text())


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int = 120,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
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
            choice = torch.multinomial((best.values / temperature).softmax(-1), 1, generator=generator)
            ids.append(int(best.indices[choice]))
        if ids[-1] == tokenizer.eos_id:
            break
    return tokenizer.decode(ids)
