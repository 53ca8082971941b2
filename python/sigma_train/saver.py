"""Saving while the run goes on: the state is copied at once, and a thread writes the copy."""

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from sigma_train.checkpoint import place_of, sweep
from sigma_train.files import temporary_name
from sigma_train.ranks import Ranks
from sigma_train.sharded import Writer, first_failure, is_alone


class Saver:
    """Writes the checkpoints of a run into `folder`, which it sweeps, one at a time; its methods are collectives.

    In the background: the copy stays for the next save, whose pages are then not fresh ones, so a run holds its state
    twice.  The thread speaks with the other ranks through a group of its own: on that of the training its messages
    would stand between those of a step, on each rank between others.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        ranks: Ranks = Ranks(),  # noqa: B008
        in_background: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        self.folder, self.keep, self.ranks, self.in_background = folder, keep, ranks, in_background
        timeout = timedelta(seconds=timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if ranks.size > 1 else None
        self._stager: DefaultStager | None = None
        self._pending: tuple[Future[Any], Writer] | None = None
        if ranks.is_first:
            sweep(folder)

    def save(self, step: int, state: dict[str, Tensor], extra: dict[str, Any]) -> None:
        """Write step-NNNNNNNN once the former save is done, then remove all but the newest `keep`.

        `extra` must be JSON.  In the background `state` may change as soon as this returns, and the end is told by
        `wait`.
        Raises: OSError, on all ranks the same, if the disk of one is full; the former checkpoints are then as they
            were and nothing is left behind.  In the background that is told of the former save.
        """
        self.wait()
        if self.ranks.is_first:
            sweep(self.folder)
        temporary = self.ranks.first(temporary_name(place_of(self.folder, step)))
        writer = Writer(temporary, self.folder, step, extra, self.keep)
        group, no_dist = self._group, is_alone(self.ranks)
        if not self.in_background:
            with self._tidied(writer):
                save(state, storage_writer=writer, process_group=group, no_dist=no_dist)
            return
        if self._stager is None:
            self._stager = DefaultStager(
                StagingOptions(False, False, False, False)
            )  # nothing of CUDA: a plain copy
        future = async_save(
            state, storage_writer=writer, process_group=group, async_stager=self._stager, no_dist=no_dist
        )
        assert isinstance(future, Future)  # another for a stager that copies in the background, too
        self._pending = future, writer

    @property
    def has_failed(self) -> bool:
        """Whether `wait` will raise; other ranks may come to know of it later."""
        return self._pending is not None and self._pending[0].done() and bool(self._pending[0].exception())

    def wait(self) -> None:
        """Return once the checkpoint that was begun has its name.  Raises: as `save`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            future, writer = pending
            with self._tidied(writer):
                future.result()

    def close(self) -> None:
        """Wait, whatever comes of it, and give the copy's memory back."""
        if self._pending is not None:
            wait_for([self._pending[0]])
            if self.has_failed:
                self._tidy(self._pending[1])
            self._pending = None
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    @contextlib.contextmanager
    def _tidied(self, writer: Writer) -> Iterator[None]:
        try:
            with first_failure():
                yield
        except BaseException:
            self._tidy(writer)
            raise

    def _tidy(self, writer: Writer) -> None:
        if self.ranks.is_first:
            shutil.rmtree(writer.temporary, ignore_errors=True)
