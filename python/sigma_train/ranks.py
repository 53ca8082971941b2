"""The ranks of a run: those that torchrun started, or this process alone."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sigma_kernels.collectives import observed
from sigma_train.errors import LostRank, WrongInput
from sigma_train.parent import end_with_parent

RESTART_COUNT = "SIGMA_RESTART_COUNT"
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """Place among all."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Of all: it writes files and speaks."""
        return self.rank == 0

    def first(self, value: T) -> T:
        """What the first rank has, on all of them; a collective."""
        if self.size == 1:
            return value
        box = [value]
        with observed("first"):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """What each rank has, on all of them; a collective."""
        if self.size == 1:
            return [value]
        box = [value] * self.size
        with observed("gathered"):
            dist.all_gather_object(box, value)
        return box

    def rows(self, mine: Tensor) -> Tensor:
        """The rows of all ranks in their order, of each as many; a collective."""
        if self.size == 1:
            return mine
        found = mine.new_empty(self.size * len(mine), *mine.shape[1:])
        with observed("gathered"):
            dist.all_gather_single(found, mine.contiguous())
        return found

    def summed(self, *values: float | Tensor) -> list[float]:
        """Numbers, each over all ranks; a collective."""
        total = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values])
        if self.size > 1:
            with observed("sum"):
                dist.all_reduce(total)
        return total.tolist()


def hold_shards(model: nn.Module, ranks: Ranks) -> None:
    """After a forward without a backward, which leaves the parameters of the root whole on every rank."""
    if ranks.size == 1:
        return
    from torch.distributed.fsdp import FSDPModule  # a second of it and DTensor

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_launched() -> bool:
    """Whether torchrun, or what speaks as it does, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarts() -> int:
    """How often `launch` has started the ranks of this run anew."""
    return int(os.environ.get(RESTART_COUNT, "0"))


@contextlib.contextmanager
def joined(timeout_s: float) -> Iterator[Ranks]:
    """The ranks of this run, joined for as long as the block lasts.

    Raises: LostRank where another rank is lost, or waited for longer than timeout_s; WrongInput for an environment that
        is not torchrun's.
    """
    if not is_launched():
        yield Ranks()
        return
    if RESTART_COUNT in os.environ:
        end_with_parent()
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    except ValueError as error:  # a variable that is missing or no number
        raise WrongInput(f"the ranks' environment is not torchrun's: {error}") from None
    except RuntimeError as error:
        raise LostRank(f"the ranks did not meet: {' '.join(str(error).split())}") from None
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise LostRank(f"another rank is lost: {' '.join(str(error).split())}") from None
    finally:
        dist.destroy_process_group()
