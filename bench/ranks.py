"""Several ranks in one race: this process and others beside it, which make each call that this one makes."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection, get_context
from typing import Any

import torch
import torch.distributed as dist

Calls = dict[str, Callable[[], Any]]
TIMEOUT = timedelta(seconds=120)


@contextmanager
def several(size: int, make: Callable[..., Calls], *arguments: Any) -> Iterator[Calls]:
    """The calls that make(*arguments) gives on each of `size` ranks over gloo, a thread each; here as on all of them.

    A call's name goes to the others by a pipe, some 50 us before they make it.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield from _several(size, make, arguments, f"{folder}/store")


def _several(size: int, make: Callable[..., Calls], arguments: Any, store: str) -> Iterator[Calls]:
    context, threads = get_context("spawn"), torch.get_num_threads()
    pipes, others = [], []
    for rank in range(1, size):
        mine, theirs = context.Pipe()
        others.append(
            context.Process(target=_rank, args=(theirs, rank, size, store, make, arguments), daemon=True)
        )
        pipes.append(mine)
        others[-1].start()
    torch.set_num_threads(1)
    _join(0, size, store)
    try:
        calls = make(*arguments)
        yield {name: _on_all(name, call, pipes) for name, call in calls.items()}
        for pipe in pipes:
            pipe.send(None)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)
        for process in others:
            process.join(10)
            process.kill()


def _on_all(name: str, call: Callable[[], Any], pipes: list[connection.Connection]) -> Callable[[], Any]:
    def run() -> Any:
        for pipe in pipes:
            pipe.send(name)
        return call()

    return run


def _rank(
    pipe: connection.Connection, rank: int, size: int, store: str, make: Callable[..., Calls], arguments: Any
) -> None:
    torch.set_num_threads(1)
    _join(rank, size, store)
    calls = make(*arguments)
    while (name := pipe.recv()) is not None:
        calls[name]()
    dist.destroy_process_group()


def _join(rank: int, size: int, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT
    )
