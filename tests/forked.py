"""`sigma` in processes forked from one that has imported it: a start takes a tenth of a second, not four.

The server has computed nothing, so that its children have no threads to miss.  What is read at import, and what happens
to a process from outside, is tested on processes of their own.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
IMPORTED = [
    "sigma_cli.commands",
    "torch._dynamo",  # which an optimizer imports
    *(f"sigma_train.{name}" for name in ("compare", "export", "folder", "loop", "parallel", "report")),
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
    args: Sequence[str], env: Mapping[str, str], cwd: Path | None
) -> subprocess.CompletedProcess[str] | None:
    """None where the program would import under other variables than the server did."""
    wanted = {name: value for name, value in env.items() if name.startswith(AT_IMPORT)}
    if _imported_under is None:
        _start(wanted)
    if wanted != _imported_under:
        return None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_child, args=(list(args), dict(env), cwd, files))
        process.start()
        process.join()
        stdout, stderr = (path.read_text() for path in files)
    return subprocess.CompletedProcess(["sigma", *args], process.exitcode, stdout, stderr)


def _child(args: list[str], env: dict[str, str], cwd: Path | None, files: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    for number, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    sys.argv = ["sigma", *args]
    import sigma_cli

    sigma_cli.main()
