"""The price to reach: what the dense model with the same active parameters does on this machine."""

import statistics
import time

import torch
import torch.nn.functional as F

from sigma_train.config import Config
from sigma_train.model import LanguageModel, precision
from sigma_train.optim import make_optimizer


def dense_tokens_per_s(config: Config, steps: int = 3) -> float:
    """Tokens a second of the dense twin: one MLP of intermediate_size * top_k in place of experts and router.

    The median of a few training steps on random tokens, after one that is not counted; the state of torch's random
    numbers is left as it was.
    """
    t = config.train
    twin = config.model_copy(update={"model": config.model.model_copy(update={"num_experts": 1})})
    with torch.random.fork_rng(devices=[]):
        model = LanguageModel(twin)
        optimizer = make_optimizer(model, config.optim)
        tokens = torch.randint(config.model.vocab_size, (t.batch_size, t.seq_len + 1))
        seconds = []
        for _ in range(steps + 1):
            start = time.perf_counter()
            for _ in range(t.grad_accum):
                with precision(config):
                    logits = model(tokens[:, :-1])
                F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip, foreach=True)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - start)
    return t.grad_accum * t.batch_size * t.seq_len / statistics.median(seconds[1:])
