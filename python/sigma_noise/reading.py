"""Measurements from disk, for the verbs of `sigma noise`."""

from pathlib import Path

from sigma_train.errors import WrongInput

from sigma_noise import parts, steps, trace
from sigma_noise.trace import Trace


def read_any(path: Path) -> Trace:
    """A file or a folder, of a training that still goes on as well.  Raises: WrongInput."""
    return parts.read(path) if path.is_dir() and parts.has_any(path) else trace.read(path)


def read_quanta(path: Path) -> Trace:
    """A measurement of `sigma noise run` or an import.  Raises: WrongInput, for a record of a training too: the phases
    of its steps are no fixed work.
    """
    found = read_any(path)
    if steps.has_steps(found):
        raise WrongInput(
            f"{path}: a record of sigma train, whose steps are no quanta; `sigma noise analyze` reads it"
        )
    return found
