"""The command `sigma`: whatever ends a command badly becomes one sentence and an exit code here, and only here."""

import os
import signal
import sys
from typing import Any

from sigma_train.errors import Stopped, verdict

AGAIN_S = 3.0  # a signal is raised again after: more than it takes to leave


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and a script's & leave it
            signal.signal(number, _on_signal)
    try:
        from sigma_cli.commands import app  # here, so that a module that is missing is told like the rest

        app()
    except (Exception, Stopped) as error:
        if (found := verdict(error)) is None:
            raise
        code, sentence = found
        rank = os.environ.get("RANK", "0")  # under torchrun
        if rank == "0" or code != 2:  # what one rank refuses all do: the first one says it
            print(f"error: {'' if rank == '0' else f'rank {rank}: '}{sentence}", file=sys.stderr)
        sys.exit(code)
    finally:
        heeded()
        for number in (signal.SIGINT, signal.SIGTERM):  # what Python still does is no work to be stopped
            signal.signal(number, signal.SIG_IGN)


def _on_signal(number: int, _: Any) -> None:
    """Raise, and again while the command goes on.

    Python drops what is raised within a `__del__` or a callback of its imports, and a system call that begins just
    after a signal does not see it.
    """
    signal.signal(signal.SIGALRM, lambda *_: _on_signal(number, None))
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
    raise Stopped(number)


def heeded() -> None:
    """A signal has reached who acts on it, for longer than it would be raised again after."""
    signal.setitimer(signal.ITIMER_REAL, 0)
