"""A process that is not to outlive the one that started it."""

import ctypes
import signal


def end_with_parent() -> None:
    """Have Linux send SIGTERM when the parent dies, so that nothing trains on alone; it saves and ends."""
    libc, pr_set_pdeathsig = ctypes.CDLL(None), 1
    if hasattr(libc, "prctl"):
        libc.prctl(pr_set_pdeathsig, signal.SIGTERM)
