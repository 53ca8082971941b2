"""The ranks of a run: those that torchrun started, or this process alone."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sigma_train.errors import Failure

RESTART_COUNT = "SIGMA_RESTART_COUNT"


@dataclass(frozen=True)
class Ranks:
    """Place among all, and the mesh over which experts and the rest of the model are spread; None where one is all."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Of all: it writes files and speaks."""
        return self.rank == 0

    def summed(self, *values: float | Tensor) -> list[float]:
        """Numbers, each over all ranks; a collective."""
        total = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()


def is_launched() -> bool:
    """Whether torchrun, or what speaks as it does, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarts() -> int:
    """How often the ranks of this run have been started anew, by `launch` or by torchrun."""
    return max(int(os.environ.get(name, "0")) for name in (RESTART_COUNT, "TORCHELASTIC_RESTART_COUNT"))


@contextlib.contextmanager
def joined(timeout_s: float) -> Iterator[Ranks]:
    """The ranks of this run, joined for as long as the block lasts.

    Raises: Failure where another rank is lost, or waited for longer than timeout_s.
    """
    if not is_launched():
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    try:
        size = dist.get_world_size()
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ranks",)) if size > 1 else None
        yield Ranks(dist.get_rank(), size, mesh)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise Failure(f"rank {dist.get_rank()} lost another rank: {' '.join(str(error).split())}") from None
    finally:
        dist.destroy_process_group()
