"""The run: steps, validation, checkpoints, and an end that loses nothing."""

import contextlib
import ctypes
import ctypes.util
import math
import signal
import time
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from sigma_kernels import _C
from sigma_train import beginning, selfcheck, step_noise
from sigma_train.bound import dense_tokens_per_s, machine, product_flops_per_s
from sigma_train.checkpoint import latest_checkpoint, read_record
from sigma_train.config import Config, shaping_settings
from sigma_train.console import say
from sigma_train.dataset import PreparedData, prepare
from sigma_train.errors import WrongInput
from sigma_train.evaluate import evaluate
from sigma_train.events import FILE, Was
from sigma_train.expert_counts import ExpertCounts
from sigma_train.files import write_text
from sigma_train.generate import generate
from sigma_train.growth_cost import KEY, SunkCostLedger
from sigma_train.guard import Diverged, Guard
from sigma_train.layer_statistics import LayerStatistics
from sigma_train.ledger import Ledger
from sigma_train.mesh import mesh_of, sizes
from sigma_train.metrics import Metrics
from sigma_train.model import LanguageModel, flops_per_token
from sigma_train.objective import Objective
from sigma_train.optim import learning_rate, make_optimizer, set_learning_rate
from sigma_train.placing import Placing, in_words
from sigma_train.products import has_products_of_bf16
from sigma_train.progress import RunLine
from sigma_train.ranks import Ranks
from sigma_train.step import Step


