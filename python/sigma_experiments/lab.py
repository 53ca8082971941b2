"""The trainings of an experiment: each a `sigma train` of one thread in a folder of its own, as many at once as cores.

A run that is finished is kept, one that was stopped goes on: the same call continues where it ended.  On one machine
the same seed gives the same numbers, however many runs go on at once.
"""

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sigma_train.config import Config, ConfigWarning, load_config
from sigma_train.errors import Failure
from sigma_train.files import write_text
from sigma_train.metrics import read_metrics

STOP_S = 60.0  # a training saves when it is told to end
SHAPE = {  # of all experiments, unless they say otherwise: a minute on one core
    "model.hidden_size": 64,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.head_dim": 32,
    "model.intermediate_size": 64,
    "model.max_seq_len": 128,
    "train.seq_len": 128,
    "train.log_every": 50,
    "train.keep": 1,
    "train.threads": 1,
}


SHORT = {  # over the settings of a run, where only its running is of interest
    "model.vocab_size": 512,
    "model.hidden_size": 16,
    "model.head_dim": 8,
    "model.intermediate_size": 8,
    "data.max_bytes": 400_000,
    "data.val_fraction": 0.1,
    "optim.warmup_steps": 2,
    "train.steps": 6,
    "train.batch_size": 4,
    "train.eval_every": 3,
    "train.eval_batches": 2,
}


class Process(Protocol):
    """What is asked of subprocess.Popen."""

    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, number: int) -> None: ...
    def kill(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """One arm of an experiment with one seed."""

    arm: str
    seed: int
    settings: Mapping[str, Any] = field(hash=False, compare=False)  # section.key: value, over SHAPE

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    def config(self, folder: Path) -> Config:
        """Raises: ConfigError."""
        own = {"train.seed": self.seed, "train.out": str(folder / self.name)}
        layers: dict[str, dict[str, Any]] = {}
        for name, value in {**SHAPE, **self.settings, **own}.items():
            section, _, key = name.partition(".")
            layers.setdefault(section, {})[key] = value
        with warnings.catch_warnings():  # the training has it in its log
            warnings.simplefilter("ignore", ConfigWarning)
            return load_config(None, None, [], layers)


@dataclass(frozen=True)
class Trained:
    """A run that is finished."""

    run: Run
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.train.out)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return list(read_metrics(self.folder / "metrics.jsonl"))

    @property
    def validation(self) -> list[tuple[int, float]]:
        """(step, bits per byte)."""
        return [(row["step"], row["val_bits_per_byte"]) for row in self.rows if "val_bits_per_byte" in row]

    def layers(self, name: str) -> tuple[list[int], list[list[float]]]:
        """A statistic of each layer: steps, and values [steps][layers]."""
        rows = [row for row in self.rows if "layers" in row]
        return [row["step"] for row in rows], [row["layers"][name] for row in rows]


@dataclass(frozen=True)
class Lab:
    """Where an experiment works.  seeds: of each arm; is_short: to see that it runs, not what comes of it."""

    folder: Path
    seeds: int
    is_short: bool
    jobs: int
    console: Console

    def train(self, runs: Sequence[Run]) -> dict[Run, Trained]:
        """Settings of all are looked at before one begins.  Raises: ConfigError; Failure as one fails."""
        found = {run: Trained(run, run.config(self.folder)) for run in runs}
        waiting = [trained for trained in found.values() if not _is_finished(trained)]
        self.folder.mkdir(parents=True, exist_ok=True)
        with _Trainings() as trainings, self._progress(len(found)) as advance:
            for _ in range(len(found) - len(waiting)):
                advance("kept")
            with ThreadPoolExecutor(self.jobs) as pool, trainings.stopped_at_a_fault():
                for done in as_completed(pool.submit(trainings.train, trained) for trained in waiting):
                    advance(done.result().run.name)
        return found

    @contextmanager
    def _progress(self, total: int) -> Iterator[Any]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("trainings", total=total)
            yield lambda name: bar.update(task, advance=1, description=f"{name} is done")


def _is_finished(trained: Trained) -> bool:
    """With these very settings, to its last step."""
    settings, steps = trained.folder / "config.toml", trained.config.train.steps
    if not settings.exists() or settings.read_text() != trained.config.to_toml():
        return False
    return bool(trained.validation) and trained.validation[-1][0] == steps


class _Trainings:
    """Processes that end with the block."""

    def __init__(self) -> None:
        self._running: set[Process] = set()
        self._lock, self._is_over = threading.Lock(), False

    def __enter__(self) -> "_Trainings":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @contextmanager
    def stopped_at_a_fault(self) -> Iterator[None]:
        """The pool waits for its threads, which wait for these."""
        try:
            yield
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """A training saves and ends at SIGTERM; one that does not is killed."""
        with self._lock:
            self._is_over = True
            running = list(self._running)
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()

    def train(self, trained: Trained) -> Trained:
        """Raises: Failure with what the training said last."""
        settings, log = (trained.folder.with_name(f"{trained.run.name}.{end}") for end in ("toml", "log"))
        write_text(settings, trained.config.to_toml())
        with self._lock:
            if self._is_over:
                return trained
            process = started(["train", "--config", str(settings), "--resume"], log)
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
            if code == 0 or self._is_over:
                return trained
        last = log.read_text().strip().splitlines()[-1:] or [f"exit code {code}"]
        raise Failure(f"experiment: {trained.run.name} failed: {last[0].removeprefix('error: ')}; see {log}")


def started(args: Sequence[str], log: Path) -> Process:
    """`sigma` on one thread, what it says in a file."""
    with open(log, "w") as told:
        return subprocess.Popen(
            [sys.executable, "-m", "sigma_cli", *args],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=told,
            stderr=subprocess.STDOUT,
        )
