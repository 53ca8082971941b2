"""A process that undoes what an injector did, if the injector dies: `python watchdog.py PIDFD [PROCS_FILE PID DIR]`.

Its standard input is the injector's pipe.  `stop NS` says that the target is stopped until NS (CLOCK_MONOTONIC), `cont`
that it runs again, `done` that all is well.  At the end of the pipe without `done`, or when a stop outlives its time
(an injector that is itself stopped), the target gets SIGCONT, is moved back to its control group, and the group that
was made for it is removed.  It needs nothing but the standard library, so that it starts in milliseconds.
"""

import contextlib
import os
import select
import signal
import sys
import time


def rescue(pidfd: int, group: list[str]) -> None:
    with contextlib.suppress(OSError):  # the target may be gone
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    if group:
        procs, pid, made = group
        with contextlib.suppress(OSError), open(procs, "w") as file:
            file.write(pid)
        with contextlib.suppress(OSError):
            os.rmdir(made)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)  # they are sent to the whole job: the injector acts on them
    pidfd, group = int(sys.argv[1]), sys.argv[2:]
    os.write(1, b"ready\n")
    until: float | None = None
    text = b""
    while True:
        left = None if until is None else max(0.0, until - time.monotonic())
        if not select.select([0], [], [], left)[0]:
            rescue(pidfd, [])
            until = None
            continue
        part = os.read(0, 4096)
        if not part:
            rescue(pidfd, group)
            return
        *lines, text = (text + part).split(b"\n")
        for line in lines:
            if line == b"done":
                return
            until = int(line[5:]) * 1e-9 if line.startswith(b"stop ") else None


if __name__ == "__main__":
    main()