class Trainer:
    """One run in one folder: config.toml, metrics.jsonl, tensorboard/, tokenizer.json, checkpoints/.

    The caller holds the folder (`folder.claimed`) from before this is made until the last file of the run is written.
    """

    def __init__(
        self,
        config: Config,
        console: Console,
        resume: bool,
        ranks: Ranks = Ranks(),  # noqa: B008
        began: int | None = None,  # for the ledger, ns; None: now
    ) -> None:
        textfile = Path(config.train.prometheus) if config.train.prometheus else None
        self.ledger = Ledger(Path(config.train.out) / FILE, ranks.is_first, textfile)
        began = began or self.ledger.now()
        self.config, self.console, self.ranks = config, console, ranks
        self.out = Path(config.train.out)
        self.checkpoints = self.out / "checkpoints"
        self.step, self.tokens_seen, self._saved, self._checked, self._stop = 0, 0, -1, -1, False
        self.noise = step_noise.recorder_of(config, ranks)
        _C.isa()  # a SIGMA_ISA that this processor has not, before anything is written
        sizes(config, ranks.size)
        beginning.weights_must_fit(config)
        own = beginning.own_checkpoint(config, resume, ranks)
        others = None if own else beginning.others_checkpoint(config, ranks)
        keep_freed_memory()
        torch.set_num_threads(config.train.threads or torch.get_num_threads())
        torch.manual_seed(config.train.seed)
        self.data: PreparedData = prepare(config)
        self.objective = Objective(config, self.data, ranks)
        self.guard = Guard(config.guard)
        self.sunk = SunkCostLedger()
        self.placing = Placing(config.train)
        experts = ExpertCounts(config)
        self.model = LanguageModel(config)
        if own:
            self._resume(own)
        elif others:
            self._begin_with(others)
        top_k = experts.mean(self.step, config.train.steps) if self.model.moe_layers() else ()
        flops = flops_per_token(self.model, config, top_k)  # here: of the whole model
        self.mesh = mesh_of(config, ranks.size) if ranks.size > 1 else None
        if self.mesh is not None:
            late("parallel").spread(self.model, self.mesh)
        self.optimizer = make_optimizer(self.model, config.optim)
        if stored := own or others:
            with_moments = own is not None or config.train.init_optimizer
            late("parallel").load_state(self.model, self.optimizer, stored, ranks, with_moments=with_moments)
        t = config.train
        self.saver = late("saver").Saver(self.checkpoints, t.keep, ranks, t.async_save, t.rank_timeout_s)
        tokens = t.grad_accum * t.batch_size * t.seq_len * ranks.size
        self.ledger.begin(began, ranks.size, self.step, machine(config), tokens, flops)
        self.layers = LayerStatistics(self.model, config, self.data)
        self.one_step = Step(
            config, self.model, self.data, self.mesh, ranks, self.layers, self.noise, self.objective
        )
        # What was done last, for a run that has nothing left to do.
        self.one_step.turn_to(max(0, self.step - 1))
        if ranks.is_first:
            write_text(self.out / "config.toml", config.to_toml())
            self.data.tokenizer.save(self.out / "tokenizer.json")
        self.metrics = Metrics(self.out, self.step) if ranks.is_first else None
        self.line = RunLine(console, self.step, config.train.steps)

    def _resume(self, path: Path) -> None:
        """Take step and history from a checkpoint of this run."""
        digest = self.data.stats["corpus_digest"]
        record = beginning.record_of_own(path, self.config, self._settings(), digest, self.model)
        self._stand_at(record)
        if "guard" in record["extra"]:  # of a program that had one
            self.guard.load(record["extra"]["guard"])
        self.sunk = SunkCostLedger.of_record(record["extra"].get(KEY))
        say(self.console, f"resumed {path} at step {self.step}")

    def _begin_with(self, path: Path) -> None:
        """Begin a new run with the weights of another."""
        digest = self.data.stats["corpus_digest"]
        self.sunk = beginning.sunk_in_others(path, self.config, digest, self.model)
        told = f", with {self.sunk.sunk_flops:.3g} FLOPs sunk in them" if self.sunk.sunk_flops else ""
        say(self.console, f"begins with the weights of {path}, of step {read_record(path)['step']}{told}")

    def _stand_at(self, record: dict[str, Any]) -> None:
        """Step and history of a checkpoint, but for what the guard has met."""
        self.step = self._saved = record["step"]
        self.tokens_seen = record["extra"]["tokens_seen"]
        self.placing.load(record["extra"].get("load"))

    def _settings(self) -> dict[str, Any]:
        """What shapes the weights; the sequences of a step are those of all ranks, however many share them.

        Of a teacher's file its content counts, not its name.
        """
        settings = shaping_settings(self.config)
        sequences = settings["train.batch_size"] * self.ranks.size
        return settings | {"train.batch_size": sequences, "objective.teacher": self.objective.digest}

    def run(self) -> None:
        """Train to the last step, to the time budget, or to a signal; then save.

        A signal before the first step meets the handlers of before: there is nothing to save.
        """
        try:
            is_sparse, is_finished = bool(self.model.moe_layers()), self.step >= self.config.train.steps
            dense = None
            if is_sparse and not is_finished:
                (dense,) = self.ranks.summed(dense_tokens_per_s(self.config))
            if not is_finished and self.ranks.first(self.ledger.peak) is None:
                self.ledger.measured(self._peak())
            if not is_finished:
                self.noise.watch(self.model, self.mesh)
            with self.line, self._signals_stop():
                self._run(dense)
            self.ledger.outcome = (
                "signal" if self._stop else "finished" if self.step >= self.config.train.steps else "budget"
            )
            self.noise.finish()
            self.ledger.turn("report")
        except BaseException:
            try:
                self.noise.close()
            except (OSError, WrongInput) as lost:  # not in place of what ended the run
                warnings.warn(
                    f"train.noise: the end of the run is not in the record: {lost}",
                    step_noise.RecordWarning,
                    stacklevel=2,
                )
            raise
        finally:
            self.saver.close()
            if self.metrics is not None:
                self.metrics.close()

    def _peak(self) -> float:
        """FLOP/s of all ranks in dense products, all at work at once; a collective."""
        self.ranks.summed(0.0)  # they begin together
        is_bf16 = self.config.train.dtype == "bf16" and has_products_of_bf16()
        (peak,) = self.ranks.summed(product_flops_per_s(torch.bfloat16 if is_bf16 else torch.float32))
        return peak

    @contextlib.contextmanager
    def _signals_stop(self) -> Iterator[None]:
        former = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in former.items():
                signal.signal(s, handler)

    def _run(self, dense: float | None) -> None:
        t = self.config.train
        ends = math.inf if t.time_budget_s is None else time.monotonic() + t.time_budget_s
        has_begun = False  # one step whatever the budget, or a chain of short runs might never get on
        last_log, last_tokens = time.monotonic(), self.tokens_seen
        self.ledger.turn("step")
        while self.step < t.steps:
            is_spent = has_begun and time.monotonic() > ends
            self.noise.begin_step(self.step + 1)
            # What one rank knows all must do.
            stops, budgets, failures = self.ranks.summed(self._stop, is_spent, self.saver.has_failed)
            if failures:
                self.saver.wait()
            if stops:
                self._stop = True
                break
            if budgets:
                self.line.say(f"time budget of {t.time_budget_s:g} s is spent")
                break
            row = self._train_step()
            has_begun = True
            self.noise.turn(step_noise.LOG)
            if row is None:  # the run has gone back
                last_log, last_tokens = time.monotonic(), self.tokens_seen
                continue
            self.step += 1
            self.ledger.step(self.step, is_learned="loss" in row)
            self.line.advance(self.step)
            if "layers" in row:
                self.line.look(row["layers"])
            if self.step % t.log_every == 0 or self.step == t.steps:
                now = time.monotonic()
                if self.tokens_seen > last_tokens and "loss" in row:
                    speed = row["tokens_per_s"] = (self.tokens_seen - last_tokens) / (now - last_log)
                    share = row["share_of_dense"] = speed / dense if dense else None
                    row |= (figures := self.ledger.figures())
                    self.line.update(self.step, row["loss"], speed, share, row.get("load"), **figures)
                last_log, last_tokens = now, self.tokens_seen
            self._record(**row)
            self.noise.end_step()
            # Checks, validation, samples and checkpoints are no part of tokens a second.
            pause = time.monotonic()
            every = self.config.guard.check_every
            if every and self.step % every == 0:
                self._check()
            if self.step % t.eval_every == 0 or self.step == t.steps:
                with self._pause("validation"):
                    self._validate()
            if t.sample_every and self.step % t.sample_every == 0:
                with self._pause("validation"):
                    self._sample()
            if self.step % t.save_every == 0:
                with self._pause("checkpoint"):
                    self._save()
            last_log += time.monotonic() - pause
        if self._saved != self.step:
            with self._pause("checkpoint"):
                self._save()
        with self._pause("checkpoint"):
            self.saver.wait()
        if self._stop:
            self.line.say(f"stopped at step {self.step}; saved, continue with --resume")

    @contextlib.contextmanager
    def _pause(self, cause: Was) -> Iterator[None]:
        """No part of a step."""
        with self.ledger.pause(cause), self.noise.pause(cause):
            yield

    @property
    def is_stopped(self) -> bool:
        """A signal ended the run before its last step."""
        return self._stop

    def _on_signal(self, *_: Any) -> None:
        self._stop = True

    def _train_step(self) -> dict[str, Any] | None:
        """One step, or what is done in its place; its row of the metrics, None where the run has gone back."""
        turned = self._turned()
        if self.step in self.guard.passed_over:
            return {"guard": "left out"} | turned
        rate = learning_rate(self.step, self.config) * self.guard.rate_scale
        set_learning_rate(self.optimizer, rate)
        with self.layers.watching(self.step + 1):
            loss, norm, counts = self.one_step.gradients(self.step)
        row: dict[str, Any] = {"loss": loss, "grad_norm": norm, "lr": rate}
        row |= self.one_step.figures | turned
        self.noise.turn(step_noise.GUARD)
        if trouble := self.guard.trouble(loss, norm):
            policy, told = trouble
            told += f"; {self.one_step.origin(self.step, loss, norm)}"
            if policy != "keep":
                return self._meet(policy, told)
            self.guard.accept(loss, norm)
            self.line.say(f"step {self.step + 1:5d}  {told}", style="yellow")
            row["guard"] = f"kept: {told}"
        self.one_step.learn(self.optimizer, counts)
        t = self.config.train
        self.tokens_seen += t.grad_accum * t.batch_size * t.seq_len * self.ranks.size
        self.noise.turn(step_noise.LOG)
        row["tokens"] = self.tokens_seen
        self.placing.see(counts)
        if counts:
            row["load"] = [layer.tolist() for layer in counts]
        return row | self.layers.row(self.step + 1, counts, self.ranks)

    def _turned(self) -> dict[str, Any]:
        """The experts a token of each layer where the schedule changes them, said and for the metrics."""
        self.one_step.turn_to(self.step)
        now = self.one_step.experts.of_step(self.step)
        if not self.step or now == self.one_step.experts.of_step(self.step - 1):
            return {}
        self.line.say(f"step {self.step + 1:5d}  experts a token, layer by layer: {', '.join(map(str, now))}")
        return {"top_k": list(now)}

    def _meet(self, policy: str, told: str) -> dict[str, Any] | None:
        """Leave the step out, as the policy says; the gradients, which are not fit, are dropped."""
        self.guard.meet(policy, self.step, told)
        self.optimizer.zero_grad(set_to_none=True)
        text = f"{policy}: step {self.step + 1} is left out, {told}"
        if policy == "rollback":
            with self._pause("restart"):
                text += f"; back from step {self.step} to {self._roll_back()}"
            self.ledger.gone_back(self.step)
        self.line.say(text, style="yellow")
        if policy != "rollback":
            return {"guard": text}
        self._record(guard=text)
        return None

    def _roll_back(self) -> int:
        """Weights and optimizer of the newest checkpoint, whose step is the answer; what the guard has met stays.

        Raises: Diverged if there is no checkpoint.
        """
        self.saver.wait()
        path = latest_checkpoint(self.checkpoints, self.ranks)
        if path is None:
            raise Diverged(
                f"step {self.step + 1}: there is no checkpoint to go back to yet; lower train.save_every"
            )
        record = read_record(path)
        self.optimizer = make_optimizer(self.model, self.config.optim)
        late("parallel").load_state(self.model, self.optimizer, path, self.ranks)
        self._stand_at(record)
        self.guard.rewind(record["extra"].get("guard"))
        if self.metrics is not None:
            self.metrics.close()
            self.metrics = Metrics(self.out, self.step)
        self.line.advance(self.step)
        return self.step

    def _record(self, **row: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(self.step, **row)

    def _validate(self) -> None:
        bits = evaluate(self.model, self.data.val, self.config, self.ranks)
        self._record(val_bits_per_byte=bits, tokens=self.tokens_seen)
        self.line.say(f"step {self.step:5d}  validation {bits:.4f} bits per byte", style="bold")

    def _sample(self) -> None:
        sample = generate(self.model, self.data.tokenizer, "def ", max_tokens=60, ranks=self.ranks)
        self._record(sample=sample)
        self.line.say(f"step {self.step:5d}  sample:")
        say(self.console, sample)

    def _check(self) -> None:
        if self._checked != self.step:
            with self._pause("check"):
                selfcheck.check(self.model, self.config, self.step, self.ranks)
        self._checked = self.step

    def _place(self) -> None:
        """Before the checkpoint, so that it holds what the run goes on with."""
        if row := self.placing.place(self.model, self.optimizer, self.ranks):
            self._record(**row)
            self.line.say(f"step {self.step:5d}  {in_words(row)}")

    def _save(self) -> None:
        if self.config.guard.check_every:
            self._check()
        if self.placing.is_due(self.step):
            self._place()
        extra = {
            "settings": self._settings(),
            "corpus_digest": self.data.stats["corpus_digest"],
            "tokens_seen": self.tokens_seen,
            "guard": self.guard.state(),
            "load": self.placing.state(),
            KEY: self.sunk.record(),
        }
        self.saver.save(self.step, late("parallel").state_of(self.model, self.optimizer), extra)
        self._saved = self.step
        self.noise.save()


def late(name: str) -> ModuleType:
    """A module of ours whose FSDP and DTensor take a second to import: not for a run that is refused."""
    return import_module(f"sigma_train.{name}")


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks, so that no step after the first pays for fresh pages again."""
    libc = ctypes.CDLL(ctypes.util.find_library("c") or None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, (1 << 31) - 1)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
