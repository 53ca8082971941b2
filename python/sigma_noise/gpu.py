"""What is asked of a GPU through torch and our kernels, and what a kernel gives on it; a test has another."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from sigma_train.errors import WrongInput
from torch import Tensor

import sigma_kernels as sk
from sigma_noise import host
from sigma_noise.trace import Series

Step = Callable[[], object]
Exchange = Callable[[Tensor, Tensor], object]  # received, sent: all-to-all on the current stream


@dataclass(frozen=True)
class Gpu:
    """`about` goes into the file; `uuid` there tells whether two ranks have one GPU."""

    device: torch.device
    about: dict[str, Any]
    processors: int
    event: Callable[[], Any]
    captured: Callable[[Step], Callable[[], None]]  # what replays it
    synchronize: Callable[[], None]
    stream: Callable[[], int]
    native: Any  # sigma_kernels._C.cuda, or None where it was not built
    exchange: Callable[[], AbstractContextManager[Exchange]] | None  # a collective; None without NCCL


@dataclass(frozen=True)
class Result:
    """Of one kernel in one mode: series and facts by name, and what makes them doubtful."""

    series: dict[str, Series]
    about: dict[str, dict[str, Any]]
    warnings: list[str] = field(default_factory=list)


def found() -> Gpu:
    """This rank's.  Raises: WrongInput where torch sees none."""
    if not torch.cuda.is_available():
        raise WrongInput(f"--backend cuda: torch {torch.__version__} sees no GPU here")
    device = torch.device("cuda", host.local_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    properties = torch.cuda.get_device_properties(device)
    about = {"name": properties.name, "uuid": str(properties.uuid)}
    about |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    return Gpu(
        device=device,
        about=about | {"processors": properties.multi_processor_count},
        processors=properties.multi_processor_count,
        event=lambda: torch.cuda.Event(enable_timing=True),
        captured=_captured,
        synchronize=torch.cuda.synchronize,
        stream=lambda: torch.cuda.current_stream().cuda_stream,
        native=getattr(sk._C, "cuda", None),
        exchange=_nccl if dist.is_nccl_available() else None,
    )


def _captured(step: Step) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call allocates and compiles cannot be captured
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextlib.contextmanager
def _nccl() -> Iterator[Exchange]:
    """NCCL's, or RCCL's, which torch calls by the same name, in a group beside the ranks' own of gloo.

    The group goes as soon as it is done with: its watchdog wakes ten times a second, which other kernels would show.
    """
    group = dist.new_group(backend="nccl")
    yield partial(dist.all_to_all_single, group=group)
    torch.cuda.synchronize()
    dist.destroy_process_group(group)
