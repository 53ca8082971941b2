"""Several ranks on this machine, started and watched by torch's elastic agent, and started again where one died."""

import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sigma_train.errors import Failure, Stopped, WrongInput
from sigma_train.events import End
from sigma_train.ledger import LAUNCHED_AT, attempt_ended, process_start
from sigma_train.ranks import RESTART_COUNT


def launch(
    ranks: int,
    restarts: int,
    arguments: list[str],
    say: Callable[[str], None],
    out: Path | None,
    module: str = "sigma_train",
) -> None:
    """Run `python -m MODULE ARGUMENTS` on so many ranks, which share this machine's cores; by default `sigma train`.

    `out`: the run's folder, whose ledger tells how attempts ended; none: nobody is told.

    A rank that dies or hangs takes the others along; all go on from the newest checkpoint, `restarts` times at most.
    That is not left to the agent, which starts whatever failed again: what was refused would be so again.
    Raises: WrongInput or Failure if ranks still fail, Stopped by a signal, once they have saved.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    logging.disable(logging.ERROR)  # what the agent logs is said here
    handled = [s.name for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) is not signal.SIG_IGN]
    tell = partial(attempt_ended, out) if out is not None else lambda end: None
    began = process_start()
    os.environ[LAUNCHED_AT] = str(began)
    for restart in range(restarts + 1):
        os.environ[RESTART_COUNT] = str(restart)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
            run_id=uuid.uuid4().hex, max_restarts=0, signals_to_handle=",".join(handled),
        )  # fmt: skip
        end = partial(End, launch=config.run_id, began=began, ranks=ranks, restarted=restart > 0)
        try:
            elastic_launch(config, sys.executable)("-P", "-m", module, *arguments)
            tell(end(at=time.time_ns()))
            return
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
        except SignalException as error:
            tell(end(at=time.time_ns(), how="signal"))
            raise Stopped(error.sigval) from None
        if failure.exitcode == 2:
            raise WrongInput("the ranks refused their input, as said above")
        how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        ended = f"rank {rank} ended first, with {how}"
        began = time.time_ns()  # of the next
        tell(end(at=began, how="failed", why=ended))
        is_lost = failure.exitcode < 0 or failure.exitcode == 3
        if restart == restarts or not is_lost:
            raise Failure(f"{ended}, after {restart} restarts")
        say(f"{ended}; all ranks start again from the newest checkpoint, {restart + 1} of {restarts} times")
