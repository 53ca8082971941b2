"""What this machine can do: tokens of the dense model with the same active parameters, FLOPs of a dense product."""

import os
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from sigma_train.config import Config
from sigma_train.model import LanguageModel, precision
from sigma_train.optim import make_optimizer
from sigma_train.processor import processor_name


def dense_tokens_per_s(config: Config, steps: int = 3) -> float:
    """Tokens a second of the dense twin: one MLP of intermediate_size * top_k in place of experts and router.

    The fastest of a few training steps on random tokens, after one that is not counted: what else runs here makes a
    bound lower, never higher.  The state of torch's random numbers is left as it was.
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
    return t.grad_accum * t.batch_size * t.seq_len / min(seconds[1:])


def product_flops_per_s(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a dense product of the dtype on this rank: the peak that a step is measured against.

    Square matrices of 1,024 rows, or 2,048 where the fastest of three products takes less than 5 ms; then the fastest
    of those that fit into so many seconds.  In smaller ones threads that wait for each other beside other work take a
    hundred times what the product does, the fastest of many too.
    """
    n, took = 512, 0.0
    while took < 0.005 and n < 2048:
        n *= 2
        a, b = torch.ones(2, n, n, dtype=dtype)
        out = torch.empty(n, n, dtype=dtype)
        torch.mm(a, b, out=out)  # the first touches memory
        took = min(_seconds(a, b, out) for _ in range(3))
    rounds = int(seconds / took)
    return 2 * n**3 / min([took, *(_seconds(a, b, out) for _ in range(rounds))])


def _seconds(a: Tensor, b: Tensor, out: Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b, out=out)
    return time.perf_counter() - start


def machine(config: Config) -> str:
    """What a rank's peak depends on, in words; equal words, equal peaks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor_name()}, {cores} cores, {torch.get_num_threads()} threads, {config.train.dtype}"
