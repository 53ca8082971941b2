"""Files and folders that are either whole or absent: written beside their place, synced, then renamed into it."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from sigma_train.errors import WrongInput

try:
    import fcntl
except ImportError:  # not a Unix
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
        with failed_writes_are_oserrors(path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path, setting: str) -> Iterator[Path]:
    """Make a temporary folder that takes the place of `path` if the block ends well, and vanishes if not.

    Raises: WrongInput if it can't be made there.
    """
    temporary = temporary_name(path)
    with must_be_writable(setting, path.parent):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with failed_writes_are_oserrors(path):
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def must_be_new(path: Path, setting: str) -> None:
    """Raises: WrongInput if anything has that name, a link to nothing too."""
    if os.path.lexists(path):
        raise WrongInput(f"{setting}: {path} exists; name a new folder")


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Raises: ValueError for a number that JSON has no word for."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def failed_writes_are_oserrors(path: Path) -> Iterator[None]:
    """A full disk names no file, and safetensors and torch.save report it by errors of their own."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__  # torch.save fails once more as it closes what it could not write
        if cause is not None:
            raise OSError(f"cannot write {path}: {cause.strerror or cause}") from None
        raise OSError(f"cannot write {path}, perhaps for want of space: {error}") from None
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


@contextlib.contextmanager
def must_be_writable(setting: str, folder: Path) -> Iterator[None]:
    """A folder that the user named and the system refuses is wrong input."""
    try:
        yield
    except OSError as error:
        raise WrongInput(
            f"{setting}: cannot write in {folder}: {error.strerror or error}; name another folder"
        ) from None


def must_take_files(setting: str, folder: Path) -> None:
    """Raises: WrongInput if no file can be made in a folder that is there, which hours of work should not find out."""
    with must_be_writable(setting, folder), tempfile.TemporaryFile(dir=folder):
        pass


def must_take_file(setting: str, path: Path | None) -> None:
    """As `atomic_file` would make it.  Raises: WrongInput if it cannot be made, or is there and no file."""
    if path is None:
        return
    with must_be_writable(setting, path.parent):
        if path.exists() and not path.is_file():
            raise WrongInput(f"{setting} must be a file, found {str(path)!r}")
        probe = temporary_name(path)
        probe.touch(exist_ok=False)
        probe.unlink()


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
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on `path`, a file that is made and stays; without lock support this does nothing.

    Raises: BlockingIOError if another holds it and `wait` is False.
    """
    with open(path, "ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # some network file systems have no locks
                pass
        yield  # closing the file releases the lock, and so does the death of the process
