"""Several ranks on this machine, started and watched by torch's elastic agent, and started again where one died."""

import logging
import os
import sys
import uuid
from collections.abc import Callable

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sigma_train.errors import Failure, Stopped, WrongInput
from sigma_train.ranks import RESTART_COUNT


def launch(ranks: int, restarts: int, arguments: list[str], say: Callable[[str], None]) -> None:
    """Run `sigma train ARGUMENTS` on so many ranks, which share this machine's cores.

    A rank that dies takes the others along; then all go on from the newest checkpoint, `restarts` times at most.  The
    agent restarts as well, but what was refused, too: the same settings, as often.
    Raises: WrongInput or Failure if ranks still fail, Stopped by a signal, once they have saved.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it logs is said here
    for restart in range(restarts + 1):
        os.environ[RESTART_COUNT] = str(restart)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            run_id=uuid.uuid4().hex, max_restarts=0,
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-P", "-m", "sigma_train", *arguments)
            return
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
        except SignalException as error:
            raise Stopped(error.sigval) from None
        if failure.exitcode == 2:
            raise WrongInput("the ranks refused their input, as said above")
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        ended = f"rank {rank} ended first, with {how}"
        if restart == restarts:
            raise Failure(f"{ended}, after {restarts} restarts")
        say(f"{ended}; all ranks start again from the newest checkpoint, {restart + 1} of {restarts} times")
