"""Files that are either whole or absent: written beside their place, synced, then renamed into it."""

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # not a Unix: the lock below saves work, it is not needed for correctness
    fcntl = None

TEMPORARY = ".tmp-"  # how every unfinished file or folder of ours begins


def temporary_name(path: Path) -> Path:
    """A fresh name in the folder of `path`, so that a rename stays on one file system."""
    return path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of `path` if the block ends well, and vanishes if not."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def failed_writes_are_oserrors(path: Path) -> Iterator[None]:
    """safetensors and torch.save report a full disk by errors of their own."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"cannot write {path}, perhaps for want of space: {error}") from None


def sync(path: Path) -> None:
    """fsync a file or a folder (a rename is durable once its folder is)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sweep(folder: Path, older_than_s: float) -> None:
    """Remove temporary files that a killed process left behind; the age spares those still being written."""
    limit = time.time() - older_than_s
    for path in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(FileNotFoundError):  # another process may sweep as well
            if path.stat().st_mtime < limit:
                path.unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, so that of the ranks of one node a single one does the work.

    Only a saving: without lock support every process does the work and the last rename wins.
    """
    with open(path, "ab") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock, and so does the death of the process
