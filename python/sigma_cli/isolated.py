"""Work in a process of its own, forked from one that has computed nothing yet: what dies there dies alone."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from sigma_train.errors import Failure, WrongInput, verdict

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Send = Callable[[Any], None]


class Died(Exception):
    """How the process ended, as part of a sentence."""


def messages(work: Callable[[Send], None], limit_s: float) -> Iterator[Any]:
    """What `work` sends, until it is done.

    Raises: Died if the process dies of a signal, or sends nothing for limit_s; WrongInput or Failure where `work`
        raised what has an exit code of its own; Failure if somebody killed it.
    """
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, receiving, sending), daemon=True)
    former = signal.pthread_sigmask(
        signal.SIG_BLOCK, SIGNALS
    )  # none between its birth and the block that ends it
    process.start()
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)
        sending.close()
        while receiving.poll(limit_s):
            try:
                kind, content = receiving.recv()
            except EOFError:
                break
            if kind == "refused":
                code, sentence = content
                raise WrongInput(sentence) if code == 2 else Failure(sentence)
            yield content
        else:
            raise Died(f"nothing came of it for {limit_s:.0f} s")
        process.join()
        code = process.exitcode or 0
        if code == -signal.SIGKILL:  # nothing that a kernel does ends so
            raise Failure(
                "a process of the checks was killed, perhaps for want of memory; --quick takes less"
            )
        if code < 0:
            raise Died(f"its process died of {signal.Signals(-code).name}")
        if code:
            raise Failure("a process of the checks failed, as said above")
    finally:
        process.kill()
        process.join()
        receiving.close()


def answer(work: Callable[[], Any]) -> Any:
    """What `work` returns, computed there."""
    (result,) = messages(lambda send: send(work()), 60.0)
    return result


def _run(work: Callable[[Send], None], receiving: Any, sending: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    receiving.close()  # or this process would not see that its parent is gone
    code = 0
    try:
        work(lambda content: sending.send(("sent", content)))
    except BrokenPipeError:  # nobody listens any more
        code = 1
    except Exception as error:
        if found := verdict(error):
            sending.send(("refused", found))
        else:
            traceback.print_exc()
            code = 1
    sys.stderr.flush()
    os._exit(code)  # whatever the parent registered to be done at its own end
