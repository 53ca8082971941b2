"""What befalls a save in a process of test_train_checkpoint.py; in a module, as the forked process imports it."""

import os
import resource
import signal
from collections.abc import Callable
from functools import partial
from typing import Any

from sigma_train import generate, loop, report
from sigma_train.sharded import Writer

AT_STEP = 4


def nothing() -> None:
    """The run alone: no sample, no report, no dense twin."""
    loop.dense_tokens_per_s = lambda config: 1.0
    generate.generate = lambda *_, **__: "no sample"
    report.write_report = lambda *_: "no report"


def befall(method: str, rank: str, fault: Callable[[], None]) -> None:
    """Have `fault` come before this method of the writer of step 4, on this rank."""
    nothing()
    then = getattr(Writer, method)

    def now(writer: Writer, *args: Any, **named: Any) -> Any:
        if writer.step == AT_STEP and os.environ.get("RANK", "0") == rank:
            fault()
        return then(writer, *args, **named)

    setattr(Writer, method, now)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def disk_is_full() -> None:
    """For a part; a line of metrics fits."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


killed_before_a_part = partial(befall, "write_data", "0", killed)
killed_before_the_record = partial(befall, "finish", "0", killed)
rank_1_is_killed = partial(befall, "write_data", "1", killed)
disk_of_rank_1_is_full = partial(befall, "write_data", "1", disk_is_full)
