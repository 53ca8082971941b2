"""The folder of a run: written by one process at a time, and never one that holds something else."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sigma_train.errors import WrongInput
from sigma_train.files import locked, must_be_writable

LOCK = "run.lock"  # stays for good: it says whose folder this is, and only a living process holds it


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold `folder`, made if it is not there, until the block ends or the process dies.

    Raises: WrongInput if it can't be written, holds files but no run, or another process holds it.
    """
    with contextlib.ExitStack() as stack:
        with must_be_writable("train.out", folder):
            folder.mkdir(parents=True, exist_ok=True)
            foreign = next(folder.iterdir(), None)
            is_run = (folder / LOCK).exists() or any((folder / "checkpoints").glob("step-*"))
            if foreign is not None and not is_run:
                raise WrongInput(
                    f"train.out: {folder} holds {foreign.name} and no run; name a new or an empty folder"
                )
            try:
                stack.enter_context(locked(folder / LOCK, wait=False))
            except BlockingIOError:
                raise WrongInput(
                    f"train.out: another process trains in {folder}; wait for it or name another folder"
                ) from None
        yield
