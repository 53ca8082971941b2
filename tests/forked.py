"""`sigma` in processes forked from one that has imported it: a start takes a tenth of a second, not four.

The server has computed nothing, so that its children have no threads to miss.  What is read at import, and what a
launcher starts, is tested on processes of their own.
"""

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from torch.multiprocessing import start_processes

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = [
    "sigma_cli.commands",
    "sigma_noise.run",
    "torch._dynamo",  # two thirds of a short run: every optimizer imports it
    *(
        f"sigma_train.{name}"
        for name in ("compare", "export", "folder", "loop", "parallel", "report", "saver")
    ),
]
AT_IMPORT = ("SIGMA_BACKEND", "TRITON_INTERPRET", "OMP_", "MALLOC_")

_imported_under: dict[str, str] | None = None  # of AT_IMPORT, by the server; None: it does not run yet


def _start(env: dict[str, str]) -> None:
    global _imported_under
    former = dict(os.environ)
    os.environ.update(env)
    try:
        CONTEXT.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(former)
    _imported_under = env


def run(
    args: Sequence[str], env: Mapping[str, str], cwd: Path | None, fault: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str] | None:
    """None where the program would import under other variables than the server did."""
    results = run_all(args, [env], cwd, fault)
    return results[0] if results else None


def on_ranks(
    size: int, args: Sequence[str], env: Mapping[str, str], fault: Callable[[], None] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """The program on so many ranks, which torchrun would have started, and each of which first calls `fault`.

    A fault is a function of a module of this folder.
    """
    results = run_all(args, environments(size, env), None, fault)
    assert results is not None, "the first to start the server did so under other variables"
    return results


def environments(size: int, env: Mapping[str, str]) -> list[dict[str, str]]:
    """Of so many ranks, as torchrun would have made them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [{**env, **common, "RANK": str(rank)} for rank in range(size)]


def spawn(function: Callable[..., None], args: tuple[Any, ...], size: int) -> None:
    """torch's own, of so many ranks of a function of a module of this folder, in forked processes."""
    assert serves({**os.environ, "OMP_NUM_THREADS": "2"}), (
        "the first to start the server did so under other variables"
    )
    start_processes(function, args, nprocs=size, start_method="forkserver")


def run_all(
    args: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    cwd: Path | None,
    fault: Callable[[], None] | None = None,
) -> list[subprocess.CompletedProcess[str]] | None:
    """The program in all of these environments at once."""
    if not serves(environments[0]):
        return None
    with contextlib.ExitStack() as all_of_them:
        started = [all_of_them.enter_context(Running(args, env, cwd, fault)) for env in environments]
        return [process.result() for process in started]


def serves(env: Mapping[str, str]) -> bool:
    """Whether a program in this environment would import under the variables that the server did."""
    wanted = {name: value for name, value in env.items() if name.startswith(AT_IMPORT)}
    if _imported_under is None:
        _start(wanted)
    return wanted == _imported_under


class Running:
    """A program at work, with what subprocess.Popen has of it; what still runs at the end of a `with` is killed."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str],
        cwd: Path | None = None,
        fault: Callable[[], None] | None = None,
    ) -> None:
        assert serves(env), "the first to start the server did so under other variables"
        self.args, self._folder = args, tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        self._process = CONTEXT.Process(target=_child, args=(list(args), dict(env), cwd, self._files, fault))
        self._process.start()
        self.pid = self._process.pid

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._process.join()
        self._folder.cleanup()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(list(self.args), timeout)
        return self._process.exitcode

    def said(self) -> str:
        """On stdout, until now."""
        return self._files[0].read_text() if self._files[0].exists() else ""

    def result(self, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """What it said until its end."""
        code = self.wait(timeout)
        return subprocess.CompletedProcess(["sigma", *self.args], code, *(f.read_text() for f in self._files))


def _child(
    args: list[str],
    env: dict[str, str],
    cwd: Path | None,
    files: list[Path],
    fault: Callable[[], None] | None,
) -> None:
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    for number, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    sys.argv = ["sigma", *args]
    if fault is not None:
        fault()
    import sigma_cli

    sigma_cli.main()
