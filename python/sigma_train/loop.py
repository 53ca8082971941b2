"""The run: steps, validation, checkpoints, and an end that loses nothing."""

import contextlib
import ctypes
import ctypes.util
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from sigma_kernels import _C
from sigma_kernels import nn as sk_nn
from sigma_train.bound import dense_tokens_per_s
from sigma_train.checkpoint import latest_checkpoint, load_checkpoint, load_weights, save_checkpoint
from sigma_train.config import Config, ConfigError, shaping_settings
from sigma_train.dataset import PreparedData, TokenDataset, prepare
from sigma_train.errors import Failure
from sigma_train.files import write_text
from sigma_train.generate import generate
from sigma_train.metrics import Metrics, busiest
from sigma_train.model import LanguageModel, precision
from sigma_train.optim import learning_rate, make_optimizer, set_learning_rate
from sigma_train.progress import RunLine


class Diverged(Failure):
    """The loss or its gradient is no longer a number; one sentence."""


class Trainer:
    """One run in one folder: config.toml, metrics.jsonl, tensorboard/, tokenizer.json, checkpoints/.

    The caller holds the folder (`folder.claimed`) from before this is made until the last file of the run is written.
    """

    def __init__(self, config: Config, console: Console, resume: bool) -> None:
        self.config, self.console = config, console
        self.out = Path(config.train.out)
        self.checkpoints = self.out / "checkpoints"
        self.step, self.tokens_seen, self._saved, self._stop = 0, 0, -1, False
        _C.isa()  # a SIGMA_ISA that this processor has not, before anything is written
        latest = latest_checkpoint(self.checkpoints) if self.checkpoints.is_dir() else None
        if latest is not None and not resume:
            raise ConfigError(
                f"{self.out} already holds a run; continue it with --resume or name another --out"
            )
        keep_freed_memory()
        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        torch.manual_seed(config.train.seed)
        self.data: PreparedData = prepare(config)
        self.model = LanguageModel(config)
        self.optimizer = make_optimizer(self.model, config.optim)
        if latest is not None:
            self._resume(latest)
        write_text(self.out / "config.toml", config.to_toml())
        self.data.tokenizer.save(self.out / "tokenizer.json")
        self.metrics = Metrics(self.out, self.step)
        self.line = RunLine(console, self.step, config.train.steps)

    def _resume(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        # A setting that is younger than the checkpoint had its default.
        then, now = shaping_settings(Config()) | checkpoint.extra["settings"], shaping_settings(self.config)
        if changed := [key for key in now | then if now.get(key) != then.get(key)]:
            differences = ", ".join(f"{key} was {then.get(key)!r} and is {now.get(key)!r}" for key in changed)
            raise ConfigError(
                f"{self.out} holds a run of other settings: {differences}; "
                "give them again or name another --out"
            )
        if checkpoint.extra.get("corpus_digest") != self.data.stats["corpus_digest"]:
            raise ConfigError(f"the text of data.paths is not what {self.out} began with; name another --out")
        load_weights(self.model, checkpoint, path)
        self.optimizer.load_state_dict(checkpoint.optim_state)
        self.step = self._saved = checkpoint.step
        self.tokens_seen = checkpoint.extra["tokens_seen"]
        self.console.print(f"resumed {path} at step {self.step}")

    def run(self) -> None:
        """Train to the last step, to the time budget, or to a signal; then save.

        A signal before the first step meets the handlers of before: there is nothing to save.
        """
        with contextlib.closing(self.metrics):
            is_sparse, is_finished = bool(self.model.moe_layers()), self.step >= self.config.train.steps
            dense = dense_tokens_per_s(self.config) if is_sparse and not is_finished else None
            with self.line, self._signals_stop():
                self._run(dense)

    @contextlib.contextmanager
    def _signals_stop(self) -> Iterator[None]:
        former = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in former.items():
                signal.signal(s, handler)

    def _run(self, dense: float | None) -> None:
        t, started = self.config.train, time.monotonic()
        last_log, last_tokens = time.monotonic(), self.tokens_seen
        while self.step < t.steps and not self._stop:
            if t.time_budget_s is not None and time.monotonic() - started > t.time_budget_s:
                self.line.say(f"time budget of {t.time_budget_s:g} s is spent")
                break
            row = self._train_step()
            self.step += 1
            self.line.advance(self.step)
            if self.step % t.log_every == 0 or self.step == t.steps:
                now = time.monotonic()
                speed = row["tokens_per_s"] = (self.tokens_seen - last_tokens) / (now - last_log)
                share = row["share_of_dense"] = speed / dense if dense else None
                load = busiest(row["load"]) if "load" in row else None
                self.line.update(self.step, row["loss"], speed, share, load)
                last_log, last_tokens = now, self.tokens_seen
            self.metrics.write(self.step, **row)
            pause = time.monotonic()  # validation, samples and checkpoints are no part of tokens a second
            if self.step % t.eval_every == 0 or self.step == t.steps:
                self._validate()
            if t.sample_every and self.step % t.sample_every == 0:
                self._sample()
            if self.step % t.save_every == 0:
                self._save()
            last_log += time.monotonic() - pause
        if self._saved != self.step:
            self._save()
        if self._stop:
            self.line.say(f"stopped at step {self.step}; saved, continue with --resume")

    @property
    def is_stopped(self) -> bool:
        """A signal ended the run before its last step."""
        return self._stop

    def _on_signal(self, *_: Any) -> None:
        self._stop = True

    def _train_step(self) -> dict[str, Any]:
        t, o = self.config.train, self.config.optim
        rate = learning_rate(self.step, self.config)
        set_learning_rate(self.optimizer, rate)
        loss_sum, counts = 0.0, []
        for micro in range(t.grad_accum):
            inputs, targets = self.data.train.batch(
                self.step * t.grad_accum + micro, t.batch_size, t.seq_len, t.seed
            )
            with precision(self.config):
                logits = self.model(inputs)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
            counts.append([moe.last_routing.counts for moe in self.model.moe_layers()])
            ((loss + self._balance_loss()) / t.grad_accum).backward()
            loss_sum += loss.item()
            self.tokens_seen += inputs.numel()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), o.grad_clip, foreach=True).item()
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):  # one such step would spoil every weight
            raise Diverged(
                f"step {self.step + 1}: loss {loss_sum / t.grad_accum}, gradient norm {norm}; no checkpoint "
                "holds this step, and a resumed run would meet it again: start anew with a lower optim.lr"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        layer_counts = [sum(layer) for layer in zip(*counts, strict=True)]
        if self.config.router.balance == "bias":
            for moe, layer in zip(self.model.moe_layers(), layer_counts, strict=True):
                sk_nn.update_expert_bias(moe.router, layer, self.config.router.bias_rate)
        row = {
            "loss": loss_sum / t.grad_accum,
            "grad_norm": norm,
            "lr": rate,
            "tokens": self.tokens_seen,
        }
        if layer_counts:
            row["load"] = [layer.tolist() for layer in layer_counts]
        return row

    def _balance_loss(self) -> Tensor | float:
        r = self.config.router
        total: Tensor | float = 0.0
        for moe in self.model.moe_layers():
            sums, counts = moe.last_sums, moe.last_routing.counts
            if r.balance in ("loss", "global") and r.balance_coef:
                counts = sk_nn.global_counts(counts) if r.balance == "global" else counts
                total = total + r.balance_coef * sk_nn.load_balancing_loss(sums, counts)
            if r.z_coef:
                total = total + r.z_coef * sk_nn.router_z_loss(sums)
        return total

    def _validate(self) -> None:
        bits = evaluate(self.model, self.data.val, self.config)
        self.metrics.write(self.step, val_bits_per_byte=bits, tokens=self.tokens_seen)
        self.line.say(f"step {self.step:5d}  validation {bits:.4f} bits per byte", style="bold")

    def _sample(self) -> None:
        sample = generate(self.model, self.data.tokenizer, "def ", max_tokens=60)
        self.metrics.write(self.step, sample=sample)
        self.line.say(f"step {self.step:5d}  sample:")
        self.console.print(sample, markup=False, highlight=False)

    def _save(self) -> None:
        extra = {
            "settings": shaping_settings(self.config),
            "corpus_digest": self.data.stats["corpus_digest"],
            "tokens_seen": self.tokens_seen,
        }
        save_checkpoint(
            self.checkpoints,
            self.step,
            self.model.state_dict(),
            self.optimizer.state_dict(),
            extra,
            self.config.train.keep,
        )
        self._saved = self.step


@torch.no_grad()
def evaluate(model: LanguageModel, data: TokenDataset, config: Config) -> float:
    """Bits per byte on the first eval_batches batches of the validation split."""
    t = config.train
    nats, num_bytes = 0.0, 0
    for inputs, targets in data.eval_batches(t.batch_size, t.seq_len, t.eval_batches):
        with precision(config):
            logits = model(inputs)
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        num_bytes += data.count_bytes(targets)
    return nats / math.log(2) / num_bytes


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks, so that no step after the first pays for fresh pages again."""
    libc = ctypes.CDLL(ctypes.util.find_library("c") or None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, (1 << 31) - 1)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
