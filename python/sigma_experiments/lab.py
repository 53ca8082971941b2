"""The trainings of an experiment: each a `sigma train` of one thread in a folder of its own, as many at once as cores.

A run that is finished is kept, one that was stopped goes on: the same call continues where it ended, and one of other
settings is refused.  On one machine the same seed gives the same numbers, however many runs go on at once.
"""

import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sigma_cli import heeded
from sigma_train.checkpoint import place_of
from sigma_train.config import Config, ConfigError, ConfigWarning, load_config
from sigma_train.errors import Failure, WrongInput
from sigma_train.files import locked, must_be_writable, write_text
from sigma_train.metrics import read_metrics

LOCK = "experiment.lock"
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
        return _read(None, layers)


def _read(file: Path | None, layers: Mapping[str, dict[str, Any]]) -> Config:
    with warnings.catch_warnings():  # the training has it in its log
        warnings.simplefilter("ignore", ConfigWarning)
        return load_config(None, file, [], layers)


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
    kept: set[str] = field(default_factory=set)  # names of runs that a call before had finished

    def train(self, runs: Sequence[Run]) -> dict[Run, Trained]:
        """Settings of all are looked at before one begins.

        Raises: ConfigError, also where the folder of one has other settings; WrongInput if another process trains
        here; Failure as one fails.
        """
        found = {run: Trained(run, run.config(self.folder)) for run in runs}
        for trained in found.values():
            _must_be_of_these_settings(trained)
        with self._held(), _Trainings() as trainings, self._progress(len(found)) as advance:
            waiting = [trained for trained in found.values() if not _is_finished(trained)]
            for kept in [trained for trained in found.values() if trained not in waiting]:
                self.kept.add(kept.run.name)
                advance("kept")
            with ThreadPoolExecutor(self.jobs) as pool, trainings.stopped_at_a_fault():
                for done in as_completed(pool.submit(trainings.train, trained) for trained in waiting):
                    advance(done.result().run.name)
        return found

    @contextmanager
    def threads(self) -> Iterator[ThreadPoolExecutor]:
        """For what is measured in this process, one core each; after a fault what waits is not begun."""
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                try:
                    yield pool
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Two in one folder would write each other's settings and logs."""
        with must_be_writable("--out", self.folder), ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(locked(self.folder / LOCK, wait=False))
            except BlockingIOError:
                raise WrongInput(f"--out: another experiment trains in {self.folder}; wait for it") from None
            held = stack.pop_all()
        with held:
            yield

    @contextmanager
    def _progress(self, total: int) -> Iterator[Any]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("trainings", total=total)
            yield lambda name: bar.update(task, advance=1, description=f"{name} is done")


def _must_be_of_these_settings(trained: Trained) -> None:
    """Also those that shape no weight: `sigma train` would go on, and say nothing of what was measured otherwise."""
    if not (file := trained.folder / "config.toml").exists():
        return
    then, now = _read(file, {}).model_dump(), trained.config.model_dump()
    for section, settings in now.items():
        for key, value in settings.items():
            if (former := then[section][key]) != value:
                raise ConfigError(
                    f"experiment: {trained.folder} was trained with {section}.{key} = {former!r}, "
                    f"wanted is {value!r}; remove it or name another --out"
                )


def _is_finished(trained: Trained) -> bool:
    """To its last step, and saved: one that died between its last validation and its checkpoint is not."""
    steps = trained.config.train.steps
    if not place_of(trained.folder / "checkpoints", steps).exists():
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
        heeded()  # or a signal to this process would be raised again while they save
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
            process = started(["train", "--no-report", "--config", str(settings), "--resume"], log)
            self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
            if self._is_over:
                return trained
        if code == 0 and _is_finished(trained):
            return trained
        raise Failure(f"experiment: {trained.run.name} {_end(code, log)}; see {log}")


def _end(code: int, log: Path) -> str:
    if code == 0:
        return "was stopped before its last step, the same command goes on"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    last = log.read_text().strip().splitlines()[-1:] or [f"exit code {code}"]
    return f"failed: {last[0].removeprefix('error: ')}"


def started(args: Sequence[str], log: Path) -> Process:
    """`sigma` on one thread, what it says in a file; it saves and ends if this process dies."""
    with open(log, "w") as told:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "sigma_experiments", *args],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=told,
            stderr=subprocess.STDOUT,
        )
