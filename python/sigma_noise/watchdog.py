"""A process that undoes what an injector did, if the injector dies: `python watchdog.py PIDFD [PROCS_FILE DIR]`.

Its standard input is the injector's pipe.  `stop NS` says that the target is stopped until NS (CLOCK_MONOTONIC), `cont`
that it runs again, `done` that all is well.  At the end of the pipe without `done`, or when a stop outlives its time
(an injector that is itself stopped), the target gets SIGCONT; at the end of the pipe all that is in the control group
that was made is moved back, and the group is removed.  `cont` is answered by when the watchdog had to free the target,
in ns, or by 0.  It needs nothing but the standard library, so that it starts in milliseconds.
"""

import contextlib
import os
import select
import signal
import sys
import time

REMOVAL_S = 1.0  # that a group may be busy until the kernel has moved the last thread


def has_ended(pidfd: int) -> bool:
    """Whether the process is over; one whose parent has not asked for its end still takes signals."""
    return bool(select.select([pidfd], [], [], 0)[0])


def resume(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGCONT)


def remove_group(home: str, made: str) -> None:
    """Move what is in the group `made`, children of the target too, to the one of the file `home`; remove `made`.

    The numbers are those that the group itself has at the moment: the target's may be another process's by now.
    Raises: OSError if it is still there after a second.
    """
    deadline = time.monotonic() + REMOVAL_S
    while os.path.isdir(made):
        with open(f"{made}/cgroup.procs") as file:
            members = file.read().split()
        for pid in members:
            with contextlib.suppress(ProcessLookupError), open(home, "w") as file:  # ended meanwhile
                file.write(pid)
        try:
            os.rmdir(made)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)  # they are sent to the whole job: the injector acts on them
    pidfd, group = int(sys.argv[1]), sys.argv[2:]
    os.write(1, b"ready\n")
    until: float | None = None
    freed_ns = 0
    text = b""
    while True:
        left = None if until is None else max(0.0, until - time.monotonic())
        if not select.select([0], [], [], left)[0]:
            resume(pidfd)
            until, freed_ns = None, time.monotonic_ns()
            continue
        part = os.read(0, 4096)
        if not part:
            resume(pidfd)
            if group:
                remove_group(*group)
            return
        *lines, text = (text + part).split(b"\n")
        for line in lines:
            if line == b"done":
                return
            if line.startswith(b"stop "):
                until, freed_ns = int(line[5:]) * 1e-9, 0
            else:
                until = None
                with contextlib.suppress(
                    BrokenPipeError
                ):  # the injector has died: the end of the pipe is next
                    os.write(1, b"%d\n" % freed_ns)


if __name__ == "__main__":
    main()
